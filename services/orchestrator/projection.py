"""The orchestrator's read model: one row a problem, the state that `domain.evolve` makes of the log."""

from typing import Any, Final

import msgspec

from fedota.events import Event, EventData, to_json
from fedota.events.orchestrator import InfraDegraded, InfraFailed, InfraRecovered, InfraSpawned, InfraStopped
from fedota.events.problems import ProblemCompleted, ProblemStarted, ProblemStopped
from fedota.kernel.database import Connection, Pool
from fedota.kernel.projection import Projection
from services.orchestrator.domain import State, evolve

_TABLES: Final = """
create table if not exists problems (
    problem_id text primary key,
    position bigint not null, -- of the newest event in it
    settled boolean not null, -- nothing to do any more: most problems, after a while
    state text not null
);
create index if not exists problems_position on problems (position);
create index if not exists problems_unsettled on problems (problem_id) where not settled;
"""
_KINDS: Final[tuple[type[EventData], ...]] = (
    ProblemStarted,
    ProblemStopped,
    ProblemCompleted,
    InfraSpawned,
    InfraFailed,
    InfraDegraded,
    InfraRecovered,
    InfraStopped,
)
_decode: Final = msgspec.json.Decoder(State).decode


async def load(database: Pool | Connection, problem_id: str) -> State | None:
    """The problem's state; None when it was never started."""
    state = await database.fetchval("select state from problems where problem_id = $1", problem_id)
    return None if state is None else _decode(state)


async def changed(pool: Pool, after: int) -> list[str]:
    """The problems that events past position `after` changed."""
    rows = await pool.fetch("select problem_id from problems where position > $1", after)
    return [row["problem_id"] for row in rows]


async def unsettled(pool: Pool) -> list[str]:
    """The problems for which something should run or is left to say."""
    return [row["problem_id"] for row in await pool.fetch("select problem_id from problems where not settled")]


async def _evolve(connection: Connection, event: Event, _: Any) -> None:
    state = evolve(await load(connection, event.problem_id), event)
    if state is not None:
        await connection.execute(
            "insert into problems values ($1, $2, $3, $4) on conflict (problem_id)"
            " do update set position = excluded.position, settled = excluded.settled, state = excluded.state",
            event.problem_id,
            event.position,
            state.settled,
            to_json(state).decode(),
        )


PROJECTION: Final = Projection(tables=_TABLES, names=("problems",), rows=dict.fromkeys(_KINDS, _evolve))
