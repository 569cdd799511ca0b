"""Any sequence of appends, repetitions and cut connections, against a model of the log that fits in a few lines."""

import asyncio
import os
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from typing import Any, ClassVar
from uuid import UUID

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from fedota.errors import FedotaError
from fedota.events import NewEvent, to_json, uuid7
from fedota.kernel.database import Connection
from fedota.kernel.event_log import Append, Appended, Context, EventLog, fingerprint
from fedota.kernel.migrations import PROCESSES, migrate
from tests.contract.ground import Ground
from tests.faults.conftest import COUNT
from tests.faults.load import a_report
from tests.support.servers import RunningServers, fresh_database
from tests.support.services import PASSWORD, new_id, until

STREAMS = st.integers(0, 2)
EXPECTED = st.sampled_from(["anything", "right", "wrong"])
# a failure is told as it was found: to make it small takes many minutes on a real server
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
EXAMPLES = 10 * int(os.environ.get(COUNT, "4")) // 4


class Database:
    """A log in a loop of its own: Hypothesis calls plain functions."""

    def __init__(self, servers: RunningServers) -> None:
        self.runner = asyncio.Runner()
        self._stack = AsyncExitStack()
        self.log: EventLog
        self.ground: Ground
        self.run(self._open(servers))

    def run(self, work: Any) -> Any:
        """What comes of it."""
        return self.runner.run(work)

    async def _open(self, servers: RunningServers) -> None:
        url = await self._stack.enter_async_context(fresh_database(servers.admin_url))
        await migrate(url, dict.fromkeys(PROCESSES, PASSWORD), share_roles=True)
        self.ground = Ground(servers, url)
        self.log = await self._stack.enter_async_context(self.ground.log("rounds"))

    def close(self) -> None:
        """Leave nothing."""
        self.run(self._stack.aclose())
        self.runner.close()


class Log(RuleBasedStateMachine):
    """`head`, `streams` and `answers` are kept by hand; the log must agree after each step."""

    database: ClassVar[Database]

    def __init__(self) -> None:
        super().__init__()
        self.head = self.database.run(self.database.log.head())
        self.names = [new_id() for _ in range(3)]
        self.streams: dict[str, list[UUID]] = {name: [] for name in self.names}
        self.answers: list[tuple[Append, Appended]] = []

    def request(self, stream: int, count: int, expected: str = "anything", key: str | None = None) -> Append:
        """An append to one of the streams."""
        name = self.names[stream]
        version = len(self.streams[name])
        data = [a_report(name, number) for number in range(1, count + 1)]
        return Append(
            subject=f"rounds/{name}",
            events=[NewEvent(data=one) for one in data],
            context=Context(actor="machine", correlation=uuid7()),
            expected={"anything": None, "right": version, "wrong": version + 1}[expected],
            key=key or str(uuid7()),
            fingerprint=fingerprint(*map(to_json, data)),
            result=b"result",
        )

    def send(self, *requests: Append) -> Sequence[Any]:
        """The answers to requests that are made in the same moment."""

        async def gathered() -> list[Any]:
            return await asyncio.gather(*map(self.database.log.append, requests), return_exceptions=True)

        answers: list[Any] = self.database.run(gathered())
        return answers

    def accept(self, request: Append, answer: Any) -> None:
        """It is new: the answer is where the model says that it must be."""
        name = request.subject.partition("/")[2]
        self.streams[name] += [event.id for event in request.events]
        self.head += len(request.events)
        assert answer == Appended(position=self.head, version=len(self.streams[name]), result=b"result", repeated=False)
        self.answers.append((request, answer))

    @rule(stream=STREAMS, count=st.integers(1, 3), expected=EXPECTED)
    def append(self, stream: int, count: int, expected: str) -> None:
        """With the right expectation or with none it is accepted."""
        request = self.request(stream, count, expected)
        [answer] = self.send(request)
        if expected == "wrong":
            assert _code(answer) == "conflict"
        else:
            self.accept(request, answer)

    @precondition(lambda self: self.answers)
    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        """Whatever has happened since, the first answer comes again; another body is refused."""
        request, first = data.draw(st.sampled_from(self.answers))
        another = self.request(0, 4, key=request.key)
        repeated, refused = self.send(request, another)
        assert repeated == Appended(position=first.position, version=first.version, result=b"result", repeated=True)
        assert _code(refused) == "key_reused"

    @rule(stream=STREAMS)
    def race(self, stream: int) -> None:
        """Of two who decided on the same version one is told to think again."""
        one, other = self.request(stream, 1, "right"), self.request(stream, 2, "right")
        first, second = self.send(one, other)
        winner, loser = ((one, first), second) if isinstance(first, Appended) else ((other, second), first)
        self.accept(*winner)
        assert _code(loser) == "conflict"

    @rule(stream=STREAMS, count=st.integers(1, 3))
    def twice_at_once(self, stream: int, count: int) -> None:
        """The same request twice in one moment, and a stranger's with the same key."""
        request = self.request(stream, count)
        stranger = self.request(stream, count + 1, key=request.key)
        first, second, third = self.send(request, request, stranger)
        self.accept(request, first)
        assert (second.position, second.version, second.repeated) == (first.position, first.version, True)
        assert _code(third) == "key_reused"

    @rule(stream=STREAMS)
    def cut(self, stream: int) -> None:
        """Every connection is cut in the moment of an append: it is there once, whatever its sender heard."""
        request = self.request(stream, 2)

        async def both() -> None:
            async with self.database.ground.superuser() as connection:
                appending = asyncio.ensure_future(self.database.log.append(request))
                cut = await connection.fetch(
                    "select pid, pg_terminate_backend(pid) from pg_stat_activity"
                    " where datname = current_database() and pid <> pg_backend_pid()"
                )
                await asyncio.wait([appending])
                appending.exception()
                # one that is told to go and has not gone yet would be given to the next who asks
                await until(lambda: _have_ended(connection, [row["pid"] for row in cut]), "all of them are cut")

        self.database.run(both())
        [answer] = self.send(request)
        while _code(answer) == "unavailable":
            [answer] = self.send(request)
        self.accept(
            request, Appended(position=answer.position, version=answer.version, result=b"result", repeated=False)
        )

    @invariant()
    def agrees(self) -> None:
        """The head, and each stream's events in their order."""

        async def found() -> tuple[int, dict[str, list[UUID]]]:
            log = self.database.log
            streams = {name: [event.id for event in await log.stream(f"rounds/{name}")] for name in self.names}
            return await log.head(), streams

        assert self.database.run(found()) == (self.head, self.streams)


async def _have_ended(connection: Connection, pids: list[int]) -> bool:
    return not await connection.fetchval("select count(*) from pg_stat_activity where pid = any($1)", pids)


def _code(answer: Any) -> str:
    return answer.problem.code if isinstance(answer, FedotaError) else ""


@pytest.fixture
def database(servers: RunningServers) -> Iterator[Database]:
    """A log that nothing else writes to."""
    made = Database(servers)
    yield made
    made.close()


def test_the_log_is_what_a_few_lines_say_that_it_is(database: Database) -> None:
    """Few examples of a dozen steps each: every step is a transaction of a real server."""
    machine = type("OnDatabase", (Log,), {"database": database})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=12,
            deadline=None,
            phases=PHASES,
            suppress_health_check=list(HealthCheck),
        ),
    )
