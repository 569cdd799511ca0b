"""Updates into a checkpoint."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedota.errors import FedotaError
from fedota.runtime.aggregation import (
    STRATEGIES,
    WeightedSum,
    Weights,
    aggregate,
    checked,
    choose_strategy,
    clipped,
    mean_metrics,
    not_finite,
    step_norm,
    sum_size,
)
from fedota.runtime.places import Spooled, put, whole
from fedota.runtime.protocol import MOST_METRICS
from fedota.runtime.tensors import Array, Layout, layout_of

Tensors = dict[str, Array]


def layout(weights: Tensors) -> Layout:
    """The layout of these tensors."""
    return layout_of(memoryview(safetensors.numpy.save(weights)))


def example() -> Tensors:
    """A tensor of each kind."""
    return {
        "double": np.array([1.0, 2.0]),
        "single": np.array([[1, 2], [3, 4]], np.float32),
        "half": np.array(0.5, np.float16),
        "steps": np.array([7], np.int64),
        "empty": np.zeros((0, 3), np.float32),
    }


def body(tensors: Tensors) -> memoryview:
    """Tensors as they are sent."""
    return memoryview(safetensors.numpy.save(tensors))


def update(tensors: Tensors, like: Layout | None = None) -> Weights:
    """An update in memory."""
    return Weights(like or layout(tensors), whole(body(tensors)))


def fedavg(weights: list[tuple[Tensors, int]], *, partials: int = 1) -> Tensors:
    """The updates aggregated over so many selectors."""
    like = layout(weights[0][0])
    sums = [WeightedSum(like) for _ in range(partials)]
    for number, (tensors, examples) in enumerate(weights):
        sums[number % partials].add(update(tensors, like), examples)
    total = WeightedSum(like)
    for one in sums:
        if one.count:
            total.merge(whole(one.numbers), one.examples, one.count)
    base = whole(body(weights[0][0]))
    result: Tensors = safetensors.numpy.load(b"".join(aggregate(choose_strategy("fedavg", {}), like, base, total)))
    return result


def test_the_weighted_mean() -> None:
    """Of floats in their own type; of counters the largest."""
    first, second = example(), {name: np.array(values * 3, values.dtype) for name, values in example().items()}
    result = fedavg([(first, 1), (second, 3)])
    assert {name: values.dtype for name, values in result.items()} == {name: v.dtype for name, v in first.items()}
    np.testing.assert_allclose(result["double"], [2.5, 5.0])
    np.testing.assert_allclose(result["single"], [[2.5, 5], [7.5, 10]])
    assert (float(result["half"]), result["half"].shape) == (1.25, ())
    assert (result["steps"].tolist(), result["empty"].shape) == ([21], (0, 3))


def test_what_was_in_memory_before_does_not_show() -> None:
    """A sum's memory is not cleared: its first update is written over whatever was there."""
    like = layout(example())
    dirty = WeightedSum(like, memoryview(bytearray(b"\xff" * sum_size(like))))
    dirty.add(update(example()), 2)
    clean = WeightedSum(like, memoryview(bytearray(sum_size(like))))
    clean.add(update(example()), 2)
    assert bytes(dirty.numbers) == bytes(clean.numbers)


_VALUES = hnp.arrays(
    np.float32, st.just((3, 2)), elements=st.floats(-1e6, 1e6, width=32, allow_nan=False, allow_subnormal=False)
)
_UPDATES = st.lists(st.tuples(_VALUES, st.integers(1, 10**9), st.integers(-(2**40), 2**40)), min_size=1, max_size=12)


@given(_UPDATES, st.integers(1, 4), st.randoms())
def test_the_hierarchy_is_exact(drawn: list[tuple[Array, int, int]], partials: int, chance: Any) -> None:
    """FedAvg over selectors' sums is FedAvg over all clients, whatever the order and whoever summed whom."""
    updates = [({"w": values, "n": np.array([count], np.int64)}, examples) for values, examples, count in drawn]
    shuffled = updates[:]
    chance.shuffle(shuffled)
    weights = [examples for _, examples in updates]
    values = np.stack([one["w"] for one, _ in updates]).astype(np.float64)
    expected = np.average(values, axis=0, weights=weights)
    scale = np.average(np.abs(values), axis=0, weights=weights)  # what cancels out cannot be told from nothing
    least = np.finfo(np.float32).smallest_subnormal  # what is smaller than any number of the type cannot be nearer
    for result in (fedavg(updates), fedavg(shuffled, partials=partials)):
        assert (np.abs(result["w"] - expected) <= 1e-6 * scale + least).all()
        assert result["n"][0] == max(count for _, _, count in drawn)


