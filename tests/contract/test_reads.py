"""Reading the log: filters find exactly what is asked for, pages go on where they ended, replay is complete."""

import asyncio
from contextlib import aclosing
from datetime import datetime, timedelta
from typing import Any

import asyncpg
import msgspec
import pytest

from fedota.events import EventData, NewEvent, uuid7
from fedota.kernel.event_log import Append, Context, EventLog, event_of
from fedota.kernel.log_queries import COLUMNS, Wanted
from tests.contract.ground import Ground, created, deleted, requested
from tests.support.services import new_id

FIRST, SECOND = new_id(), new_id()


async def record(ground: Ground, owner: str, actor: str, *events: EventData) -> None:
    """One append to one stream."""
    context = Context(actor=actor, correlation=uuid7())
    subject = f"{owner}/{events[0].problem_id}"
    appended = [NewEvent(data=data) for data in events]
    await ground.logs[owner].append(Append(subject=subject, events=appended, context=context))


@pytest.fixture
async def log(ground: Ground) -> EventLog:
    """Two problems' streams, interleaved, by three actors, at seven times."""
    await record(ground, "problems", "anna", created(FIRST), requested(FIRST))  # 1, 2
    await record(ground, "problems", "bert", created(SECOND))  # 3
    await record(ground, "storage", "carl", deleted(FIRST))  # 4
    await record(ground, "problems", "bert", requested(SECOND), requested(SECOND, "B"))  # 5, 6
    await record(ground, "storage", "carl", deleted(SECOND), deleted(SECOND))  # 7, 8
    await record(ground, "problems", "anna", requested(FIRST, "C"))  # 9
    await record(ground, "storage", "Anna", deleted(FIRST))  # 10
    return ground.logs["problems"]


