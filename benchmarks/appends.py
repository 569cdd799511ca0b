"""How fast the log takes events, against PostgreSQL doing less."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final
from uuid import uuid4

import asyncpg

from benchmarks.figures import Figure, Figures
from benchmarks.world import Database, World, an_append, an_event, database
from fedota.events import to_json, uuid7
from fedota.kernel.database import Pool

_WRITERS: Final = (1, 8, 32, 256)
_SECONDS: Final = 2.0  # each measurement; the first quarter of it warms up
_CONNECTIONS: Final = 32  # of the anchors, as one pool: more than this makes them slower on a few cores
_UNIT: Final = "events/s"
_PLAIN_TABLE: Final = """
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


async def measure(world: World) -> Figures:
    """`append.full.*` beside plain single-row inserts and an advisory lock for each append."""
    figures: Figures = {}
    for writers in _WRITERS:
        full, plain = await _full(world, writers), await _anchor(world, writers, _plain_insert)
        figures[f"append.full.{writers}"] = Figure(full, _UNIT, plain, "single-row inserts into the same table")
        figures[f"append.plain_insert.{writers}"] = Figure(plain, _UNIT)
        if writers == 32:
            locked = await _anchor(world, writers, _locked_insert)
            figures[f"append.advisory_lock.{writers}"] = Figure(locked, _UNIT, plain, "the same, without the lock")
    return figures


async def _full(world: World, writers: int) -> float:
    async with database(world) as made, made.log("rounds") as log:

        def writer() -> Write:
            problem_id = str(uuid4())
            return lambda: log.append(an_append(problem_id))

        return await _rate([writer() for _ in range(writers)])


async def _anchor(world: World, writers: int, insert: Callable[[Pool, tuple[Any, ...]], Awaitable[object]]) -> float:
    async with database(world) as made, await _plain_pool(made, min(writers, _CONNECTIONS)) as pool:

        def writer() -> Write:
            rows = _rows()
            return lambda: insert(pool, next(rows))

        return await _rate([writer() for _ in range(writers)])


async def _plain_pool(made: Database, size: int) -> Pool:
    connection = await asyncpg.connect(made.admin_url)
    try:
        await connection.execute(_PLAIN_TABLE)
    finally:
        await connection.close()
    return asyncpg.create_pool(made.admin_url, min_size=size, max_size=size)


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


async def _rate(writers: list[Write]) -> float:
    """Writes in a second of all writers together, each waiting for its own before the next."""
    count, end = 0, 0.0

    async def work(write: Write) -> None:
        nonlocal count
        while time.perf_counter() < end:
            await write()
            count += 1

    for seconds in (_SECONDS / 4, _SECONDS):
        count, begun = 0, time.perf_counter()
        end = begun + seconds
        await asyncio.gather(*map(work, writers))
    return count / (time.perf_counter() - begun)
