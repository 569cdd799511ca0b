"""A process of the name `rounds` with a projection, to be killed: `python -m tests.contract.projector`.

Its rows say which process wrote them. Its reaction to a new problem appends an event of its own; where the file that
`CRASH` names is not there yet, the process makes it and ends at once, after the append and before the commit. At each
of the positions `KILL_AT` it ends once, with rows of its batch written before and some still to come.
"""

import asyncio
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from fedota.events import Event, NewEvent
from fedota.events.problems import ParticipationRequested, ProblemCreated
from fedota.events.rounds import RoundUpdated
from fedota.kernel.bus import Bus
from fedota.kernel.database import Connection, connect_pool
from fedota.kernel.event_log import Append, Context, EventLog
from fedota.kernel.projection import Projection, Projector
from fedota.kernel.service import Service
from fedota.kernel.settings import ProcessSettings, load


async def _write(connection: Connection, events: Sequence[Event]) -> None:
    for event in events:
        await connection.execute("insert into seen values ($1, $2)", event.position, os.getpid())
        if str(event.position) in os.environ.get("KILL_AT", "").split(","):
            _end_once(Path(os.environ["FEDOTA_DIRECTORY"]) / f"killed-{event.position}")


def _end_once(mark: Path) -> None:
    """As kill -9 would, in the middle of a batch."""
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def a_round(problem_id: str) -> RoundUpdated:
    """What rounds says to a new problem here."""
    return RoundUpdated(
        problem_id=problem_id, run=1, report=1, round=1, attempt=1, stage="selection", goal_count=2, minimum_count=2
    )


async def main() -> None:
    """Project until killed."""
    settings = load(ProcessSettings)
    crash = os.environ.get("CRASH")
    async with (
        connect_pool(settings.database_url, "rounds", size=3) as pool,
        Bus.connect(settings.nats_url, "rounds", settings.nats_credentials) as bus,
        EventLog.open(pool) as log,
    ):

        async def react(event: Event, data: ProblemCreated) -> None:
            await log.append(
                Append(
                    subject=f"rounds/{data.problem_id}",
                    events=[NewEvent(data=a_round(data.problem_id))],
                    context=Context.of_event("rounds", event),
                    key=f"rounds/{event.id}",
                )
            )
            if crash and not Path(crash).exists():
                Path(crash).touch()
                os._exit(9)

        projection = Projection(
            tables="create table if not exists seen (position bigint, pid int);",
            names=("seen",),
            write=_write,
            kinds=frozenset((ProblemCreated, ParticipationRequested)),
            reactions={ProblemCreated: react},
        )
        async with Projector.open(Service("rounds"), projection, pool, log, bus):
            await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
