"""What the log promises to who appends: each request alone, each key once, in shared transactions."""

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fedota.contracts.commands import Request
from fedota.errors import FedotaError
from fedota.events import NewEvent, UnknownEventError, uuid7
from fedota.events.envelope import EventData
from fedota.events.rounds import RoundUpdated
from fedota.kernel.database import connect_pool
from fedota.kernel.event_log import Append, Appended, Context, EventLog, fingerprint
from fedota.kernel.migrations import PROCESSES, migrate
from fedota.local.postgres import postgres
from fedota.local.programs import kept_alive
from fedota.local.state import DataDirectory
from tests.contract.ground import Ground, created, requested
from tests.support.servers import RunningServers
from tests.support.services import PASSWORD, new_id, until

CONTEXT = Context(actor="test", correlation=uuid7())


def request(problem_id: str, *data: EventData, **more: Any) -> Append:
    """A request to append to a problem's stream."""
    events = [NewEvent(data=one) for one in data or (requested(problem_id),)]
    return Append(subject=f"problems/{problem_id}", events=events, context=CONTEXT, **more)


async def outcomes(log: EventLog, *requests: Append) -> list[Appended | str]:
    """What came of requests that were made at the same time: the answer, or the code of the refusal."""

    async def one(made: Append) -> Appended | str:
        try:
            return await log.append(made)
        except FedotaError as error:
            return error.problem.code

    return list(await asyncio.gather(*map(one, requests)))


async def transactions(ground: Ground) -> int:
    """How many transactions the events of the log came in."""
    async with ground.superuser() as connection:
        count: int = await connection.fetchval("select count(distinct xmin::text) from fedota.events")
        return count


async def test_an_event_comes_back_as_it_was_appended(ground: Ground) -> None:
    """With who did it and what it goes back to; by position, by stream, newest first."""
    log, problem_id = ground.logs["problems"], new_id()
    context = Context(actor="setter", correlation=uuid7(), causation=uuid7(), traceparent="00-ab-cd-01")
    events = [NewEvent(data=created(problem_id)), NewEvent(data=requested(problem_id))]
    answer = await log.append(Append(subject=f"problems/{problem_id}", events=events, context=context, result=b"r"))
    assert answer == Appended(position=2, version=2, result=b"r", repeated=False)
    found = await log.read(0)
    assert [(one.id, one.data, one.position, one.version) for one in found] == [
        (event.id, event.data, number, number) for number, event in enumerate(events, 1)
    ]
    assert {(one.actor, one.correlation, one.causation, one.traceparent) for one in found} == {
        ("setter", context.correlation, context.causation, "00-ab-cd-01")
    }
    assert await log.stream(f"problems/{problem_id}") == found
    assert await log.newest(f"problems/{problem_id}", limit=5) == found[::-1]
    assert await log.newest(f"problems/{problem_id}", limit=1, before=2) == found[:1]
    assert [row["position"] for row in await log.records(0, subjects=["problems/other"])] == []


async def test_a_context_says_what_caused_it(ground: Ground) -> None:
    """A command's actor and request; of a reaction, the event and its request."""
    asked = Request(actor="setter", key="k", correlation=uuid7(), deadline=0, command=msgspec.Raw(b"{}"))
    await ground.record(created())
    [event] = await ground.logs["problems"].read(0)
    assert Context.of_request(asked) == Context(actor="setter", correlation=asked.correlation)
    reaction = Context.of_event("rounds", event)
    assert reaction == Context(actor="service:rounds", correlation=event.correlation, causation=event.id)


async def test_a_conflict_is_refused_alone(ground: Ground) -> None:
    """The others of its batch are accepted, those that expect the right version too; the answer is each one's own."""
    log, one, other = ground.logs["problems"], new_id(), new_id()
    await log.append(request(one))
    async with _held_up(ground):
        asked = [
            request(one, expected=1),  # right
            request(one, expected=1),  # too late: the one before it came first
            request(other, expected=0),
            request(other, expected=0),
            request(one),  # wants no version
            request(one, expected=3),
        ]
        waiting = asyncio.create_task(outcomes(log, *asked))
        await _queued(log, len(asked))
    found = await waiting
    assert [one_ if isinstance(one_, str) else (one_.position, one_.version) for one_ in found] == [
        (2, 2),
        "conflict",
        (3, 1),
        "conflict",
        (4, 3),
        (5, 4),
    ]
    assert await transactions(ground) <= 3  # the first, the one that the lock held up, and all the rest


