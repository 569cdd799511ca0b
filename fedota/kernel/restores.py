"""A log that was restored from an older copy: who has projected what is lost in it notices, and begins anew."""

from typing import Final

import structlog

from fedota.kernel.database import Pool
from fedota.kernel.read_models import Projection

_STANDS: Final = """
select c.position, current_schema() as process, h.position as head,
    c.position <= h.position and (c.event is null or c.event = e.id) as same
from checkpoint c cross join fedota.head h left join fedota.events e on e.position = c.position
"""
_log = structlog.get_logger(__name__)


class RestoredLogError(Exception):
    """The log has another past than the one that was projected: going on would skip events, and say nothing."""


async def require_same_log(pool: Pool) -> None:
    """Raise `RestoredLogError` when the read model stands for an event that the log does not have."""
    row = await pool.fetchrow(_STANDS)
    if row is not None and not row["same"]:
        raise RestoredLogError(
            f"The read model stands for position {row['position']} of another log than this one, which is at "
            f"{row['head']}: the log was restored from an older copy. If what is missing is lost, run `fedota "
            f"projections rebuild {row['process']}`: it begins anew, from the log's first event."
        )


async def begin_anew(projection: Projection, pool: Pool) -> None:
    """Forget what another log said: empty tables, no dead letters, position 0.

    The live projection goes on from there, with its reactions: which of them that other log had led to cannot be known
    any more, and being keyed by their events none that took effect does so again.
    """
    async with pool.acquire() as connection, connection.transaction():
        position = await connection.fetchval("select position from checkpoint for update")
        if projection.names:
            await connection.execute(f"drop table if exists {', '.join(projection.names)}")
        if projection.tables:  # asyncpg fails at an empty statement
            await connection.execute(projection.tables)
        await connection.execute("delete from dead_letters")
        await connection.execute("update checkpoint set position = 0, event = null")
    _log.warning("the read model begins anew, for the log is another", stood_for=position)
