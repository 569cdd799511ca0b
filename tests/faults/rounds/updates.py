"""Updates that tell who made them: a checkpoint shows which of them are in it, how often, and with which weight.

Sums of these numbers are exact in float64, so that no bit of a mean depends on the order in which they were added;
only `chain` goes on from the weights before, with all that rounding does to it.
"""

from collections.abc import Iterable
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

Weights = dict[str, NDArray[Any]]
SLOTS: Final = 4096  # clients that a run can have, those that were started again among them
_STEPS: Final = 1024.0  # a pattern's numbers are whole numbers of these parts of one
_LARGEST: Final = 8192


class Maker(NamedTuple):
    """One life of a client: `slot` is new for each, `number` and `examples` stay."""

    slot: int
    number: int
    examples: int


class Made(NamedTuple):
    """One training: the `call`-th of its client's life."""

    maker: Maker
    round: int
    call: int


def first_model(elements: int) -> Weights:
    """The weights to begin with."""
    return {
        "slots": np.zeros(SLOTS),
        "calls": np.zeros(SLOTS),
        "shared": np.zeros(elements, np.float32),
        "own": np.zeros(elements, np.float32),
        "chain": np.linspace(-1.0, 1.0, 64),
        "round": np.zeros(1, np.int64),
    }


def update(model: Weights, maker: Maker, round_: int, call: int) -> Weights:
    """What a client makes of the model. `shared` is the same whenever this client trains in this round."""
    elements = model["shared"].size
    one = np.zeros(SLOTS)
    one[maker.slot] = 1.0
    return {
        "slots": one,
        "calls": one * call,
        "shared": _pattern(elements, maker.number, round_).astype(np.float32),
        "own": _pattern(elements, 1_000_000 + maker.slot, call).astype(np.float32),
        "chain": model["chain"] / 2 + _pattern(64, maker.number, round_),
        "round": np.maximum(model["round"] + 1, round_),
    }


def _pattern(elements: int, *seed: int) -> NDArray[np.float64]:
    return np.random.default_rng(seed).integers(-_LARGEST, _LARGEST, elements) / _STEPS


def mean(model: Weights, made: Iterable[Made]) -> Weights:
    """What federated averaging makes of these, in numpy's own words."""
    sums: Weights = {}
    total = 0
    for one in made:
        values = update(model, one.maker, one.round, one.call)
        total += one.maker.examples
        for name, tensor in values.items():
            if tensor.dtype.kind == "i":
                sums[name] = np.maximum(sums.get(name, tensor), tensor)
            else:
                sums[name] = sums.get(name, 0.0) + one.maker.examples * tensor.astype(np.float64)
    return {
        name: sums[name] if tensor.dtype.kind == "i" else (sums[name] / total).astype(tensor.dtype)
        for name, tensor in model.items()
    }


def found_in(checkpoint: Weights, examples: int, makers: dict[int, Maker]) -> list[tuple[Maker, int]]:
    """The updates that a mean over so many examples holds, each with the number of its call.

    Raises `AssertionError` unless each is in it exactly once, with its own weight.
    """
    found = []
    for slot in np.flatnonzero(checkpoint["slots"]):
        maker = makers[int(slot)]
        times = checkpoint["slots"][slot] * examples / maker.examples
        call = checkpoint["calls"][slot] * examples / maker.examples
        assert abs(times - 1) < 1e-9, f"an update of {maker} is in the checkpoint {times} times"
        assert abs(call - round(call)) < 1e-6, f"{maker} made {call} calls"
        found.append((maker, round(call)))
    assert set(np.flatnonzero(checkpoint["calls"])) <= set(np.flatnonzero(checkpoint["slots"]))
    total = sum(maker.examples for maker, _ in found)
    assert total == examples, f"the updates in the checkpoint weigh {total}, the report says {examples}"
    return found