async def test_only_one_of_many_who_decided_on_the_same_state_wins(ground: Ground) -> None:
    """Through several processes' logs as well."""
    problem_id = new_id()
    async with ground.log("problems") as second:
        logs = [ground.logs["problems"], second]
        found = await asyncio.gather(
            *(outcomes(logs[number % 2], request(problem_id, expected=0)) for number in range(40))
        )
    codes = [outcome if isinstance(outcome, str) else "accepted" for [outcome] in found]
    assert codes.count("accepted") == 1 and codes.count("conflict") == 39
    assert await logs[0].head() == 1


async def test_a_key_gives_its_first_answer_again(ground: Ground) -> None:
    """Although the stream has moved on; another body is refused; both also within one batch."""
    log, problem_id = ground.logs["problems"], new_id()
    body, other = fingerprint(b"body"), fingerprint(b"other")
    assert body != other and fingerprint(b"a", b"b") != fingerprint(b"ab")
    first = await log.append(request(problem_id, key="k", fingerprint=body, result=b"first", expected=0))
    await log.append(request(problem_id))
    repeated = await log.append(request(problem_id, key="k", fingerprint=body, result=b"second", expected=0))
    assert repeated == msgspec.structs.replace(first, repeated=True)
    assert await log.recorded("k", body) == repeated
    assert await log.recorded("unknown", body) is None
    with pytest.raises(FedotaError, match="key_reused"):
        await log.append(request(problem_id, key="k", fingerprint=other))
    with pytest.raises(FedotaError, match="key_reused"):
        await log.recorded("k", other)
    found = await outcomes(
        log, *(request(problem_id, key="at once", fingerprint=body) for _ in range(20)), request(problem_id, key="k")
    )
    assert found.pop() == "key_reused"
    assert {one.position for one in found if isinstance(one, Appended)} == {3}
    assert sorted(one.repeated for one in found if isinstance(one, Appended)) == [False] + [True] * 19
    assert await log.head() == 3


async def test_a_refused_request_leaves_its_key_free(ground: Ground) -> None:
    """Nothing was done with it: it may be tried again on newer state."""
    log, problem_id = ground.logs["problems"], new_id()
    assert await outcomes(log, request(problem_id, key="k", expected=7)) == ["conflict"]
    assert await log.recorded("k", b"") is None
    [answer] = await outcomes(log, request(problem_id, key="k", expected=0))
    assert isinstance(answer, Appended) and not answer.repeated


async def test_appends_share_transactions(ground: Ground) -> None:
    """Many callers at once make few commits; each still gets a position of its own."""
    log = ground.logs["problems"]
    found = await outcomes(log, *(request(new_id()) for _ in range(600)))
    assert sorted(one.position for one in found if isinstance(one, Appended)) == list(range(1, 601))
    assert await transactions(ground) <= 6


async def test_what_the_database_refuses_fails_alone(ground: Ground) -> None:
    """A request that breaks its transaction does not take the others with it."""
    log = ground.logs["problems"]
    bad = msgspec.structs.replace(request(new_id()), subject="problems/NOT a subject")
    found = await asyncio.gather(
        *(log.append(one) for one in (request(new_id()), bad, request(new_id()))), return_exceptions=True
    )
    assert [type(one).__name__ for one in found] == ["Appended", "CheckViolationError", "Appended"]
    assert await log.head() == 2


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (lambda id_: RoundUpdated(problem_id=id_, run=1, report=1, round=1, attempt=1, stage="nonsense", goal_count=1,  # type: ignore[arg-type]
                                  minimum_count=1), msgspec.ValidationError),
        (lambda id_: RoundUpdated(problem_id=id_, run=1, report=1, round=1, attempt=1, stage="selection", goal_count=1,
                                  minimum_count=1, metrics={"loss": float("nan")}), msgspec.ValidationError),
        (lambda id_: EventData(problem_id=id_), UnknownEventError),
    ],
    ids=["wrong value", "NaN", "unknown type"],
)  # fmt: skip
async def test_what_nobody_could_read_is_not_written(ground: Ground, data: Any, error: type[Exception]) -> None:
    """It would stop every reader for good. Its caller hears of it; the log goes on."""
    log, problem_id = ground.logs["rounds"], new_id()
    bad = Append(subject=f"rounds/{problem_id}", events=[NewEvent(data=data(problem_id))], context=CONTEXT)
    with pytest.raises(error):
        await log.append(bad)
    assert await log.head() == 0
    await ground.record(created())
    assert await log.head() == 1


