"""Each process killed or paused, each line broken, at each named moment of a round."""

import random
import sys
from itertools import product
from pathlib import Path
from time import monotonic
from typing import Any, Final

from fedota.events.problems import Plan
from tests.faults.rounds.around import Around
from tests.faults.rounds.faults import DEEDS, MOMENTS, REPORTED, Fault, Faults, some_faults
from tests.faults.rounds.story import Found, check
from tests.faults.rounds.training import Training

_LARGE: Final = 1_500_000  # elements of two tensors: 12 MB
_NOT_COMPUTED: Final = ("collecting", "half a sum", "aggregating")
_ALL_HAVE_REPORTED: Final = (*_NOT_COMPUTED, "storing", "half a checkpoint", "stored", *REPORTED)
_HALVES: Final = [name for name, moment in MOMENTS.items() if moment.halfway]


def _plan(drawn: list[Fault], **changes: Any) -> Plan:
    """A round for each fault, and one after the last."""
    usual: dict[str, Any] = {
        "rounds": len(drawn) + 1,
        "goal_count": 3,
        "minimum_fraction": 1.0,
        "selection_timeout": 10,
        "report_timeout": 10,
        "attempts": 1000,
        "client_config": {"seconds": 0.0},
    }
    return Plan(**{**usual, **changes})


async def _train(training: Training, chance: random.Random, drawn: list[Fault], patient: bool) -> Found:
    """A round for each fault."""
    faults = Faults(training, chance, patient=patient)
    for number, fault in enumerate(drawn, 1):
        began = monotonic()
        await training.make_round(number, faults.make(fault))
        sys.stdout.write(f"round {number}: {fault}: {monotonic() - began:.1f} s\n")
    await training.ends()
    return await check(training)


async def test_what_can_happen_to_a_round_that_needs_all(
    around: Around, tmp_path: Path, chance: random.Random, many: int, patient: bool
) -> None:
    """No client is lost, so nothing is: every update of every client is in every checkpoint."""
    drawn = some_faults(chance, many, without="client killed")
    async with Training.begun(around, tmp_path / "run", _plan(drawn), clients=3) as training:
        found = await _train(training, chance, drawn, patient)
    assert found.rounds == len(drawn) + 1
    assert found.updates == 3 * found.rounds


async def test_what_can_happen_to_a_round_that_can_do_without_some(
    around: Around, tmp_path: Path, chance: random.Random, many: int, patient: bool
) -> None:
    """Clients vanish too: a round takes what there is, and each update that it took is in it once."""
    drawn = some_faults(chance, many)
    plan = _plan(drawn, goal_count=3, minimum_fraction=0.6, over_selection=1.3, selection_timeout=3, report_timeout=6)
    async with Training.begun(around, tmp_path / "run", plan, clients=4) as training:
        found = await _train(training, chance, drawn, patient)
    assert found.rounds == len(drawn) + 1


async def test_a_round_that_was_trained_is_not_trained_again(
    around: Around, tmp_path: Path, chance: random.Random, faults: int, patient: bool
) -> None:
    """Once every update has arrived, nobody trains for it again, whoever of the platform is killed."""
    pairs = [Fault(moment, deed) for moment in _ALL_HAVE_REPORTED for deed in ("nats killed", "s3 killed")]
    pairs += [Fault(moment, "coordinator killed") for moment in _NOT_COMPUTED]  # later it has begun the next round
    drawn = chance.sample(pairs, min(len(pairs), max(1, 3 * faults // 4)))  # servers take long to be back
    plan = _plan(drawn, selection_timeout=60, report_timeout=60)
    async with Training.begun(around, tmp_path / "run", plan, clients=3) as training:
        found = await _train(training, chance, drawn, patient)
        assert found.attempts == found.rounds == plan.rounds
        assert training.trained() == list(product(range(1, plan.rounds + 1), range(3)))


async def test_what_can_happen_in_the_middle_of_large_bodies(
    around: Around, tmp_path: Path, chance: random.Random, faults: int, patient: bool
) -> None:
    """More of them come to one selector at once than it may hold in memory."""
    drawn = some_faults(chance, faults // 2, among=_HALVES)
    plan = _plan(drawn, goal_count=3, minimum_fraction=0.6, selectors=1)
    async with Training.begun(around, tmp_path / "run", plan, clients=3, elements=_LARGE) as training:
        found = await _train(training, chance, drawn, patient)
    assert found.rounds == len(drawn) + 1


def test_the_faults_that_are_drawn_cover_moments_and_deeds(chance: random.Random) -> None:
    """Few of them come to each moment; as many as there are come to each pair."""
    few = some_faults(chance, 15)
    assert {one.moment for one in few} == {*MOMENTS, *REPORTED} and len({one.deed for one in few}) == 15
    assert len(set(some_faults(chance, 15 * len(DEEDS)))) == 15 * len(DEEDS)
