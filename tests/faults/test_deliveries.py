"""A projection between a real log and a stream that delivers what it likes: twice, never, in any order, made up."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedota.errors import FedotaError
from fedota.events import Event, EventData, encode, to_json
from fedota.events.problems import ParticipationRequested, ProblemCreated
from fedota.kernel import projection as kernel
from fedota.kernel.bus import Bus, StreamLostError
from fedota.kernel.database import Connection, Pool
from fedota.kernel.event_log import EventLog
from fedota.kernel.projection import Projection, Projector
from fedota.kernel.rebuilding import rebuild
from fedota.kernel.service import Service
from tests.contract.ground import Ground, created, requested
from tests.support.events import recorded
from tests.support.services import new_id, until

EVENTS: Final = 24
TABLES: Final = "create table if not exists seen (position bigint, subject text, data text);"
LOST: Final = -1  # in place of a position: the stream breaks off here
DELIVERIES = st.lists(st.lists(st.integers(LOST, EVENTS).filter(bool), min_size=1, max_size=12), max_size=8)


class Told(Bus):
    """A stream that delivers these batches, and then nothing more; no operator is there to ask anything."""

    def __init__(self, batches: Sequence[Sequence[bytes | None]]) -> None:
        self.name = "gateway"
        self._batches = list(batches)

    async def answer(self, endpoints: Any) -> Any:
        """Nobody asks."""

    @asynccontextmanager
    async def consume(self, after: int) -> AsyncIterator[Any]:
        """The same whatever is asked for."""
        yield self

    async def fetch(self) -> list[bytes]:
        """The next batch."""
        await asyncio.sleep(0 if self._batches else 0.002)
        bodies = self._batches.pop(0) if self._batches else []
        if None in bodies:
            raise StreamLostError("made up")
        return [body for body in bodies if body is not None]


class Seen:
    """A read model of everything, and the reactions that there were."""

    def __init__(self) -> None:
        self.reactions: list[int] = []
        kinds: tuple[type[EventData], ...] = (ProblemCreated, ParticipationRequested)
        reactions = dict.fromkeys(kinds, self._react)
        self.projection = Projection(tables=TABLES, names=("seen",), write=self._write, reactions=reactions)

    async def _write(self, connection: Connection, events: Sequence[Event]) -> None:
        rows = [(event.position, event.subject, to_json(event.data).decode()) for event in events]
        await connection.executemany("insert into seen values ($1, $2, $3)", rows)

    async def _react(self, event: Event, _: Any) -> None:
        self.reactions.append(event.position)


@asynccontextmanager
async def projecting(pool: Pool, seen: Seen, bus: Bus) -> AsyncIterator[tuple[Projector, Service]]:
    """The projection, running, told by this bus."""
    service = Service("gateway")
    async with (
        EventLog.open(pool) as log,
        Projector.open(service, seen.projection, pool, log, bus) as projector,
    ):
        yield projector, service


async def positions(pool: Pool) -> list[int]:
    """Of the rows, in the order in which they were written."""
    return [row["position"] for row in await pool.fetch("select position from seen order by ctid")]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A projection that tries again at once: a fault costs no second of the test."""
    monkeypatch.setattr(kernel, "_PAUSE", 0.002)


@pytest.fixture
async def pool(ground: Ground, impatient: None) -> AsyncIterator[Pool]:
    """The gateway's connections to a log of some streams."""
    problems = [new_id() for _ in range(5)]
    await ground.record(*(created(one) for one in problems))
    chance = random.Random(EVENTS)
    await ground.record(*(requested(chance.choice(problems), f"C{one}") for one in range(EVENTS - len(problems))))
    async with ground.pool("gateway") as opened:
        yield opened


