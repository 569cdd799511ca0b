"""The orchestrator's read model: one row a problem, the state that `domain.evolve` makes of the log."""

from collections.abc import Sequence
from typing import Final

import msgspec

from fedota.events import Event, EventData, to_json
from fedota.events.orchestrator import InfraDegraded, InfraFailed, InfraRecovered, InfraSpawned, InfraStopped
from fedota.events.problems import ProblemCompleted, ProblemStarted, ProblemStopped
from fedota.kernel.database import Connection, Pool
from fedota.kernel.projection import Projection
from fedota.kernel.tables import Put, Tables
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
_KINDS: Final[frozenset[type[EventData]]] = frozenset(
    (
        ProblemStarted,
        ProblemStopped,
        ProblemCompleted,
        InfraSpawned,
        InfraFailed,
        InfraDegraded,
        InfraRecovered,
        InfraStopped,
    )
)
_STATES: Final = "select problem_id, state from problems where problem_id = any($1)"
_decode: Final = msgspec.json.Decoder(State).decode
_tables: Final = Tables("problems")


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


async def _write(connection: Connection, events: Sequence[Event]) -> None:
    rows = await connection.fetch(_STATES, list({event.problem_id for event in events}))
    states: dict[str, State | None] = {row["problem_id"]: _decode(row["state"]) for row in rows}
    for event in events:
        states[event.problem_id] = evolve(states.get(event.problem_id), event)
    newest = {event.problem_id: event.position for event in events}
    await _tables.write(connection, [_put(state, newest[state.problem_id]) for state in states.values() if state])


def _put(state: State, position: int) -> Put:
    values = {"position": position, "settled": state.settled, "state": to_json(state).decode()}
    return Put("problems", {"problem_id": state.problem_id}, values)


PROJECTION: Final = Projection(tables=_TABLES, names=("problems",), write=_write, kinds=_KINDS)
