"""A projection under any sequence of deliveries, crashes, poison, retries, drops and rebuilds, against a model."""

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from fedota.events import Event, NewEvent, uuid7
from fedota.events.rounds import RoundUpdated
from fedota.kernel import dead_letters
from fedota.kernel.database import Connection, Pool
from fedota.kernel.event_log import Append, Context, EventLog
from fedota.kernel.projection import Projection, Projector
from fedota.kernel.rebuilding import rebuild, verify
from tests.faults.load import a_report
from tests.faults.test_deliveries import Told
from tests.faults.test_log_machine import EXAMPLES, PHASES, Database
from tests.support.servers import RunningServers
from tests.support.services import new_id

STREAMS = 2
TABLES = "create table if not exists seen (position bigint, subject text);"


class PoisonedError(Exception):
    """Made up."""


class World(Database):
    """A log, and the pool of the process whose read model it is."""

    async def _open(self, servers: RunningServers) -> None:
        await super()._open(servers)
        self.pool: Pool = await self._stack.enter_async_context(self.ground.pool("gateway"))
        self.reader = await self._stack.enter_async_context(EventLog.open(self.pool))


class Projected(RuleBasedStateMachine):
    """`at`, `handled`, `parked` and `dropped` are kept by hand; the tables must agree after each step."""

    world: ClassVar[World]

    def __init__(self) -> None:
        super().__init__()
        self.names = [f"rounds/{new_id()}" for _ in range(STREAMS)]
        self.log: list[str] = []  # the stream of each event, in order; positions count from `begun`
        self.poisoned: set[str] = set()
        self.at = 0
        self.handled: set[int] = set()
        self.parked: dict[int, str] = {}
        self.dropped: set[int] = set()
        self.reacted: Counter[int] = Counter()
        self.may_repeat: set[int] = set()
        self.dies_at: int | None = None
        self.projection = Projection(
            tables=TABLES, names=("seen",), write=self._write, reactions={RoundUpdated: self._react}
        )
        self.begun = self.world.run(self.world.log.head())
        self.projector: Projector
        self.world.run(self._start_anew())

    async def _start_anew(self) -> None:
        """As if what other examples left in the log had been projected long ago."""
        await self.world.pool.execute("drop table if exists seen, checkpoint, dead_letters")
        await self._live()
        await self.world.pool.execute(
            "update checkpoint set position = $1, event = (select id from fedota.events where position = $1)",
            self.begun,
        )
        await self.projector._look()

    async def _live(self) -> None:
        self.projector = Projector(self.projection, self.world.pool, self.world.reader, Told([]))
        await self.projector._prepare()
        await self.projector._look()

    async def _write(self, connection: Connection, events: Sequence[Event]) -> None:
        rows = [(event.position, event.subject) for event in events if event.position > self.begun]
        await connection.executemany("insert into seen values ($1, $2)", rows)
        if self.poisoned.intersection(subject for _, subject in rows):
            raise PoisonedError

    async def _react(self, event: Event, _: Any) -> None:
        if event.position - self.begun == self.dies_at:
            raise asyncio.CancelledError
        self.reacted[event.position - self.begun] += 1

    @rule(streams=st.lists(st.integers(0, STREAMS - 1), min_size=1, max_size=5))
    def append(self, streams: list[int]) -> None:
        """Events come into the log."""
        for stream in streams:
            name = self.names[stream]
            events = [NewEvent(data=a_report(name.partition("/")[2], 1))]
            context = Context(actor="machine", correlation=uuid7())
            self.world.run(self.world.log.append(Append(subject=name, events=events, context=context)))
            self.log.append(name)

    @rule(streams=st.lists(st.integers(0, STREAMS - 1), min_size=1, max_size=5))
    def come(self, streams: list[int]) -> None:
        """Events come into the log, and all that there is is delivered in its order."""
        self.append(streams)
        first, last = self.at + 1, len(self.log)
        self.world.run(self._take(list(range(first, last + 1))))
        self._expect(last)

    @precondition(lambda self: self.log)
    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        """Some of them in any order, some twice: everything up to the newest of them is projected."""
        drawn = data.draw(st.lists(st.integers(1, len(self.log)), min_size=1, max_size=8))
        self.world.run(self._take(drawn))
        self._expect(max(drawn))

    async def _take(self, positions: list[int]) -> None:
        events = await self.world.reader.read(self.begun)
        async with self.world.pool.acquire() as connection:
            await self.projector._take([events[position - 1] for position in positions], connection)

    def _expect(self, last: int) -> None:
        for position in range(self.at + 1, last + 1):
            name = self.log[position - 1]
            if name in self.poisoned or name in self.parked.values():
                self.parked[position] = name
            else:
                self.handled.add(position)
        self.at = max(self.at, last)

    @precondition(lambda self: self.at < len(self.log) and not self.poisoned)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        """In the middle of a batch, after some reactions: nothing of it is there, and another process goes on."""
        last = data.draw(st.integers(self.at + 1, len(self.log)))
        self.dies_at = data.draw(st.integers(self.at + 1, last))
        task = self._take(list(range(self.at + 1, last + 1)))

        async def dying() -> None:
            await asyncio.gather(asyncio.create_task(task), return_exceptions=True)
            await self._live()

        before = self.reacted.copy()
        self.world.run(dying())
        dies_at, self.dies_at = self.dies_at, None
        self.may_repeat |= set(self.reacted - before)
        if self.log[dies_at - 1] in self.parked.values():  # it has no reaction to die in
            self._expect(last)

    @rule()
    def start_again(self) -> None:
        """Another process takes over."""
        self.world.run(self._live())

    @rule(stream=st.integers(0, STREAMS - 1))
    def poison(self, stream: int) -> None:
        """The handler can do nothing with this stream from now on."""
        self.poisoned.add(self.names[stream])

    @precondition(lambda self: self.poisoned)
    @rule()
    def heal(self) -> None:
        """It was mended."""
        self.poisoned.clear()

    @precondition(lambda self: self.parked)
    @rule()
    def come_behind(self) -> None:
        """What was wrong is mended, and more of a stream comes that waits: it waits behind the rest."""
        self.poisoned.clear()
        self.come([self.names.index(next(iter(self.parked.values())))])

    @precondition(lambda self: self.at)
    @rule(data=st.data())
    def retry(self, data: st.DataObject) -> None:
        """Those of the stream take effect in their order if they can; twice makes no difference."""
        position = data.draw(st.sampled_from(sorted(self.parked) or sorted(self.handled) or [0]))
        if position == 0:
            return
        name = self.parked.get(position)
        waiting = [one for one, subject in self.parked.items() if subject == name]
        for _ in range(2):
            work = dead_letters.retry(self.projection, self.world.pool, self.begun + position)
            retried = self.world.run(work)
            if name in self.poisoned:
                assert (retried.handled, retried.left) == (0, len(waiting)) and "PoisonedError" in retried.error
            else:
                assert (retried.handled, retried.left, retried.error) == (len(waiting), 0, "")
                self.handled.update(waiting)
                self.parked = {one: subject for one, subject in self.parked.items() if subject != name}
                waiting = []

    @precondition(lambda self: self.parked)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        """One is given up for good; those behind it wait on."""
        position = data.draw(st.sampled_from(sorted(self.parked)))
        letter = self.world.run(dead_letters.drop(self.world.pool, self.begun + position, "operator"))
        assert (letter.state, letter.dropped_by) == ("dropped", "operator")
        del self.parked[position]
        self.dropped.add(position)

    @precondition(lambda self: not self.poisoned)
    @rule()
    def rebuild(self) -> None:
        """No row differs and no reaction repeats."""
        rows, differences = self.world.run(verify(self.projection, self.world.pool, self.world.reader, lambda *_: None))
        assert (rows, differences) == (len(self.handled), [])
        made = self.world.run(rebuild(self.projection, self.world.pool, self.world.reader, lambda *_: None))
        assert made == len(self.handled)

    @invariant()
    def agrees(self) -> None:
        """Rows once each, dead letters in their state, reactions once but for those of a process that died."""
        rows, letters, position = self.world.run(self._found())
        assert rows == sorted(self.handled)
        assert letters == sorted([(one, "parked") for one in self.parked] + [(one, "dropped") for one in self.dropped])
        assert position == self.at
        assert self.handled <= set(self.reacted) <= self.handled | self.may_repeat
        assert {one for one, times in self.reacted.items() if times > 1} <= self.may_repeat

    async def _found(self) -> tuple[list[int], list[tuple[int, str]], int]:
        pool = self.world.pool
        rows = [row["position"] - self.begun for row in await pool.fetch("select position from seen order by 1")]
        letters = await pool.fetch("select position, state from dead_letters order by position")
        position = await pool.fetchval("select position from checkpoint")
        return rows, [(row["position"] - self.begun, row["state"]) for row in letters], position - self.begun


@pytest.fixture
def world(servers: RunningServers) -> Iterator[World]:
    """A log that nothing else writes to."""
    made = World(servers)
    yield made
    made.close()


def test_a_projection_is_what_a_few_lines_say_that_it_is(world: World) -> None:
    """Few examples of some steps each: every step is a transaction of a real server."""
    machine = type("InWorld", (Projected,), {"world": world})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=25,
            deadline=None,
            phases=PHASES,
            suppress_health_check=list(HealthCheck),
        ),
    )
