"""A process that writes: `python -m benchmarks.writers`, told on standard input, one JSON object a line.

First `Opening`, answered by an empty line once it is ready, then one `Slice` after the other, answered by a `Written`
each. All sides are open all the time, so that slices of them can alternate. It ends when its input does.
"""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final, Literal
from uuid import uuid4

import asyncpg
import msgspec
import uvloop

from benchmarks.figures import percentile
from benchmarks.world import an_append, an_event
from fedota.events import to_json, uuid7
from fedota.kernel.database import Pool, connect_pool
from fedota.kernel.event_log import EventLog
from fedota.kernel.settings import Secret

Side = Literal["full", "plain_insert", "advisory_lock"]
PLAIN_TABLE: Final = """
create schema plain;
create table plain.events (
    position bigserial primary key, id uuid not null unique, type text not null, schema int not null,
    subject text not null, version int not null, time timestamptz not null default clock_timestamp(),
    actor text not null, correlation uuid not null, causation uuid, traceparent text, data bytea not null,
    hash bytea not null, unique (subject, version)
);
"""
_INSERT: Final = (
    "insert into plain.events (id, type, schema, subject, version, actor, correlation, data, hash)"
    " values ($1, 'RoundUpdated', 1, $2, $3, 'benchmark', $4, $5, $6)"
)
Write = Callable[[], Awaitable[object]]


class Opening(msgspec.Struct, frozen=True, kw_only=True):
    """Who writes where. `connections` are the plain side's, which has none when there is no plain table."""

    log_url: str
    plain_url: str
    writers: int
    connections: int


class Slice(msgspec.Struct, frozen=True, kw_only=True):
    """Write on one side for so long, each writer waiting for its own before the next."""

    side: Side
    seconds: float


class Written(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a slice: events, the seconds that it took, and how long a writer waited."""

    count: int
    seconds: float
    p50_ms: float
    p99_ms: float


async def _serve() -> None:
    lines = _lines()
    opening = msgspec.json.decode(await anext(lines), type=Opening)
    async with AsyncExitStack() as stack:
        sides = {"full": await stack.enter_async_context(_full(opening))}
        if opening.connections:
            pool = await stack.enter_async_context(_plain_pool(opening))
            sides["plain_insert"] = [_plain(pool, _plain_insert) for _ in range(opening.writers)]
            sides["advisory_lock"] = [_plain(pool, _locked_insert) for _ in range(opening.writers)]
        _say(b"")
        async for line in lines:
            slice_ = msgspec.json.decode(line, type=Slice)
            _say(msgspec.json.encode(await _written(sides[slice_.side], slice_.seconds)))


async def _lines() -> AsyncIterator[bytes]:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        yield line


def _say(line: bytes) -> None:
    sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()


@asynccontextmanager
async def _full(opening: Opening) -> AsyncIterator[list[Write]]:
    """The log, as a service has it: one appender for all writers of the process."""
    async with connect_pool(Secret(opening.log_url), "rounds", size=4) as pool, EventLog.open(pool) as log:

        def writer() -> Write:
            problem_id = str(uuid4())
            return lambda: log.append(an_append(problem_id))

        yield [writer() for _ in range(opening.writers)]


def _plain_pool(opening: Opening) -> Pool:
    """A connection for each writer while there are few; it is not reset between uses, which would be a round trip."""
    size = opening.connections
    return asyncpg.create_pool(opening.plain_url, min_size=size, max_size=size, reset=_as_it_is)


async def _as_it_is(_: object) -> None:
    pass


def _plain(pool: Pool, insert: Callable[[Pool, tuple[Any, ...]], Awaitable[object]]) -> Write:
    rows = _rows()
    return lambda: insert(pool, next(rows))


def _rows() -> Iterator[tuple[Any, ...]]:
    problem_id, version = str(uuid4()), 0
    while True:
        version += 1
        data = to_json(an_event(problem_id, version))
        yield uuid7(), f"rounds/{problem_id}", version, uuid7(), data, bytes(32)


async def _plain_insert(pool: Pool, row: tuple[Any, ...]) -> object:
    return await pool.execute(_INSERT, *row)


async def _locked_insert(pool: Pool, row: tuple[Any, ...]) -> object:
    """What makes the positions of a plain table come in order: one lock, held until the commit."""
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("select pg_advisory_xact_lock(1)")
        return await connection.execute(_INSERT, *row)


async def _written(writers: list[Write], seconds: float) -> Written:
    waited: list[float] = []
    begun = time.perf_counter()
    end = begun + seconds

    async def work(write: Write) -> None:
        while (start := time.perf_counter()) < end:
            await write()
            waited.append(time.perf_counter() - start)

    await asyncio.gather(*map(work, writers))
    took = time.perf_counter() - begun
    return Written(
        count=len(waited),
        seconds=took,
        p50_ms=1000 * percentile(waited, 50),
        p99_ms=1000 * percentile(waited, 99),
    )


if __name__ == "__main__":
    uvloop.run(_serve())
