"""Anything happens to anybody at any time, and several things at once."""

import asyncio
import random
from pathlib import Path
from typing import Final

from fedota.events.problems import Plan
from tests.faults.rounds.around import Around
from tests.faults.rounds.faults import DEEDS, Faults
from tests.faults.rounds.story import check
from tests.faults.rounds.training import Training

_CLIENTS: Final = 4


async def test_anything_at_any_time(
    around: Around, tmp_path: Path, chance: random.Random, many: int, patient: bool
) -> None:
    """The run comes to its end, and each update that was accepted is in one checkpoint, once."""
    count = 2 * many
    plan = Plan(
        rounds=2 * count,
        goal_count=3,
        minimum_fraction=0.6,
        over_selection=1.3,
        selection_timeout=3,
        report_timeout=5,
        attempts=1000,
        client_config={"seconds": 0.05},
    )
    async with Training.begun(around, tmp_path / "run", plan, clients=_CLIENTS) as training:
        training.open_gate(plan.rounds - 1)  # nothing is over before every fault has come
        await training.completes(1)
        made = Faults(training, chance, patient=patient)
        for _ in range(count):
            await asyncio.sleep(chance.expovariate(2.0))
            await made.do(chance.choice(DEEDS))
        await made.mended()
        await training.ends()
        found = await check(training)
    assert found.rounds == plan.rounds


async def test_everybody_is_killed_again_and_again(
    around: Around, tmp_path: Path, chance: random.Random, faults: int
) -> None:
    """All that runs is killed in the same moment, before what was killed the last time has come far."""
    plan = Plan(
        rounds=faults,
        goal_count=2,
        minimum_fraction=1.0,
        selection_timeout=5,
        report_timeout=5,
        attempts=1000,
        client_config={"seconds": 0.05},
    )
    async with Training.begun(around, tmp_path / "run", plan, clients=3) as training:
        training.open_gate(plan.rounds - 1)
        for _ in range(faults // 2):
            await asyncio.sleep(chance.uniform(0.1, 4))
            for process in training.processes:
                process.kill()
        await training.ends()
        found = await check(training)
    assert found.rounds == plan.rounds
