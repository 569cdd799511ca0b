"""The statements that read the log, each with an index behind it.

Positions rise without gaps, and so do the versions and the positions of one stream together: where a reader goes on in
a stream is found by halving, whatever its length. Times rise with positions too, as far as the server's clock was never
set back: where it was, the border of a time lies somewhere within the overlap.
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import asyncpg

COLUMNS: Final = "position, id, type, schema, subject, version, time, actor, correlation, causation, traceparent, data"
# What `Event`s are made of: a number of seconds is exact to the microsecond until 2242, and asyncpg makes a datetime of
# a timestamp so slowly that it would be a sixth of a replay.
TYPED: Final = COLUMNS.replace("time", "date_part('epoch', time)")
STREAM: Final = f"select {TYPED} from fedota.events where subject = $1 order by version"  # noqa: S608 - constants
NEWEST: Final = f"""
select {TYPED} from fedota.events where subject = $1 and version < $2 order by version desc limit $3
"""  # noqa: S608 - constants
# From position $1 on, with the hash that stands for the whole log up to there.
TAIL: Final = f"""
select {COLUMNS}, hash from fedota.events where position >= $1 order by position limit $2
"""  # noqa: S608 - constants
# The last position before a time, of those up to $2: a time has no index, but the log is in its order.
LAST_BEFORE: Final = """
with recursive place (low, high) as (
    select 0::bigint, $2::bigint + 1
    union all
    select case when e.time < $1 then e.position else low end, case when e.time < $1 then high else e.position end
    from place join fedota.events e on e.position = (low + high) / 2 where high - low > 1
) select max(low) from place
"""
_WHOLE: Final = "select {columns} from fedota.events e where position > $1 and position <= $2{more}"
# One index range for each stream, begun behind the version that position $1 is or would be.
_STREAMS: Final = """
select {columns} from (select distinct unnest($4::text[]) as name) s
cross join lateral (
    with recursive place (low, high) as (
        select 0, coalesce(max(version), 0) + 1 from fedota.events where subject = s.name
        union all
        select case when e.position <= $1 then e.version else low end,
            case when e.position <= $1 then high else e.version end
        from place join fedota.events e on e.subject = s.name and e.version = (low + high) / 2 where high - low > 1
    ) select max(low) as last from place
) seen
cross join lateral (
    select e.* from fedota.events e
    where e.subject = s.name and e.version > seen.last and e.position <= $2{more} order by e.version limit $3
) e
"""


class Scanned(NamedTuple):
    """What was found, and the position up to which all was looked at: who wants more goes on from there."""

    records: list[asyncpg.Record]
    reached: int


class Wanted(NamedTuple):
    """Which events a reader asks for; None stands for all."""

    subjects: Sequence[str] | None = None
    types: Sequence[str] | None = None
    actor: str | None = None

    @property
    def sifts(self) -> bool:
        """Whether rows are read that are not asked for: neither types nor actors have an index."""
        return self.types is not None or self.actor is not None

    def statement(self, columns: str, after: int, until: int, limit: int) -> tuple[str, list[Any]]:
        """SQL and its arguments for these columns of those past `after`, up to `until`, in order."""
        arguments: list[Any] = [after, until, limit]
        template, more = _WHOLE, ""
        if self.subjects is not None:
            template = _STREAMS
            arguments.append(self.subjects)
        if self.types is not None:
            arguments.append(self.types)
            more += f" and e.type = any(${len(arguments)})"
        if self.actor is not None:
            arguments.append(self.actor)
            more += f" and e.actor = ${len(arguments)}"
        return template.format(columns=columns, more=more) + " order by e.position limit $3", arguments