@given(st.lists(st.sampled_from([1e300, -1e300, 3e38, 1e-300]), min_size=1, max_size=5))
def test_large_numbers_are_refused_before_they_overflow(values: list[float]) -> None:
    """What is accepted is still finite after 10⁵ clients with 10⁹ examples each."""
    tensors = {"w": np.array(values)}
    if not_finite(tensors) is None:
        with np.errstate(over="raise"):
            assert np.isfinite(np.abs(tensors["w"]).max() * 1e9 * 1e5)
    else:
        assert max(abs(value) for value in values) == 1e300


@pytest.mark.parametrize("spoil", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("place", [0, 40_000, 99_999])
def test_one_wrong_number_is_found_anywhere(spoil: float, dtype: Any, place: int) -> None:
    """Also past the first piece that is looked at."""
    values = np.zeros(100_000, dtype)
    assert not_finite({"fine": np.ones(3), "w": values}) is None
    values[place] = spoil
    assert not_finite({"fine": np.ones(3), "w": values}) == "w"


def test_a_checked_update_shares_the_bodys_memory() -> None:
    """It is not copied, and its tensors may come in another order than the model's."""
    like = layout(example())
    same = bytearray(safetensors.numpy.save(example()))
    checked_ = checked(like, whole(memoryview(same)))
    single = next(tensor for tensor in like.tensors if tensor.name == "single")

    def values(of: Weights) -> list[float]:
        return [number for _, piece in of.pieces(single) for number in piece.tolist()]

    assert values(checked_) == [1, 2, 3, 4]
    same[len(like.header) + single.start : len(like.header) + single.start + 4] = np.float32(9).tobytes()
    assert values(checked_) == [9, 2, 3, 4]
    other = safetensors.numpy.save(example(), metadata={"by": "another writer"})
    assert values(checked(like, whole(memoryview(other)))) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"single": np.zeros((4, 1), np.float32)}, "update_mismatch"),
        ({"single": np.zeros((2, 2), np.float64)}, "update_mismatch"),
        ({"more": np.zeros(1)}, "update_mismatch"),
        ({"double": np.array([np.nan, 1.0])}, "update_not_finite"),
        ({"double": np.array([1e300, 1.0])}, "update_not_finite"),
    ],
)
def test_an_update_that_differs_is_refused(changes: Tensors, code: str) -> None:
    """By name, with the tensor."""
    with pytest.raises(FedotaError) as raised:
        checked(layout(example()), whole(body({**example(), **changes})))
    assert raised.value.problem.code == code
    assert next(iter(changes)) in raised.value.problem.detail


def test_strategies_are_chosen_by_name() -> None:
    """An unknown one is an error before anything is trained."""
    assert "fedavg" in STRATEGIES
    with pytest.raises(ValueError, match="there is no strategy 'magic'; there are: fedavg"):
        choose_strategy("magic", {})
    with pytest.raises(ValueError, match="fedavg takes no parameters, but was given beta"):
        choose_strategy("fedavg", {"beta": 1.0})


def test_metrics_are_averaged_over_those_who_sent_them() -> None:
    """By examples."""
    assert mean_metrics([(1, {"a": 1.0}), (3, {"a": 5.0, "b": 2.0}), (10, {})]) == {"a": 4.0, "b": 2.0}
    assert mean_metrics([]) == {}
    assert mean_metrics([(1, {"a": 1e308}), (9, {"a": 1e308})]) == {}, "what overflows is left out"


def test_of_too_many_metrics_those_of_most_examples_are_kept() -> None:
    """Clients choose the names: all of them together must not make a report too large."""
    own = [(1, {f"{client}/{number}": 1.0 for number in range(MOST_METRICS)}) for client in range(200)]
    first = sorted({name for _, all_ in own for name in all_})[: MOST_METRICS - 1]
    assert mean_metrics([*own, (2, {"z": 3.0}), (2, {"z": 5.0})]) == {**dict.fromkeys(first, 1.0), "z": 4.0}


