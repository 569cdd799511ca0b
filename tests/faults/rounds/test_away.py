"""NATS or the object store is away for several rounds: training goes on, and all is told later, in order."""

import random
from itertools import product
from pathlib import Path
from typing import Final, NamedTuple

from fedota.events.problems import Plan
from tests.faults.rounds.around import Around
from tests.faults.rounds.story import check
from tests.faults.rounds.training import Training

_AHEAD: Final = 4  # rounds that are trained while nobody can be told
_CLIENTS: Final = 3


class Cut(NamedTuple):
    """What the coordinator is cut off from, whether it hears so, and whether it is killed meanwhile."""

    away: str
    silently: bool
    killed: bool


CUTS: Final = [Cut(*one) for one in product(("nats", "s3"), (False, True), (False, True))]


async def test_a_coordinator_that_is_cut_off_goes_on(
    around: Around, tmp_path: Path, chance: random.Random, faults: int
) -> None:
    """Each client trains once for each round: what was computed while cut off counts, also after a crash."""
    for number, cut in enumerate(chance.sample(CUTS, min(len(CUTS), max(1, faults // 4)))):
        await _cut_off(around, tmp_path / f"run-{number}", chance, cut)


async def _cut_off(around: Around, directory: Path, chance: random.Random, cut: Cut) -> None:
    plan = Plan(
        rounds=_AHEAD + 3,
        goal_count=_CLIENTS,
        minimum_fraction=1.0,
        selection_timeout=60,
        report_timeout=60,
        client_config={"seconds": 0.0},
    )
    async with Training.begun(around, directory, plan, clients=_CLIENTS) as training:
        training.open_gate(1)
        await training.completes(1)
        wire = training.bus if cut.away == "nats" else training.store
        wire.cut(silently=cut.silently)
        for number in range(2, 2 + _AHEAD):
            await _is_trained(training, number, cut)
        assert len(training.recorder.completed) == 1, f"it was cut off: {cut}"
        if cut.killed:
            training.coordinator.kill(chance.uniform(0, 1))
            await training.comes_to("the coordinator is started again", lambda: training.coordinator.lives == 2)
        wire.mend()
        await training.ends()
        found = await check(training)
        assert found.attempts == found.rounds == plan.rounds, cut
        assert training.trained() == list(product(range(1, plan.rounds + 1), range(_CLIENTS))), f"trained twice: {cut}"


async def _is_trained(training: Training, round_: int, cut: Cut) -> None:
    training.open_gate(round_)
    all_ = [(round_, number) for number in range(_CLIENTS)]
    await training.comes_to(f"all have trained for round {round_}: {cut}", lambda: set(all_) <= set(training.trained()))
