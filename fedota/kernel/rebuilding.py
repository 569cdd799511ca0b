"""Read models beside the live one, filled from the log: as of a position, to verify the live one, to replace it.

No reaction runs, and what the live one has parked or dropped is left out here too. The live one goes on meanwhile:
nothing holds a snapshot or a lock for long, and between two batches everything else in the process has its turn.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, Final

import asyncpg
import structlog

from fedota.contracts.operations import Difference
from fedota.errors import FedotaError
from fedota.events import Event
from fedota.kernel.database import Connection, Pool
from fedota.kernel.event_log import EventLog, is_outage
from fedota.kernel.read_models import Projection
from fedota.kernel.restores import RestoredLogError, begin_anew, require_same_log
from fedota.kernel.tables import columns_of

Told = Callable[[int, int], None]  # how many events of how many are done
_TEMPORARY: Final = "pg_temp"
_LEFT_OUT: Final = "select position from dead_letters where position <= $1 and subject = any($2)"
_LIVE: Final = """
select position, array(select d.position from {schema}.dead_letters d where d.position > $1) as left_out
from {schema}.checkpoint
"""
# Who retries a dead letter holds the same lock shared: what is left out must not take effect meanwhile.
_WORK_ALONE: Final = "select pg_try_advisory_lock(hashtext(current_schema()), 2)"
_TABLES_OF: Final = """
select string_agg(format('drop table %s', oid::regclass), '; ') from pg_class
where relkind = 'r' and relnamespace = coalesce(to_regnamespace($1), pg_my_temp_schema())
"""
_BATCH: Final = 2000  # events in one transaction
_CLOSE: Final = 1000  # events that are done while the live one waits
_SWAPS: Final = 20  # tries to replace tables that somebody is reading
# That everybody waits for who is reading, at most. It is less than PostgreSQL's deadlock_timeout, so that it is always
# this one that gives way, and no reader is ended.
_LOCK_SECONDS: Final = 0.5
_PAUSES: Final = (0.1, 2.0)  # seconds between two tries, the first and the longest
_LONG: Final = 3600.0  # seconds for statements that read all of a table
_EXAMPLES: Final = 3
_EXAMPLE: Final = 500  # characters
_COMPARE: Final = """
with live as (select t::text as row from {live} t), rebuilt as (select t::text as row from {rebuilt} t),
different as materialized (
    select 'live' as side, row from (select row from live except all select row from rebuilt) l
    union all select 'rebuilt', row from (select row from rebuilt except all select row from live) r
)
select side, count(*) as rows,
    array(select left(row, $1) from different d where d.side = different.side order by row limit $2) as examples
from different group by side order by side
"""
_log = structlog.get_logger(__name__)


def _nobody(_: int, __: int) -> None:
    """Nobody is told."""


@asynccontextmanager
async def as_of(
    projection: Projection, pool: Pool, log: EventLog, position: int, subjects: Sequence[str]
) -> AsyncIterator[Connection]:
    """A connection on which plain table names are the projection's tables as they were at `position`.

    They hold what events of the streams `subjects` make of them, and nothing of it is left afterwards. The log is read
    on another connection: at most half of a pool may be in here, or all would wait for each other.
    """
    async with pool.acquire() as connection, _rolled_back(connection):
        left_out = {row["position"] for row in await connection.fetch(_LEFT_OUT, position, subjects)}
        await connection.execute(f"set local search_path = {_TEMPORARY}")
        await connection.execute(projection.tables)
        async with aclosing(log.replay(0, position, subjects=subjects, types=projection.types)) as pages:
            async for events in pages:
                await projection.write_rows(connection, [one for one in events if one.position not in left_out])
        yield connection


async def verify(
    projection: Projection, pool: Pool, log: EventLog, told: Told = _nobody
) -> tuple[int, list[Difference]]:
    """Compare the live tables with what the log makes of them, as they stand at one and the same position.

    Gives the number of rows compared and, for each table, the rows that only one of the two has. A difference shows a
    row that something else than the projection wrote, or a handler that has changed since: a rebuild makes it good.
    """
    if not projection.names:
        return 0, []
    async with _working(pool) as connection, _Copy.open(_TEMPORARY, projection, connection, log, told) as copy:
        await copy.follow()
        # what is read from here on is of one moment: no batch comes between checkpoint and tables
        async with connection.transaction(isolation="repeatable_read"):
            await copy.catch_up()
            compared = [await copy.compare(name) for name in projection.names]
            return await copy.count(_TEMPORARY), [found for found in compared if found]


async def rebuild(projection: Projection, pool: Pool, log: EventLog, told: Told = _nobody) -> int:
    """Fill tables beside the live ones and put them in their place; the number of their rows.

    Readers find the old tables or the new ones, complete, at every moment. When it fails, or its process is killed, the
    live ones stay as they are; when it is cancelled too late for that, it succeeds. Where they stand for what the log
    does not have, they begin anew instead, and fill up while they are read.
    """
    try:
        await require_same_log(pool)
    except RestoredLogError:
        await begin_anew(projection, pool)
        return 0
    if not projection.names:
        return 0
    rows: int | None = None
    try:
        async with _working(pool) as connection:
            schema = await connection.fetchval("select current_schema()")
            async with _Copy.open(f"{schema}_next", projection, connection, log, told) as copy:
                await copy.follow()
                await copy.analyze()
                rows = await copy.take_over()
    except (Exception, asyncio.CancelledError) as error:
        if rows is None:
            raise
        _log.warning("trouble after a rebuild that is done", exc_info=error)
    assert rows is not None
    return rows


class OutdatedTablesError(Exception):
    """The live tables are not those that this program writes: whatever it wrote would fail, event by event."""


async def make_tables(projection: Projection, connection: Connection) -> None:
    """The live tables that are missing, in a transaction; what is there stays, be it outdated."""
    if not projection.tables:  # asyncpg fails at an empty statement
        return
    try:
        async with connection.transaction():
            await connection.execute(projection.tables)
    except asyncpg.UndefinedColumnError as error:  # an index of an added column; `require_tables` says what to do
        _log.warning("the live tables are not those of this program", error=str(error))


async def require_tables(projection: Projection, pool: Pool) -> None:
    """Raise `OutdatedTablesError` where the live tables have other columns than the projection's SQL makes now."""
    if not projection.tables:
        return
    async with pool.acquire() as connection:
        process = await connection.fetchval("select current_schema()")
        live = await columns_of(connection, projection.names)
        async with _rolled_back(connection):
            await connection.execute(f"set local search_path = {_TEMPORARY}")
            await connection.execute(projection.tables)
            made = await columns_of(connection, projection.names)
    if outdated := [name for name in projection.names if live[name] != made[name]]:
        raise OutdatedTablesError(
            f"The read model stopped: another version of this program made its tables ({', '.join(outdated)})."
            f" Run `fedota projections rebuild {process}`: nothing is lost, and it goes on from there."
        )


