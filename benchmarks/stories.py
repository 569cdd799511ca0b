"""A log as a platform writes it: problems from their publication to their result, with rounds of ten reports."""

import asyncio
from contextlib import AsyncExitStack
from typing import Any, Final
from uuid import uuid4

import msgspec

from benchmarks.world import CONTEXT, Database, an_event
from fedota.events import CATALOGUE, EventData, NewEvent
from fedota.events.orchestrator import InfraSpawned, InfraStopped
from fedota.events.problems import (
    ModelFile,
    ParticipationApproved,
    ParticipationRequested,
    Plan,
    ProblemCompleted,
    ProblemCreated,
    ProblemStarted,
)
from fedota.events.storage import FilesStored, StoredFile
from fedota.kernel.event_log import Append

_ROUNDS: Final = 10
_REPORTS: Final = 10  # of a round
_OWNERS: Final = ("problems", "storage", "orchestrator", "rounds")
_PLAN: Final = Plan(rounds=_ROUNDS, goal_count=8)
_MODEL: Final = ModelFile(key="model", sha256="0" * 64, size=1)


async def tell(made: Database, problems: int) -> int:
    """Append so many problems' stories; how many events the log has then."""
    async with AsyncExitStack() as stack:
        logs = {owner: await stack.enter_async_context(made.log(owner)) for owner in _OWNERS}

        async def tell_one() -> None:
            for data in _story(str(uuid4())):
                owner = CATALOGUE[type(data[0]).__name__].owner
                events = [NewEvent(data=one) for one in data]
                await logs[owner].append(
                    Append(subject=f"{owner}/{data[0].problem_id}", events=events, context=CONTEXT)
                )

        await asyncio.gather(*(tell_one() for _ in range(problems)))
        return await logs["rounds"].head()


def _story(problem_id: str) -> list[list[EventData]]:
    """A problem's events, as they are appended together."""
    names = [f"Hospital {letter}" for letter in "ABCDEFGH"]
    described = {"name": "Tumours", "description": "Find them.", "data_format": "csv", "client_image": "images/client"}
    joined: list[list[EventData]] = [
        [kind(problem_id=problem_id, organization=name)]
        for name in names
        for kind in (ParticipationRequested, ParticipationApproved)
    ]
    model = StoredFile(name="model", role="model", key=_MODEL.key, sha256=_MODEL.sha256, size=_MODEL.size)
    place: dict[str, Any] = {"problem_id": problem_id, "run": 1, "namespace": f"problem-{problem_id}"}
    return [
        [ProblemCreated(problem_id=problem_id, plan=_PLAN, **described)],
        [FilesStored(problem_id=problem_id, files=[model])],
        [ProblemStarted(problem_id=problem_id, run=1, plan=_PLAN, model=_MODEL)],
        [InfraSpawned(**place, backend="process", coordinator="http://c", selectors=["http://s"])],
        *joined,
        *([_report(problem_id, number)] for number in range(_ROUNDS * _REPORTS)),
        [ProblemCompleted(problem_id=problem_id, run=1, rounds=_ROUNDS, model=_MODEL)],
        [InfraStopped(**place, reason="completed")],
    ]


def _report(problem_id: str, number: int) -> EventData:
    return msgspec.structs.replace(an_event(problem_id, number + 1), round=1 + number // _REPORTS)
