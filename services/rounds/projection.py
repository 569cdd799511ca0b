"""The read model of rounds: one row a problem, the state that `domain.evolve` makes of the log."""

from typing import Any, Final

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
from services.rounds.domain import State, evolve

_TABLES: Final = """
create table if not exists problems (
    problem_id text primary key,
    state text not null
);
"""
_KINDS: Final[tuple[type[EventData], ...]] = (
    ProblemStarted,
    ProblemStopped,
    ProblemCompleted,
    ParticipationApproved,
    ParticipationRevoked,
)
_decode: Final = msgspec.json.Decoder(State).decode


async def load(database: Pool | Connection, problem_id: str) -> State:
    """The problem's state; that of an unknown problem is empty."""
    state = await database.fetchval("select state from problems where problem_id = $1", problem_id)
    return State() if state is None else _decode(state)


async def _evolve(connection: Connection, event: Event, _: Any) -> None:
    state = evolve(await load(connection, event.problem_id), event)
    await connection.execute(
        "insert into problems values ($1, $2) on conflict (problem_id) do update set state = excluded.state",
        event.problem_id,
        to_json(state).decode(),
    )


PROJECTION: Final = Projection(tables=_TABLES, names=("problems",), rows=dict.fromkeys(_KINDS, _evolve))
