"""What a log of five million events costs, beside an empty one in the same run: `python -m benchmarks --large`.

The large log is filled with COPY: a valid chain, streams of fifty events, a request for each. Its stream and its
read model begin at the newest event: that many events through JetStream take longer than all the rest, and what is
measured is how the tail behaves with so much behind it.
"""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, Final
from uuid import uuid4

import asyncpg
import msgspec

from benchmarks.appends import Writers, rate
from benchmarks.figures import Figure, Figures, percentile
from benchmarks.world import CONTEXT, Database, World, an_append, an_event, anything, database, forget_stream
from fedota.contracts import subjects
from fedota.events import to_json, uuid7
from fedota.events.rounds import RoundUpdated
from fedota.kernel.files import write_private
from fedota.kernel.migrations import OWNER
from fedota.kernel.relay import Message, ensure_stream, publish_few

_EVENTS: Final = 5_000_000
_STREAM: Final = 50  # events of one
_COPIED: Final = 100_000  # at once
_WRITERS: Final = 32
_SLICES: Final = 11  # of a second, in turns with the empty log; the first warms up
_RATE: Final = 100  # events/s, while the tail is followed
_FOLLOWED: Final = 8.0  # seconds, twice
_PATIENCE: Final = 60.0  # seconds
_AGAINST: Final = "the same on an empty log"
_COLUMNS: Final = (
    *("position", "id", "type", "schema", "subject", "version", "time", "actor", "correlation"),
    *("causation", "traceparent", "data", "hash"),
)
Row = tuple[Any, ...]


async def measure(world: World) -> Figures:
    """`large.append.*`, `large.tail.*` and `large.memory.*`."""
    async with database(world) as empty, database(world) as large:
        for made in (empty, large):
            await _make_read_model(made)
        await fill(large, _EVENTS)
        figures = await _appends(empty, large)
        return figures | await _tails(empty, large)


async def fill(made: Database, count: int) -> None:
    """Give a fresh log so many events, as their owner."""
    connection = await asyncpg.connect(made.admin_url, command_timeout=1200)
    try:
        await connection.execute(f"set role {OWNER}")
        rows, hash_, begun = _rows(), b"", time.perf_counter()
        for done in range(0, count, _COPIED):
            page = list(islice(rows, min(_COPIED, count - done)))
            await connection.copy_records_to_table("events", schema_name="fedota", records=page, columns=_COLUMNS)
            hash_ = page[-1][-1]
        await connection.execute(
            "insert into fedota.requests select id::text, '', position, version from fedota.events order by position"
        )
        await connection.execute("update fedota.head set position = $1, hash = $2", count, hash_)
        for statement in ("reset role", "vacuum analyze fedota.events", "vacuum analyze fedota.requests", "checkpoint"):
            await connection.execute(statement)
        size = await connection.fetchval("select pg_size_pretty(pg_database_size(current_database()))")
        print(f"a log of {count:,} events, {size}, in {time.perf_counter() - begun:.0f} s", flush=True)
    finally:
        await connection.close()


def _rows() -> Iterator[Row]:
    """Events of half a kilobyte, each with the hash that the append function would have given it."""
    position, hash_, now = 0, bytes(32), datetime.now(UTC)
    stamp, tail = f"{now:%Y-%m-%dT%H:%M:%S.%fZ}", f"{CONTEXT.actor}\n{CONTEXT.correlation}\n\n\n"
    while True:
        problem_id = str(uuid4())
        subject, data = f"rounds/{problem_id}", to_json(_event(problem_id))
        for version in range(1, _STREAM + 1):
            position, id_ = position + 1, uuid7()
            head = f"{position}\n{id_}\nRoundUpdated\n1\n{subject}\n{version}\n{stamp}\n{tail}"
            hash_ = hashlib.sha256(hash_ + head.encode() + data).digest()
            yield (
                *(position, id_, "RoundUpdated", 1, subject, version, now, CONTEXT.actor, CONTEXT.correlation),
                *(None, None, data, hash_),
            )


def _event(problem_id: str) -> RoundUpdated:
    """Of half a kilobyte: five million of the usual ones would fill the disk."""
    return msgspec.structs.replace(an_event(problem_id), refusals=[], reason="")


async def _appends(empty: Database, large: Database) -> Figures:
    """Slices on both logs take turns."""
    rates: list[tuple[float, float]] = []
    waits: list[tuple[float, float, float, float]] = []
    async with (
        Writers.started(empty, _WRITERS, 1, connections=0) as on_empty,
        Writers.started(large, _WRITERS, 1, connections=0) as on_large,
    ):
        for _ in range(_SLICES):
            [beside], [found] = await on_empty.write("full", 1.0), await on_large.write("full", 1.0)
            rates.append((rate([found]), rate([beside])))
            waits.append((found.p50_ms, beside.p50_ms, found.p99_ms, beside.p99_ms))
    events, anchor = (median(column) for column in zip(*rates[1:], strict=True))
    p50, p50_anchor, p99, p99_anchor = (median(column) for column in zip(*waits[1:], strict=True))
    return {
        f"large.append.{_WRITERS}": Figure(events, "events/s", anchor, _AGAINST),
        f"large.append.{_WRITERS}.p50_ms": Figure(p50, "ms", p50_anchor, _AGAINST),
        f"large.append.{_WRITERS}.p99_ms": Figure(p99, "ms", p99_anchor, _AGAINST),
    }