BOTH = [f"problems/{FIRST}", f"storage/{FIRST}"]
CASES: list[tuple[dict[str, Any], list[int]]] = [
    ({}, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
    ({"until": 3}, [1, 2, 3]),
    ({"until": 99}, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
    ({"until": 0}, []),
    ({"subjects": BOTH}, [1, 2, 4, 9, 10]),
    ({"subjects": [*BOTH, *BOTH]}, [1, 2, 4, 9, 10]),
    ({"subjects": BOTH, "until": 9}, [1, 2, 4, 9]),
    ({"subjects": [f"storage/{SECOND}"]}, [7, 8]),
    ({"subjects": [f"rounds/{SECOND}"]}, []),
    ({"subjects": []}, []),
    ({"types": ["ParticipationRequested"]}, [2, 5, 6, 9]),
    ({"types": ["ParticipationRequested", "FilesDeleted"], "until": 8}, [2, 4, 5, 6, 7, 8]),
    ({"types": ["Unheard"]}, []),
    ({"types": []}, []),
    ({"actor": "anna"}, [1, 2, 9]),
    ({"actor": "ann"}, []),
    ({"actor": "a%"}, []),
    ({"actor": "bert", "types": ["ProblemCreated"]}, [3]),
    ({"subjects": BOTH, "types": ["FilesDeleted"], "actor": "Anna"}, [10]),
]


@pytest.mark.parametrize(("filters", "positions"), CASES, ids=lambda value: str(value)[:40])
async def test_filters(log: EventLog, filters: dict[str, Any], positions: list[int]) -> None:
    """From the beginning and from anywhere, in pages of any size; `scan` finds the same and reaches the end."""
    end = min(10, filters.get("until", 10))
    for after in range(12):
        fitting = [position for position in positions if position > after]
        assert await _positions(log, after, 1000, filters) == fitting
        for limit in (1, 2, 3):
            assert await _positions(log, after, limit, filters) == fitting[:limit]
            scanned = await log.scan(after, limit=limit, **filters)
            assert [row["position"] for row in scanned.records] == fitting[:limit]
            assert scanned.reached == (fitting[limit - 1] if len(fitting) >= limit else max(after, end))


async def _positions(log: EventLog, after: int, limit: int, filters: dict[str, Any]) -> list[int]:
    return [row["position"] for row in await log.records(after, limit=limit, **filters)]


async def test_times(log: EventLog) -> None:
    """`since` is included, `before` is not; events of one append have one time."""
    times: dict[int, datetime] = {row["position"]: row["time"] for row in await log.records(0)}
    moment = timedelta(microseconds=1)
    for at in range(1, 11):
        for shift in (-moment, timedelta(0), moment):
            begin = times[at] + shift
            for limit in (2, 1000):
                later = [position for position, when in times.items() if when >= begin][:limit]
                assert await _positions(log, 0, limit, {"since": begin}) == later
                earlier = [position for position, when in times.items() if when < begin][:limit]
                assert await _positions(log, 0, limit, {"before": begin}) == earlier
    both = {"since": times[3], "before": times[9]}
    assert await _positions(log, 0, 1000, both) == [3, 4, 5, 6, 7, 8]
    assert await _positions(log, 5, 1000, {**both, "types": ["FilesDeleted"]}) == [7, 8]
    assert await _positions(log, 0, 1000, {**both, "until": 5, "subjects": BOTH}) == [4]
    assert await _positions(log, 0, 1000, {"since": times[9], "before": times[3]}) == []
    scanned = await log.scan(0, before=times[9])
    assert scanned.reached == 8
    assert await log.scan(8, before=times[9]) == ([], 8)


@pytest.mark.parametrize(("page", "fetched"), [(1, 1), (1, 3), (2, 3), (3, 1000), (1000, 1000)])
async def test_replay(log: EventLog, page: int, fetched: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every event once and in order, from anywhere to anywhere, in pages of any size, the same as `records` has."""
    monkeypatch.setattr("fedota.kernel.event_log._HANDFUL", fetched)
    monkeypatch.setattr("fedota.kernel.event_log._PAGE", fetched)
    events = [event_of(record) for record in await log.records(0)]
    assert await log.read(0) == events
    for after in (0, 4, 10, 11):
        for until in (None, 0, 5, 10, 99):
            end = 10 if until is None else until
            got = [events async for events in log.replay(after, until, page=page)]
            assert [event for part in got for event in part] == events[after:end]
            assert all(0 < len(part) <= page for part in got)
    assert [one.position async for part in log.replay(1, 9, page=page, subjects=BOTH) for one in part] == [2, 4, 9]
    assert [one.position async for part in log.replay(1, 9, page=page, types=["FilesDeleted"]) for one in part] == [
        4,
        7,
        8,
    ]


async def test_a_replay_that_is_left_early(log: EventLog) -> None:
    """What was being fetched is given up, and its connection is free again."""
    async with aclosing(log.replay(page=1)) as pages:
        async for events in pages:
            assert [event.position for event in events] == [1]
            break
    assert not [task for task in asyncio.all_tasks() if "_scan" in repr(task)]
    assert await log.head() == 10


async def test_replay_stays_small_with_large_events(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page is bounded in bytes: it is the log's largest events that would fill the memory."""
    log, limits = ground.logs["problems"], []
    for _ in range(6):
        await ground.record(created(name="x" * 900_000))
    fetch = log._fetch

    async def fetched(*args: Any) -> list[asyncpg.Record]:
        limits.append(args[3])
        return await fetch(*args)

    monkeypatch.setattr(log, "_fetch", fetched)
    monkeypatch.setattr("fedota.kernel.event_log._HANDFUL", 1)
    assert [len(events) async for events in log.replay()] == [1, 4, 1]
    assert limits == [1, 4, 4]


async def test_a_page_within_a_stream_is_found_by_halving(ground: Ground) -> None:
    """However long the stream, few of its rows are read to find where a reader goes on."""
    log, problem_id = ground.logs["problems"], new_id()
    await record(ground, "problems", "anna", *(requested(problem_id, str(number)) for number in range(3000)))
    query, arguments = Wanted([f"problems/{problem_id}"]).statement(COLUMNS, 2500, 3000, 10)
    async with ground.superuser() as connection:
        await connection.execute("analyze fedota.events")
        [(plan,)] = await connection.fetch(f"explain (analyze, buffers, format json) {query}", *arguments)
    read = msgspec.json.decode(plan)[0]["Plan"]
    assert read["Actual Rows"] == 10
    assert read["Shared Hit Blocks"] + read["Shared Read Blocks"] < 200
    assert [row["position"] for row in await log.records(2500, limit=2, subjects=[f"problems/{problem_id}"])] == [
        2501,
        2502,
    ]


async def test_a_search_that_finds_nothing_ends(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks through a bounded part with each statement, stops when its time is up, and goes on from there."""
    log, problem_id = ground.logs["problems"], new_id()
    await record(ground, "problems", "anna", *(requested(problem_id, str(number)) for number in range(500)))
    await record(ground, "problems", "bert", requested(problem_id))
    monkeypatch.setattr("fedota.kernel.event_log._WINDOW", 100)
    reached = 0
    for expected in (100, 200, 300, 400, 500):
        found, reached = await log.scan(reached, actor="bert", seconds=0)
        assert (found, reached) == ([], expected)
    found, reached = await log.scan(reached, actor="bert", seconds=0)
    assert [row["position"] for row in found] == [501] == [reached]
    assert await log.scan(reached, actor="bert") == ([], 501)
    assert [row["position"] for row in await log.records(0, actor="bert")] == [501]