class _Copy:
    """The projection's tables in another schema, and up to which position they are filled."""

    def __init__(
        self, schema: str, live: str, projection: Projection, connection: Connection, log: EventLog, told: Told
    ) -> None:
        self._schema = schema
        self._live = live
        self._projection = projection
        self._connection = connection
        self._log = log
        self._told = told
        self._position = 0

    @classmethod
    @asynccontextmanager
    async def open(
        cls, schema: str, projection: Projection, connection: Connection, log: EventLog, told: Told
    ) -> AsyncIterator["_Copy"]:
        """Empty tables; afterwards `schema` is empty."""
        live = await connection.fetchval("select current_schema()")
        copy = cls(schema, live, projection, connection, log, told)
        try:
            # for this session, until it goes back to the pool
            await connection.execute(f"set search_path = {schema}; set synchronous_commit = off")
            await copy._clear()  # what one that was killed has left
            if projection.tables:  # asyncpg fails at an empty statement
                await connection.execute(projection.tables)
            yield copy
        finally:
            await copy._close()

    async def follow(self) -> None:
        """Fill the tables until the live ones are but a few events ahead."""
        while await self._fill() > _CLOSE:
            pass

    async def catch_up(self) -> None:
        """Fill the tables up to where the live ones stand in this transaction."""
        await self._fill()

    async def _fill(self) -> int:
        """Up to where the live tables stand now; how many events that was."""
        begun = self._position
        live = await self._connection.fetchrow(_LIVE.format(schema=self._live), begun)
        assert live is not None
        end, left_out = live["position"], set(live["left_out"])
        async with aclosing(_batches(self._log.replay(begun, end, types=self._projection.types))) as batches:
            async for events in batches:
                await self._write([one for one in events if one.position not in left_out])
                self._reached(events[-1].position, end)
        self._reached(end, end)
        return self._position - begun

    def _reached(self, position: int, end: int) -> None:
        self._position = position
        self._told(position, end)

    async def _write(self, events: list[Event]) -> None:
        try:
            async with self._connection.transaction():
                await self._projection.write_rows(self._connection, events)
        except Exception as error:
            if isinstance(error, FedotaError) or is_outage(error):
                raise
            if len(events) > 1:  # find the one that fails
                await self._write(events[: len(events) // 2])
                await self._write(events[len(events) // 2 :])
                return
            _log.error("event not rebuilt", position=events[0].position, exc_info=error)
            raise FedotaError(
                "internal_error",
                f"The event at position {events[0].position} ({events[0].type}) cannot be projected:"
                f" {type(error).__name__}: {error}. The live tables are unchanged.",
            ) from error

    async def analyze(self) -> None:
        """Let PostgreSQL know what is in the tables before anybody asks for it."""
        for name in self._projection.names:
            await self._connection.execute(f"analyze {name}", timeout=_LONG)

    async def count(self, schema: str) -> int:
        """How many rows the tables have that are in `schema` now."""
        queries = [f"select count(*) from {schema}.{name}" for name in self._projection.names]  # noqa: S608
        return sum([await self._connection.fetchval(query, timeout=_LONG) for query in queries])

    async def compare(self, name: str) -> Difference | None:
        """What the live table has and this one has not, and the other way round."""
        query = _COMPARE.format(live=f"{self._live}.{name}", rebuilt=f"{self._schema}.{name}")
        sides = await self._connection.fetch(query, _EXAMPLE, _EXAMPLES, timeout=_LONG)
        if not sides:
            return None
        counts = {row["side"]: row["rows"] for row in sides}
        examples = [f"{row['side']} {example}" for row in sides for example in row["examples"]]
        return Difference(table=name, live=counts.get("live", 0), rebuilt=counts.get("rebuilt", 0), examples=examples)

    async def take_over(self) -> int:
        """Take the place of the live tables as soon as their readers leave a gap; the number of their rows."""
        first, longest = _PAUSES
        for number in range(_SWAPS):
            await self.follow()
            try:
                return await _to_its_end(self._swap())
            except (asyncpg.QueryCanceledError, asyncpg.DeadlockDetectedError):
                _log.info("somebody is reading what is to be replaced", schema=self._live)
                await asyncio.sleep(min(first * 2**number, longest))  # they have their turn
        raise FedotaError("conflict", "Somebody went on reading the live tables. They are unchanged; try it again.")

    async def _swap(self) -> int:
        async with self._connection.transaction():
            return await self.replace_live()

    async def replace_live(self) -> int:
        """In one transaction: hold up the live projection, do what is left, and take the place of its tables.

        Gives the number of rows. Raises `QueryCanceledError` while somebody reads on and on: everybody else would wait
        behind us.
        """
        begun, names = self._position, self._projection.names
        try:
            await self._connection.execute(f"select from {self._live}.checkpoint for update")
            await self._fill()
            rows = await self.count(self._schema)
            # for all locks together: a lock_timeout is for each, and who holds the first lets nobody read meanwhile
            await self._connection.execute(f"set local statement_timeout = '{_LOCK_SECONDS}s'")
            await self._connection.execute(
                f"drop table if exists {', '.join(f'{self._live}.{name}' for name in names)}"
            )
            await self._connection.execute("set local statement_timeout to default")
            for name in names:
                await self._connection.execute(f"alter table {name} set schema {self._live}")
        except BaseException:
            self._position = begun  # its rows are gone with the transaction
            raise
        return rows

    async def _close(self) -> None:
        """Leave no table, or no session: one that is left in it would hide the live one from who gets it next."""
        try:
            if not self._connection.is_closed():
                await self._clear()
        except BaseException as error:
            self._connection.terminate()
            if not isinstance(error, Exception):
                raise
            _log.warning("tables could not be cleared away", schema=self._schema, exc_info=error)

    async def _clear(self) -> None:
        if drops := await self._connection.fetchval(_TABLES_OF, self._schema):
            await self._connection.execute(drops)


async def _to_its_end(work: Coroutine[Any, Any, int]) -> int:
    """What it gives, for a cancellation does not cut it short: whether it took effect is known, not guessed at."""
    working = asyncio.create_task(work)
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.wait([working])
        if working.cancelled() or working.exception():
            raise
        return working.result()


async def _batches(pages: AsyncGenerator[list[Event], None]) -> AsyncGenerator[list[Event], None]:
    """The same events in large batches, the next of them read while one is written."""
    coming = asyncio.create_task(_batch(pages))
    try:
        while events := await coming:
            coming = asyncio.create_task(_batch(pages))
            yield events
    finally:
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)
        await pages.aclose()


async def _batch(pages: AsyncIterator[list[Event]]) -> list[Event]:
    events: list[Event] = []
    async for page in pages:
        events += page
        if len(events) >= _BATCH:
            break
        await asyncio.sleep(0)
    return events


@asynccontextmanager
async def _working(pool: Pool) -> AsyncIterator[Connection]:
    """A connection that alone works on this process's read model. Raises `conflict` when another does."""
    async with pool.acquire() as connection:
        if not await connection.fetchval(_WORK_ALONE):
            raise FedotaError(
                "conflict",
                "The read model is being rebuilt or verified already, or a dead letter is retried. Ask again later.",
            )
        yield connection  # the pool unlocks it, and sets back what it was set to


@asynccontextmanager
async def _rolled_back(connection: Connection) -> AsyncIterator[None]:
    transaction = connection.transaction()
    await transaction.start()
    try:
        yield
    finally:
        if not connection.is_closed():
            await transaction.rollback()