def large() -> Tensors:
    """More than is worked on at once, and not in whole pieces."""
    random = np.random.default_rng(3)
    return {
        "a": random.standard_normal(100_001).astype(np.float32),
        "n": random.integers(0, 9, 70_001),
        "b": random.standard_normal((3, 33_333)),
    }


def spooled(content: memoryview, directory: Path) -> Spooled:
    """The same bytes in a file."""
    file = Spooled.unlinked(directory, len(content))
    put(file, content)
    return file


def test_from_a_file_comes_the_very_same_sum(tmp_path: Path) -> None:
    """Bit for bit: updates that found no memory count as the others do, and so do sums."""
    tensors, like = large(), layout(large())
    twice = {name: values * 2 for name, values in tensors.items()}
    in_memory, from_files = WeightedSum(like), WeightedSum(like)
    for one in (tensors, twice):
        in_memory.add(checked(like, whole(body(one))), 3)
        file = spooled(body(one), tmp_path)
        from_files.add(checked(like, file), 3)
        file.close()
    assert bytes(in_memory.numbers) == bytes(from_files.numbers)
    merged, file = WeightedSum(like), spooled(in_memory.numbers, tmp_path)
    for _ in range(2):
        merged.merge(file, 6, 2)
    file.close()
    expected = WeightedSum(like)
    for _ in range(2):
        expected.merge(whole(in_memory.numbers), 6, 2)
    assert bytes(merged.numbers) == bytes(expected.numbers)
    assert (merged.examples, merged.count) == (12, 4)


@pytest.mark.parametrize("name", ["a", "b"])
def test_one_wrong_number_is_found_in_a_file(name: str, tmp_path: Path) -> None:
    """As in memory."""
    tensors = large()
    tensors[name].reshape(-1)[-1] = np.nan
    file = spooled(body(tensors), tmp_path)
    with pytest.raises(FedotaError, match=f"'{name}'"):
        checked(layout(tensors), file)
    file.close()


_STEPS = hnp.arrays(np.float32, (7,), elements=st.floats(-1e3, 1e3, width=32))


@given(_STEPS, _STEPS, st.floats(1e-3, 1e4))
def test_a_clipped_step_is_no_longer_than_allowed(before: Array, after: Array, most: float) -> None:
    """Its direction is kept; one that is short enough is not touched, and integers never are."""
    base = update({"w": before, "n": np.array([1])})
    sent = update({"w": after, "n": np.array([7])})
    step = after.astype(np.float64) - before
    norm = float(np.linalg.norm(step))
    assert step_norm(sent, base) == pytest.approx(norm, rel=1e-12)
    taken = clipped(sent, base, most)
    if norm <= most * (1 - 1e-12):
        assert taken is sent
    elif norm > most * (1 + 1e-12):
        w, n = (tensor for tensor in sorted(base.layout.tensors, key=lambda one: one.name, reverse=True))
        ((_, values),) = taken.pieces(w)
        np.testing.assert_allclose(values, before + step * (most / norm), rtol=1e-9, atol=1e-9)
        ((_, counted),) = taken.pieces(n)
        assert counted.tolist() == [7]


def test_a_step_without_end_is_clipped_to_nothing() -> None:
    """Numbers whose squares overflow are finite, and one client's alone would be the whole sum."""
    base, sent = update({"w": np.array([1.0, 2.0])}), update({"w": np.array([1e200, 2.0])})
    assert step_norm(sent, base) == np.inf
    ((_, values),) = clipped(sent, base, 1.0).pieces(base.layout.tensors[0])
    assert values.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("hole", [np.nan, np.inf, -np.inf])
def test_a_base_that_is_not_finite_neither_stops_clipping_nor_spreads(hole: float) -> None:
    """An attention mask holds infinities: there is no step from there, and all the others are clipped all the same."""
    base = update({"mask": np.array([hole, 1.0]), "w": np.array([1.0, 2.0])})
    sent = update({"mask": np.array([5.0, 1.0]), "w": np.array([1.0 + 3e6, 2.0 + 4e6])})
    assert step_norm(sent, base) == pytest.approx(5e6)
    total = WeightedSum(base.layout)
    total.add(clipped(sent, base, 5.0), 1)
    assert [total.means(t, slice(None)).tolist() for t in base.layout.tensors] == [
        [5.0, 1.0],
        pytest.approx([4.0, 6.0]),
    ]