@given(deliveries=DELIVERIES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_any_delivery_gives_each_row_once_and_in_order(
    ground: Ground, pool: Pool, deliveries: list[list[int]]
) -> None:
    """Whatever comes twice, late, never or out of order, as long as the newest event comes at some time."""
    bodies = {row["position"]: encode(dict(row)) for row in await ground.logs["rounds"].records(0)}
    batches = [[bodies.get(position) for position in batch] for batch in [*deliveries, [EVENTS]]]
    await pool.execute("drop table if exists seen, checkpoint, dead_letters")
    seen = Seen()
    async with projecting(pool, seen, Told(batches)) as (projector, _):
        await projector.wait_for(EVENTS, timeout=20)
        assert projector.stopped is None
    assert await positions(pool) == seen.reactions == list(range(1, EVENTS + 1))
    assert await pool.fetchval("select count(*) from dead_letters") == 0


async def test_what_the_log_does_not_have_is_not_projected(ground: Ground, pool: Pool) -> None:
    """A stream that is ahead of a log from an older copy: no row and no reaction comes of what it has too much."""
    seen = Seen()
    made_up = [_body(requested(new_id()), EVENTS + number) for number in range(1, 4)]
    bodies = [encode(dict(row)) for row in await ground.logs["rounds"].records(0)]
    async with projecting(pool, seen, Told([bodies, made_up])) as (projector, _):
        await projector.wait_for(EVENTS, timeout=20)
        position = await ground.record(requested(new_id()), requested(new_id()), requested(new_id()))
        # the log's own events have come to these positions meanwhile: the stream has others there
        told = Told([made_up])
        async with projecting(pool, seen, told):
            await projector.wait_for(position, timeout=20)
    assert await positions(pool) == seen.reactions == list(range(1, position + 1))
    stored = [row["data"] for row in await pool.fetch("select data from seen order by position")]
    assert stored == [row["data"].decode() for row in await ground.logs["rounds"].records(0)]


def _body(data: Any, position: int) -> bytes:
    event = recorded(data, position=position)
    names = ("id", "type", "schema", "subject", "version", "time", "actor", "correlation", "causation", "traceparent")
    return encode({name: getattr(event, name) for name in names} | {"position": position, "data": to_json(data)})


async def test_what_postgresql_lost_is_projected_again(ground: Ground, pool: Pool) -> None:
    """Its commits wait for no disk, so a crash takes the last ones back; the process may not even notice the crash."""
    seen, bodies = Seen(), [encode(dict(row)) for row in await ground.logs["rounds"].records(0)]
    told = Told([bodies])
    async with projecting(pool, seen, told) as (projector, _):
        await projector.wait_for(EVENTS, timeout=20)
        async with ground.superuser() as connection, connection.transaction():
            await connection.execute(f"delete from gateway.seen where position > {EVENTS - 5}")
            await connection.execute(
                "update gateway.checkpoint set position = $1,"
                " event = (select id from fedota.events where position = $1)",
                EVENTS - 5,
            )
        position = await ground.record(requested(new_id()))
        [row] = await ground.logs["rounds"].records(EVENTS)
        told._batches.append([encode(dict(row))])

        async def all_there() -> bool:
            return await positions(pool) == list(range(1, position + 1))

        await until(all_there, "no row is missing")
    assert set(seen.reactions) == set(range(1, position + 1))


@pytest.mark.parametrize("appended", [0, 3, 30])
async def test_a_read_model_that_is_ahead_of_the_log_says_so(ground: Ground, pool: Pool, appended: int) -> None:
    """The log was restored from an older copy, its read model was not: nothing of what is new is skipped in silence."""
    seen, bodies = Seen(), [encode(dict(row)) for row in await ground.logs["rounds"].records(0)]
    async with projecting(pool, seen, Told([bodies])) as (projector, _):
        await projector.wait_for(EVENTS, timeout=20)
    # as if seven events had been there that this log has not
    await pool.execute(f"update checkpoint set position = {EVENTS + 7}, event = gen_random_uuid()")
    for _ in range(appended):
        await ground.record(requested(new_id()))
    head = EVENTS + appended
    async with projecting(pool, seen, Told([])) as (projector, service):
        await until(service.failures, "readiness says that something is wrong")
        said = (await service.failures())["projection"]
        assert "restored from an older copy" in said and f"position {EVENTS + 7}" in said and f"at {head}:" in said
        assert len(await positions(pool)) == EVENTS, "nothing was projected past the gap"
        # what it says to do
        assert "fedota projections rebuild gateway" in said
        await pool.execute("insert into dead_letters (position, subject, type, error) values (1, 'a/b', 'C', 'D')")
        await rebuild(seen.projection, pool, ground.logs["rounds"])
        await until(lambda: _stands_at(projector, head), "it is made anew")
        await until(lambda: _is_well(service), "and says so")
    assert await positions(pool) == list(range(1, head + 1))


async def _stands_at(projector: Projector, position: int) -> bool:
    try:
        await projector.wait_for(position, timeout=0.01)
    except FedotaError:
        return False
    return True


async def _is_well(service: Service) -> bool:
    return not await service.failures()
