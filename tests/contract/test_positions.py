"""Positions have no gaps and become visible in order, whoever writes at the same time."""

import asyncio
import sys
from asyncio.subprocess import PIPE, create_subprocess_exec
from collections.abc import Awaitable, Callable
from uuid import UUID

import asyncpg

from tests.contract.ground import ROOT, Ground

PROCESSES, WRITERS, APPENDS = 4, 4, 40
Read = Callable[[int], Awaitable[list[asyncpg.Record]]]


async def write(url: str, kind: str) -> set[UUID]:
    """Let 16 writers in 4 processes append as fast as they can; the ids of what they wrote."""

    async def process() -> list[str]:
        child = await create_subprocess_exec(
            *(sys.executable, "-m", "tests.contract.writer", kind, str(WRITERS), str(APPENDS)),
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
    writing = asyncio.create_task(write(ground.role_url("problems").reveal(), "log"))
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
    """The test above can fail: this is the table that it would fail on."""
    async with ground.superuser() as connection:
        await connection.execute("create table plain (position bigserial primary key, id uuid not null)")
        writing = asyncio.create_task(write(ground.database_url, "plain"))
        seen = await follow(
            lambda after: connection.fetch("select * from plain where position > $1 order by position limit 50", after),
            writing,
        )
        written = writing.result()
        assert await connection.fetchval("select count(*) from plain") == len(written)
    assert len(seen) == len({position for position, _ in seen})
    assert {id_ for _, id_ in seen} < written, "a reader of a serial column was lucky: the proof above proves nothing"