async def test_a_caller_that_goes_leaves_the_others_be(ground: Ground) -> None:
    """What it asked for may still be done; nobody else's answer is mixed up."""
    log = ground.logs["problems"]
    async with _held_up(ground):
        tasks = [asyncio.create_task(log.append(request(new_id()))) for _ in range(5)]
        await _queued(log, 5)
        tasks[2].cancel()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    positions = [one.position for one in found if isinstance(one, Appended)]
    assert isinstance(found[2], asyncio.CancelledError) and sorted(positions) == positions and len(positions) == 4


async def test_a_log_that_closes_finishes_and_then_refuses(ground: Ground) -> None:
    """What was begun is answered; who comes later is told at once and does not wait for ever."""
    async with ground.log("problems") as log:
        begun = [asyncio.create_task(log.append(request(new_id()))) for _ in range(100)]
        await asyncio.sleep(0)  # each takes its first step, which puts it into the queue
    assert all(task.done() for task in begun) and len({(await task).position for task in begun}) == 100
    with pytest.raises(FedotaError, match="unavailable"):
        await asyncio.wait_for(log.append(request(new_id())), 5)


async def test_what_was_answered_survives_a_killed_database(tmp_path: Path, servers: RunningServers) -> None:
    """PostgreSQL is killed with -9 again and again: no answer is lost, and what is asked again is done once."""
    program, url = await postgres(data := DataDirectory(tmp_path))
    answers: dict[str, Appended] = {}
    async with kept_alive(program):
        await migrate(url, dict.fromkeys(PROCESSES, PASSWORD), share_roles=True)
        ground = Ground(servers, url)
        async with connect_pool(ground.role_url("problems"), "problems", size=4) as pool, EventLog.open(pool) as log:

            async def writer(name: int) -> None:
                problem_id = new_id()
                for number in range(60):
                    asked = request(problem_id, key=f"{name}/{number}")
                    while asked.key not in answers:
                        try:
                            answers[asked.key] = await log.append(asked)
                        except FedotaError as error:
                            assert error.problem.code == "unavailable"
                            await asyncio.sleep(0.05)

            writing = asyncio.gather(*(writer(name) for name in range(8)))
            killed = set()
            for threshold in (60, 240):
                await until(lambda at=threshold: _reached(answers, at))  # type: ignore[misc]
                killed.add(_kill_postmaster(data.path))
            await writing
            assert len(killed) == 2
            events = await log.read(0, limit=10_000)
            assert await log.head() == len(events) == 480
            positions = {event.position: event.version for event in events}
            assert all(positions[answer.position] == answer.version for answer in answers.values())
            assert len({answer.position for answer in answers.values()}) == 480


async def _reached(answers: dict[str, Appended], count: int) -> bool:
    return len(answers) >= count


def _kill_postmaster(directory: Path) -> int:
    pid = int((directory / "postgres" / "data" / "postmaster.pid").read_text().split()[0])
    os.kill(pid, signal.SIGKILL)
    return pid


class _held_up:  # noqa: N801 - read as a block, like a function
    """While the block lasts nothing is appended: the lock on head is somebody else's."""

    def __init__(self, ground: Ground) -> None:
        self._superuser = ground.superuser()

    async def __aenter__(self) -> None:
        connection = await self._superuser.__aenter__()
        await connection.execute("begin; select from fedota.head for update")

    async def __aexit__(self, *_: object) -> None:
        await self._superuser.__aexit__(None, None, None)


async def _queued(log: EventLog, count: int) -> None:
    """Return when so many requests wait for their answer."""

    async def there() -> bool:
        return log._queue._unfinished_tasks >= count  # type: ignore[attr-defined, no-any-return]

    await until(there)
