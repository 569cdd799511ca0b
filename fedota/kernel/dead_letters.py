"""Dead letters: events that have no effect in a projection, kept beside it until somebody sees to them.

A parked event waits, and every later one of its stream behind it, so that none takes effect out of its order. Whatever
is done about them holds the lock on the checkpoint, as each batch of the live projection does.
"""

import time
from typing import Final

import asyncpg
import structlog

from fedota.contracts.operations import DeadLetter, DeadLetters, Retried
from fedota.errors import FedotaError
from fedota.events import Event
from fedota.kernel.database import Connection, Pool
from fedota.kernel.event_log import events_of, is_outage
from fedota.kernel.log_queries import TYPED
from fedota.kernel.read_models import Projection

TABLES: Final = """
create table if not exists dead_letters (
    position bigint primary key, subject text not null, type text not null, error text not null,
    parked timestamptz not null default now()
);
do $$ begin
    if not exists (select from pg_attribute where attrelid = 'dead_letters'::regclass and attname = 'state') then
        alter table dead_letters add column state text not null default 'parked',
            add column dropped_by text not null default '';
    end if;
end $$;
create index if not exists dead_letters_parked on dead_letters (subject, position) where state = 'parked';
"""
_COUNT: Final = "select count(*) from dead_letters where state = 'parked'"
_COLUMNS: Final = "select position, subject, type, left(error, 500) as error, parked, state, dropped_by"
_LIST: Final = f"{_COLUMNS} from dead_letters order by position limit $1"
_ONE: Final = f"{_COLUMNS} from dead_letters where position = $1"
_LISTED: Final = 500  # more than anybody reads, and less than a NATS message holds
_LOCK: Final = "select pg_try_advisory_xact_lock_shared(hashtext(current_schema()), 2) from checkpoint for update"
_EVENT: Final = f"select {TYPED} from fedota.events where position = $1"  # noqa: S608 - constants
_PARKED: Final = "from dead_letters where subject = $1 and state = 'parked'"
_DROP: Final = "update dead_letters set state = 'dropped', dropped_by = $2 where position = $1 and state = 'parked'"
_SECONDS: Final = 20.0  # that a retry goes on for; who asked does not wait much longer
_log = structlog.get_logger(__name__)


async def count_parked(pool: Pool) -> int:
    """How many wait for somebody."""
    count: int = await pool.fetchval(_COUNT)
    return count


async def park(connection: Connection, event: Event, error: str) -> None:
    """Keep an event that has no effect, in the transaction that goes past it."""
    await connection.execute(
        "insert into dead_letters (position, subject, type, error) values ($1, $2, $3, $4)",
        event.position,
        event.subject,
        event.type,
        _storable(error),
    )


async def list_all(pool: Pool) -> DeadLetters:
    """The oldest of them."""
    return DeadLetters(dead_letters=[_letter(row) for row in await pool.fetch(_LIST, _LISTED)])


async def drop(pool: Pool, position: int, actor: str) -> DeadLetter:
    """Give one up: it never has an effect. Those behind it stay parked until they are retried.

    To drop it again changes nothing. Raises `not_found`.
    """
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("select from checkpoint for update")
        await connection.execute(_DROP, position, actor)
        row = await connection.fetchrow(_ONE, position)
    if row is None:
        raise FedotaError("not_found", f"The event at position {position} is no dead letter. Look at the list of them.")
    return _letter(row)


async def retry(projection: Projection, pool: Pool, position: int) -> Retried:
    """Handle the parked events of that one's stream in order, rows and reactions, up to the first that fails again.

    Each leaves the dead letters in the transaction that writes its rows, so that however often it is asked for, and
    wherever it is interrupted, each takes effect once. What took effect already is no error: nothing is left to do.
    """
    letter = await pool.fetchrow(_ONE, position)
    if letter is None:
        if position > await pool.fetchval("select position from checkpoint"):
            raise FedotaError("not_found", f"The event at position {position} was not projected yet.")
        return Retried(handled=0, left=0)
    if letter["state"] == "dropped":
        raise FedotaError("conflict", f"The event was dropped by {letter['dropped_by']}: it never takes effect.")
    handled, error, end = 0, "", time.monotonic() + _SECONDS
    while not error:
        found, error = await _retry_first(projection, pool, letter["subject"])
        if not found:
            break
        handled += not error
        if not error and time.monotonic() > end:
            error = "There are too many to handle at once. Retry, and it goes on from here."
    left = await pool.fetchval(f"select count(*) {_PARKED}", letter["subject"])
    return Retried(handled=handled, left=left, error=error if left else "")


async def _retry_first(projection: Projection, pool: Pool, subject: str) -> tuple[bool, str]:
    """Handle the first parked event of a stream: whether there was one, and what is still wrong with it.

    The event is read on the connection that holds the lock: those that wait for it may have all the others.
    """
    async with pool.acquire() as connection, connection.transaction():
        if not await connection.fetchval(_LOCK):
            raise FedotaError("conflict", "The read model is being rebuilt or verified. Retry when that has finished.")
        position = await connection.fetchval(f"select min(position) {_PARKED}", subject)
        if position is None:
            return False, ""
        try:
            async with connection.transaction():
                [event] = events_of(await connection.fetch(_EVENT, position))
                await projection.write_rows(connection, [event])
                await projection.react(event)
        except Exception as failed:
            if is_outage(failed):
                raise
            error = f"{type(failed).__name__}: {failed}"
            _log.warning("dead letter fails again", position=position, subject=subject, exc_info=failed)
            await connection.execute(
                "update dead_letters set error = $2 where position = $1", position, _storable(error)
            )
            return True, error
        await connection.execute("delete from dead_letters where position = $1", position)
        return True, ""


def _letter(row: asyncpg.Record) -> DeadLetter:
    return DeadLetter(**dict(row.items()))


def _storable(error: str) -> str:
    """An error may quote what no text column takes: its event could not be parked then."""
    return error.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")
