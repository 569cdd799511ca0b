"""Without any fault: what the other tests compare with is true, and the comparison itself would notice."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedota.events.problems import Plan
from tests.faults.rounds.around import Around
from tests.faults.rounds.story import check
from tests.faults.rounds.training import EXAMPLES, Training
from tests.faults.rounds.updates import Made, Maker, Weights, first_model, found_in, mean

_MAKERS = {slot: Maker(slot, slot, EXAMPLES[slot]) for slot in range(3)}
_MADE = [Made(maker, 1, 4 + maker.slot) for maker in _MAKERS.values()]
_EXAMPLES = sum(EXAMPLES[:3])


def _plan(**changes: Any) -> Plan:
    usual: dict[str, Any] = {"rounds": 3, "goal_count": 3, "minimum_fraction": 1.0, "client_config": {"seconds": 0}}
    return Plan(**{**usual, **changes})


async def test_an_undisturbed_run_tells_one_story(around: Around, tmp_path: Path) -> None:
    """Each client's update is in each checkpoint, and each client hears so."""
    async with Training.begun(around, tmp_path / "run", _plan(), clients=3) as training:
        await training.ends()
        found = await check(training)
    assert found == (3, 9, 9, 3)


def _checkpoint(made: list[Made]) -> Weights:
    return mean(first_model(10), made)


def test_a_checkpoint_tells_which_updates_are_in_it() -> None:
    """Whose they are, and from which call."""
    found = found_in(_checkpoint(_MADE), _EXAMPLES, _MAKERS)
    assert found == [(one.maker, one.call) for one in _MADE]


@pytest.mark.parametrize(
    ("made", "examples"),
    [
        ([*_MADE, _MADE[0]], _EXAMPLES + EXAMPLES[0]),  # counted twice, and its weight too
        ([*_MADE, _MADE[0]], _EXAMPLES),  # counted twice
        (_MADE[1:], _EXAMPLES),  # one is missing, its weight is not
        ([_MADE[0]._replace(maker=Maker(0, 0, 4)), *_MADE[1:]], _EXAMPLES + 1),  # with another's weight
    ],
)
def test_a_checkpoint_that_was_added_up_wrongly_is_noticed(made: list[Made], examples: int) -> None:
    """Whatever else agrees."""
    with pytest.raises(AssertionError):
        found_in(_checkpoint(made), examples, _MAKERS)


def test_half_an_update_is_noticed() -> None:
    """Its tensors are those of no mean."""
    right = _checkpoint(_MADE)
    wrong = mean(first_model(10), [_MADE[0]._replace(call=9), *_MADE[1:]])
    assert not np.array_equal(right["own"], wrong["own"]) and np.array_equal(right["shared"], wrong["shared"])
