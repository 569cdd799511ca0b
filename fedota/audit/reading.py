"""The log as PostgreSQL stores it, read for an audit: in pages, the next one while one is worked on."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from datetime import UTC, datetime
from typing import Final, NamedTuple

import asyncpg

from fedota.audit.chain import Record
from fedota.kernel.database import Pool

_READ: Final = """
select position, id::text, type, schema, subject, version,
    to_char(time at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'),
    actor, correlation::text, causation::text, traceparent, data, hash
from fedota.events where position > $1 and position <= $2 order by position limit 1000
"""
_HEAD: Final = "select position, hash, (select coalesce(max(position), 0) from fedota.events) as last from fedota.head"
_VERSIONS: Final = """
select subject, version, position from (
    select subject, version, position, row_number() over stream as expected, lag(position) over stream as earlier
    from fedota.events where position <= $1
    window stream as (partition by subject order by version)
) as numbered
where version <> expected or position <= earlier order by position limit 1
"""


class Head(NamedTuple):
    """What the log says of its end: the head row's position and hash, and the position of the last event."""

    position: int
    hash: bytes
    last: int


class Gap(NamedTuple):
    """The first event of a stream whose version does not follow."""

    subject: str
    version: int
    position: int


class StoredLog:
    """The log, for who may only read it."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def head(self) -> Head:
        """Its end, in one snapshot. A head row that is not there is at position 0."""
        row = await self._pool.fetchrow(_HEAD)
        if row is None:
            last: int = await self._pool.fetchval("select coalesce(max(position), 0) from fedota.events")
            return Head(0, b"", last)
        return Head(row["position"], row["hash"], row["last"])

    async def pages(self, after: int, until: int) -> AsyncGenerator[list[Record], None]:
        """The events past `after` up to and including `until`, in order."""
        coming = asyncio.create_task(self._page(after, until))
        try:
            while page := await coming:
                coming = asyncio.create_task(self._page(page[-1][0], until))
                yield [Record._make(row) for row in page]
        finally:
            coming.cancel()
            with suppress(asyncio.CancelledError, Exception):  # nobody is there any more who wants to know
                await coming

    async def record(self, position: int) -> Record | None:
        """The event at a position, if there is one."""
        async with aclosing(self.pages(position - 1, position)) as pages:
            async for page in pages:
                return page[0]
        return None

    async def gap(self, until: int) -> Gap | None:
        """Where the versions of a stream do not count 1, 2, 3, … in the order of the log."""
        row = await self._pool.fetchrow(_VERSIONS, until, timeout=3600)
        return Gap(row["subject"], row["version"], row["position"]) if row else None

    async def _page(self, after: int, until: int) -> list[asyncpg.Record]:
        return await self._pool.fetch(_READ, after, until)


def utc_text(time: datetime) -> str:
    """A time as it is hashed and signed."""
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