async def _tails(empty: Database, large: Database) -> Figures:
    """Each log in turn, twice: there is one stream."""
    seconds: dict[str, list[float]] = {"empty": [], "large": []}
    memory: dict[str, list[tuple[float, float]]] = {"empty": [], "large": []}
    for name, made in 2 * (("empty", empty), ("large", large)):
        await _begin_at_head(made)
        async with (
            made.process("relay", "fedota.kernel.relay") as relay,
            made.process("gateway", "gateway", _told(made)) as gateway,
        ):
            seconds[name] += await _follow(made)
            memory[name].append((_peak(relay.pid), _peak(gateway.pid)))
    figures = {
        f"large.tail.append_to_read_model.p{percent}_ms": Figure(
            1000 * percentile(seconds["large"], percent), "ms", 1000 * percentile(seconds["empty"], percent), _AGAINST
        )
        for percent in (50, 99)
    }
    for number, process in enumerate(("relay", "gateway")):
        peak, beside = (max(pair[number] for pair in memory[name]) for name in ("large", "empty"))
        figures[f"large.memory.{process}_peak_mb"] = Figure(peak, "MB", beside, _AGAINST)
    return figures


async def _make_read_model(made: Database) -> None:
    """The gateway's tables, as a start of it on an empty log makes them."""
    async with (
        made.process("relay", "fedota.kernel.relay"),
        made.process("gateway", "gateway", _told(made)),
    ):
        pass


def _told(made: Database) -> dict[str, str]:
    tokens = made.world.directory / "tokens.json"
    if not tokens.exists():
        write_private(tokens, msgspec.json.encode([{"role": "operator", "sha256": "0" * 64}]))
    return {"tokens_file": str(tokens)}


async def _begin_at_head(made: Database) -> None:
    """Let stream and read model stand for the whole log, the stream with its newest event alone."""
    await forget_stream(made.world)
    async with made.log("relay") as log, made.bus("relay") as bus:
        head = await log.head()
        inlet = await ensure_stream(bus.client.jetstream())
        async with anything(made.world) as client:
            js = client.jetstream()
            config = (await js.stream_info(subjects.STREAM)).config
            await js.delete_stream(subjects.STREAM)
            await js.add_stream(config.evolve(first_seq=head))
        [newest] = await log.records(head - 1, limit=1)
        await publish_few(bus, inlet, [Message.of(newest)], head - 1, asyncio.Lock())
    async with _connected(made) as connection:
        await connection.execute("update gateway.checkpoint set position = $1, event = $2", head, newest["id"])


async def _follow(made: Database) -> list[float]:
    """Seconds from the call of append until the gateway's read model stood for the event, at a steady rate."""
    begun: dict[int, float] = {}
    async with made.log("rounds") as log, _connected(made) as connection, asyncio.timeout(_PATIENCE):
        first = await log.head()

        async def append(problem_id: str) -> None:
            start = time.perf_counter()
            begun[(await log.append(an_append(problem_id))).position] = start

        async def arrivals() -> None:
            start = time.perf_counter()
            problems = [str(uuid4()) for _ in range(16)]
            async with asyncio.TaskGroup() as group:
                for number in range(int(_RATE * _FOLLOWED)):
                    await asyncio.sleep(max(0.0, start + number / _RATE - time.perf_counter()))
                    group.create_task(append(problems[number % len(problems)]))

        _, seen = await asyncio.gather(arrivals(), _watch(connection, first, int(_RATE * _FOLLOWED)))
    return [seen[position] - start for position, start in begun.items()]


async def _watch(connection: "asyncpg.Connection[asyncpg.Record]", first: int, count: int) -> dict[int, float]:
    """When the read model first stood for each of so many positions past `first`, by looks a millisecond apart."""
    seen: dict[int, float] = {}
    while len(seen) < count:
        position = await connection.fetchval("select position from gateway.checkpoint")
        now = time.perf_counter()
        seen.update((reached, now) for reached in range(first + len(seen) + 1, position + 1))
        await asyncio.sleep(0.001)
    return seen


@asynccontextmanager
async def _connected(made: Database) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    connection = await asyncpg.connect(made.admin_url)
    try:
        yield connection
    finally:
        await connection.close()


def _peak(pid: int) -> float:
    """The most memory that a process has had, in megabytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) / 1024
