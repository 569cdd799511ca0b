"""Positions have no gaps and become visible in order, whoever writes at the same time."""

import asyncio
import sys
from asyncio.subprocess import PIPE, create_subprocess_exec
from collections.abc import Awaitable, Callable
from uuid import UUID

import asyncpg

from fedota.events import uuid7
from tests.contract.ground import ROOT, Ground

PROCESSES, WRITERS, APPENDS = 4, 4, 40
Read = Callable[[int], Awaitable[list[asyncpg.Record]]]


async def write(url: str) -> set[UUID]:
    """Let 16 writers in 4 processes append as fast as they can; the ids of what they wrote."""

    async def process() -> list[str]:
        child = await create_subprocess_exec(
            *(sys.executable, "-m", "tests.contract.writer", str(WRITERS), str(APPENDS)),
            env={"FEDOTA_DATABASE_URL": url},
            cwd=ROOT,
            stdout=PIPE,
        )
        out, _ = await child.communicate()
        assert child.returncode == 0
        return out.decode().split()

    return {UUID(line) for lines in await asyncio.gather(*(process() for _ in range(PROCESSES))) for line in lines}


async def follow(read: Read, writing: "asyncio.Task[set[UUID]]") -> list[tuple[int, UUID]]:
    """What somebody sees who polls by position, never looking back, until the writers have ended."""
    seen: list[tuple[int, UUID]] = []
    while True:
        last_look = writing.done()
        rows = await read(seen[-1][0] if seen else 0)
        seen += [(row["position"], row["id"]) for row in rows]
        if last_look and not rows:
            return seen


async def test_a_reader_by_position_sees_every_event_once(ground: Ground) -> None:
    """In order and without a gap, under 16 writers in 4 processes."""
    log = ground.logs["storage"]
    writing = asyncio.create_task(write(ground.role_url("problems").reveal()))
    seen = await follow(lambda after: log.records(after, limit=50), writing)
    written = writing.result()
    assert [position for position, _ in seen] == list(range(1, len(written) + 1))
    assert {id_ for _, id_ in seen} == written
    assert await log.head() == len(written)
    async with ground.superuser() as connection:
        streams = await connection.fetch(
            "select array_agg(version order by position) versions, count(*) from fedota.events group by subject"
        )
    assert len(streams) == PROCESSES * WRITERS
    assert all(row["versions"] == list(range(1, row["count"] + 1)) for row in streams)


async def test_the_same_reader_loses_events_of_a_plain_serial_column(ground: Ground) -> None:
    """The test above can fail: this is the table that it would fail on, once a writer is slower than another."""
    insert, ids, passed = "insert into plain (id) values ($1)", [uuid7() for _ in range(3)], asyncio.Event()
    async with ground.superuser() as reader, ground.superuser() as slow, ground.superuser() as fast:
        await reader.execute("create table plain (position bigserial primary key, id uuid not null)")

        async def writes() -> set[UUID]:
            async with slow.transaction():
                await slow.execute(insert, ids[0])
                await fast.execute(insert, ids[1])
                await passed.wait()
            await fast.execute(insert, ids[2])
            return set(ids)

        async def read(after: int) -> list[asyncpg.Record]:
            rows = await reader.fetch("select * from plain where position > $1 order by position", after)
            if rows:
                passed.set()
            return rows

        seen = await follow(read, asyncio.create_task(writes()))
        assert [row["id"] for row in await reader.fetch("select id from plain order by position")] == ids
    assert [id_ for _, id_ in seen] == ids[1:]
