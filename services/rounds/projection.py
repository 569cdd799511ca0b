"""The read model of rounds: one row a problem, the state that `domain.evolve` makes of the log."""

from collections.abc import Sequence
from typing import Final

import msgspec

from fedota.events import Event, EventData, to_json
from fedota.events.problems import (
    ParticipationApproved,
    ParticipationRevoked,
    ProblemCompleted,
    ProblemStarted,
    ProblemStopped,
)
from fedota.kernel.database import Connection, Pool
from fedota.kernel.projection import Projection
from fedota.kernel.tables import Put, Tables
from services.rounds.domain import State, evolve

_TABLES: Final = """
create table if not exists problems (
    problem_id text primary key,
    state text not null
);
"""
_KINDS: Final[frozenset[type[EventData]]] = frozenset(
    (ProblemStarted, ProblemStopped, ProblemCompleted, ParticipationApproved, ParticipationRevoked)
)
_STATES: Final = "select problem_id, state from problems where problem_id = any($1)"
_decode: Final = msgspec.json.Decoder(State).decode
_tables: Final = Tables("problems")


async def load(database: Pool | Connection, problem_id: str) -> State:
    """The problem's state; that of an unknown problem is empty."""
    state = await database.fetchval("select state from problems where problem_id = $1", problem_id)
    return State() if state is None else _decode(state)


async def _write(connection: Connection, events: Sequence[Event]) -> None:
    rows = await connection.fetch(_STATES, list({event.problem_id for event in events}))
    states = {row["problem_id"]: _decode(row["state"]) for row in rows}
    for event in events:
        states[event.problem_id] = evolve(states.get(event.problem_id, State()), event)
    changes = [
        Put("problems", {"problem_id": one}, {"state": to_json(state).decode()}) for one, state in states.items()
    ]
    await _tables.write(connection, changes)


PROJECTION: Final = Projection(tables=_TABLES, names=("problems",), write=_write, kinds=_KINDS)
