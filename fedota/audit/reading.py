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
    to_char(time at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')
        || case when extract(year from time at time zone 'utc') < 1 then ' BC' else '' end,
    actor, correlation::text, causation::text, traceparent, data, hash
from fedota.events where position >= $1 and position <= $2 order by position fetch first 1000 rows with ties
"""  # with ties: a second row at the last position of a page would be in none
_ENDS: Final = """
select h.position, h.hash, e.first, e.last
from (select coalesce(min(position), 1) as first, coalesce(max(position), 0) as last from fedota.events) e
left join fedota.head h on true
"""
_COUNT: Final = "select count(*) from fedota.events where position <= $1 or position is null"
_GUARDS: Final = """
select c.relname || ' is not a table' from tables c where c.relkind <> 'r'
union all
select c.relname || ' shows some people some rows only (row security)' from tables c
where c.relrowsecurity or c.relforcerowsecurity
union all
select c.relname || ' has the rule ' || r.rulename from tables c join pg_rewrite r on r.ev_class = c.oid
union all
select c.relname || ' has rows of another table, ' || i.inhrelid::regclass
from tables c join pg_inherits i on i.inhparent = c.oid
union all
select c.relname || ' has the trigger ' || t.tgname || ', which is not ours'
from tables c join pg_trigger t on t.tgrelid = c.oid
where not t.tgisinternal and (t.tgname <> 'append_only' or c.relname = 'head')
union all
select wanted || ' is not guarded by the trigger append_only' from unnest(array['events', 'requests']) wanted
where not exists (
    select from tables c join pg_trigger t on t.tgrelid = c.oid
    where c.relname = wanted and t.tgname = 'append_only' and t.tgenabled = 'A'
        and t.tgtype = 58 and t.tgqual is null and t.tgfoid::regproc::text = 'fedota.refuse_change'
)
"""  # 58: before update, delete or truncate, once a statement
_TABLES: Final = """
with tables as (
    select c.* from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where n.nspname = 'fedota' and c.relname in ('events', 'head', 'requests')
)
"""
BEFORE_ALL: Final = -(2**63) - 1  # no position is as low: what is below 1 should not be there, and must be seen
_VERSIONS: Final = """
select subject, version, position from (
    select subject, version, position, row_number() over stream as expected, lag(position) over stream as earlier
    from fedota.events where position <= $1
    window stream as (partition by subject order by version)
) as numbered
where version <> expected or position <= earlier order by position limit 1
"""


class Head(NamedTuple):
    """What the log says of its end: the head row's position and hash; the positions of the first and the last event."""

    position: int
    hash: bytes
    last: int
    first: int = 1


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
        row = await self._pool.fetchrow(_ENDS)
        assert row is not None  # an aggregate is always there
        return Head(row["position"] or 0, row["hash"] or b"", row["last"], row["first"])

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

    async def count(self, until: int) -> int:
        """How many rows there are up to `until`, those without any position too."""
        count: int = await self._pool.fetchval(_COUNT, until, timeout=3600)
        return count

    async def unguarded(self) -> list[str]:
        """What is not as migrations made it, such that others may see another log than this one, or change it."""
        return [row[0] for row in await self._pool.fetch(_TABLES + _GUARDS)]

    async def gap(self, until: int) -> Gap | None:
        """Where the versions of a stream do not count 1, 2, 3, … in the order of the log."""
        row = await self._pool.fetchrow(_VERSIONS, until, timeout=3600)
        return Gap(row["subject"], row["version"], row["position"]) if row else None

    async def _page(self, after: int, until: int) -> list[asyncpg.Record]:
        return await self._pool.fetch(_READ, after + 1, until)


def utc_text(time: datetime) -> str:
    """A time as it is hashed and signed."""
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
