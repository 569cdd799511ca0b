"""The rounds service and what it meets; problems is played by what the tests record, coordinators by the tests."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import asyncpg

from fedota.events.problems import ModelFile, ParticipationApproved, Plan, ProblemStarted
from fedota.events.rounds import Checkpoint, RoundUpdated
from services.rounds.app import create_app
from services.rounds.settings import Settings
from tests.integration.rounds.coordinator import Coordinator
from tests.support.services import Platform, new_id
from tests.support.world import ServiceWorld

CLINIC: Final = "Clinic A"
PLAN: Final = Plan(rounds=3, goal_count=2, attempts=2)
MODEL: Final = ModelFile(key="k/model", sha256="a" * 64, size=10)
STAGES: Final = ("selection", "configuration", "reporting", "completed")


class World(ServiceWorld[Settings]):
    """A platform with a rounds service that tests start, stop and kill."""

    def __init__(self, platform: Platform, directory: Path) -> None:
        super().__init__(platform, directory, "rounds", create_app, platform.settings(Settings, "rounds"))

    async def start(self, *, run: int = 1, plan: Plan = PLAN, problem_id: str | None = None) -> str:
        """A problem that runs, with one organization."""
        problem_id = problem_id or new_id()
        approved = ParticipationApproved(problem_id=problem_id, organization=CLINIC)
        await self.platform.record(approved, ProblemStarted(problem_id=problem_id, run=run, plan=plan, model=MODEL))
        return problem_id

    def coordinator(self, problem_id: str) -> AbstractAsyncContextManager[Coordinator]:
        """The problem's coordinator, in its own NATS account."""
        return Coordinator.connect(self.platform.servers, problem_id, self.directory)

    async def reports(self, problem_id: str) -> list[RoundUpdated]:
        """What was recorded of the problem's rounds."""
        events = await self.platform.events(f"rounds/{problem_id}")
        return [event.data for event in events if isinstance(event.data, RoundUpdated)]

    @asynccontextmanager
    async def standing_still(self) -> AsyncIterator[None]:
        """The read model takes in nothing that is new."""
        connection = await asyncpg.connect(self.settings.database_url.reveal())
        try:
            async with connection.transaction():
                await connection.execute("select from rounds.checkpoint for update")
                yield
        finally:
            await connection.close()


def told(problem_id: str, stage: Any, report: int, round_: int = 1, attempt: int = 1, **more: Any) -> RoundUpdated:
    """A good report, but for what `more` says."""
    fields: dict[str, Any] = {
        "problem_id": problem_id,
        "run": 1,
        "report": report,
        "round": round_,
        "attempt": attempt,
        "stage": stage,
        "goal_count": PLAN.goal_count,
        "minimum_count": PLAN.minimum_count,
        "reason": "said in words",
    }
    if stage == "completed":
        fields["checkpoint"] = checkpoint(problem_id, round_)
        fields |= {"reported": 2, "selected": 2, "participants": [CLINIC], "examples": 300, "metrics": {"loss": 0.5}}
        fields["final"] = round_ == PLAN.rounds
    return RoundUpdated(**{**fields, **more})


def checkpoint(problem_id: str, round_: int) -> Checkpoint:
    """Where a round's weights lie."""
    key = f"problems/{problem_id}/checkpoints/1/{round_}-{'b' * 16}.safetensors"
    return Checkpoint(key=key, sha256="b" * 64, size=9)


def training(problem_id: str) -> list[RoundUpdated]:
    """All reports of a training in which nothing goes wrong."""
    told_ = [(stage, round_) for round_ in range(1, PLAN.rounds + 1) for stage in STAGES]
    return [told(problem_id, stage, report, round_) for report, (stage, round_) in enumerate(told_, 1)]
