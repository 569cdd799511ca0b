"""Updates into a checkpoint: pure numpy, exact across the hierarchy of selectors and coordinator.

Float tensors are summed in float64, each update weighted by its examples; the weighted mean of all sums is the weighted
mean of all updates. Integer tensors count something (such as BatchNorm's `num_batches_tracked`): their mean means
nothing, so the element-wise maximum of the updates is kept, which also does not depend on the order of arrival.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fedota.errors import FedotaError
from fedota.runtime.places import Place, room
from fedota.runtime.protocol import MOST_METRICS
from fedota.runtime.tensors import Array, Layout, Tensor, layout_in, mismatch

_CHUNK: Final = 1 << 15  # elements: what is worked on stays in the processor's cache
_LARGEST: Final = 1e290  # 100,000 clients × 10⁹ examples × this is still finite in float64

Floats = NDArray[np.float64]


class Pieces(Protocol):
    """Tensors that are looked at piece by piece: each piece is good until the next is asked for."""

    def pieces(self, tensor: Tensor) -> Iterator[tuple[slice, Array]]:
        """A tensor's elements, and which they are."""
        ...


class Weights:
    """A safetensors body: in memory, or in a file that is never in memory as a whole."""

    def __init__(self, layout: Layout, body: Place) -> None:
        self.layout = layout
        self.body = body
        self._tensors = {tensor.name: tensor for tensor in layout.tensors}

    def pieces(self, tensor: Tensor) -> Iterator[tuple[slice, Array]]:
        """A tensor's elements, and which they are; `tensor` may be of another body that has the same tensors."""
        own = self._tensors[tensor.name]
        start, step = len(self.layout.header) + own.start, _CHUNK * own.dtype.itemsize
        for offset in range(0, own.size, step):
            stop = min(offset + step, own.size)
            values = np.frombuffer(self.body.read(start + offset, start + stop), own.dtype)
            yield slice(offset // own.dtype.itemsize, stop // own.dtype.itemsize), values


class Clipped(NamedTuple):
    """An update, with its step away from the base scaled down."""

    update: Weights
    base: Weights
    scale: float

    def pieces(self, tensor: Tensor) -> Iterator[tuple[slice, Array]]:
        """A tensor's elements, and which they are. Integers count something: they are no step.

        Nor is there one from an infinity or NaN of the base, such as an attention mask's: what was sent stays.
        """
        if not tensor.averaged:
            yield from self.update.pieces(tensor)
            return
        for (where, values), (_, before) in zip(self.update.pieces(tensor), self.base.pieces(tensor), strict=True):
            start = before.astype(np.float64)
            with np.errstate(invalid="ignore"):
                moved = start + (values - start) * self.scale
            yield where, np.where(np.isfinite(start), moved, values)


def clipped(update: Weights, base: Weights, most: float) -> Weights | Clipped:
    """The update, its step scaled down to the norm `most` where it is longer."""
    norm = step_norm(update, base)
    return update if norm <= most else Clipped(update, base, most / norm)


def step_norm(update: Weights, base: Weights) -> float:
    """The Euclidean norm of the step that an update takes from the base, over all float tensors.

    The update was checked: where its step is not finite, the base is not, and there is none to be measured.
    """
    total = 0.0
    with np.errstate(over="ignore"):  # an infinite norm is clipped to nothing
        for tensor in base.layout.tensors:
            if tensor.averaged:
                for (_, values), (_, before) in zip(update.pieces(tensor), base.pieces(tensor), strict=True):
                    step = np.subtract(values, before, dtype=np.float64)
                    if not math.isfinite(squares := float(np.dot(step, step))):
                        step[~np.isfinite(step)] = 0.0
                        squares = float(np.dot(step, step))
                    total += squares
    return math.sqrt(total)


class WeightedSum:
    """Σ examples × update. Its bytes are the float64 sums in the layout's order, then the integer tensors."""

    def __init__(self, layout: Layout, numbers: memoryview | None = None, examples: int = 0, count: int = 0) -> None:
        self.layout = layout
        self.examples = examples
        self.count = count
        self.numbers = room(sum_size(layout)) if numbers is None else numbers
        self._views = _sum_views(layout, self.numbers)

    def add(self, update: Pieces, examples: int) -> None:
        """Take in an update that was checked."""
        scratch = np.empty(_CHUNK)
        for tensor in self.layout.tensors:
            total = self._views[tensor.name]
            for where, values in update.pieces(tensor):
                if tensor.averaged:
                    _add_scaled(total[where], values, float(examples), scratch, first=not self.count)
                elif self.count:
                    np.maximum(total[where], values, out=total[where])
                else:
                    total[where] = values
        self.examples += examples
        self.count += 1

    def merge(self, numbers: Place, examples: int, count: int) -> None:
        """Take in another sum's bytes, over `count` updates with so many `examples`."""
        for tensor, start in _sum_order(self.layout):
            total = self._views[tensor.name]
            for offset in range(0, total.nbytes, _CHUNK * 8):
                stop = min(offset + _CHUNK * 8, total.nbytes)
                values = np.frombuffer(numbers.read(start + offset, start + stop), total.dtype)
                part = total[offset // total.itemsize : stop // total.itemsize]
                if not self.count:
                    part[:] = values
                elif tensor.averaged:
                    np.add(part, values, out=part)
                else:
                    np.maximum(part, values, out=part)
        self.examples += examples
        self.count += count

    def means(self, tensor: Tensor, where: slice) -> Array:
        """The weighted mean of some elements in float64; of an integer tensor, the largest."""
        values = self._views[tensor.name][where]
        return np.divide(values, float(self.examples)) if tensor.averaged else values


def sum_size(layout: Layout) -> int:
    """The bytes of a sum over this layout."""
    return sum(tensor.elements * (8 if tensor.averaged else tensor.dtype.itemsize) for tensor in layout.tensors)


def _sum_order(layout: Layout) -> Iterator[tuple[Tensor, int]]:
    """Each tensor and where its sum begins: the float64 sums first, so that they lie where a processor likes them."""
    start = 0
    for averaged in (True, False):
        for tensor in layout.tensors:
            if tensor.averaged == averaged:
                yield tensor, start
                start += tensor.elements * (8 if averaged else tensor.dtype.itemsize)


def _sum_views(layout: Layout, numbers: memoryview) -> dict[str, Array]:
    views = {}
    for tensor, start in _sum_order(layout):
        dtype = np.dtype("<f8") if tensor.averaged else tensor.dtype
        views[tensor.name] = np.frombuffer(numbers[start : start + tensor.elements * dtype.itemsize], dtype)
    return views


def _add_scaled(total: Floats, values: Array, weight: float, scratch: Floats, *, first: bool) -> None:
    """Add the values times their weight; the first ones are written over what was there."""
    scaled = total if first else scratch[: values.size]
    np.multiply(values, weight, out=scaled, dtype=np.float64)
    if not first:
        np.add(total, scaled, out=total)


def checked(layout: Layout, body: Place) -> Weights:
    """An update, after everything that can be wrong with it was looked at.

    Raises `update_malformed`, `update_mismatch` or `update_not_finite`, naming the tensor.
    """
    own = layout_in(body, layout)
    if own is not layout:
        found = {tensor.name: (tensor.dtype, tensor.shape) for tensor in own.tensors}
        if fault := mismatch(layout, found):
            raise FedotaError("update_mismatch", f"In the update {fault}. Return the tensors that `train` was given.")
    update = Weights(own, body)
    for tensor in own.tensors:
        if tensor.averaged and not all(_is_finite(values) for _, values in update.pieces(tensor)):
            raise FedotaError(
                "update_not_finite",
                f"The update's tensor {tensor.name[:100]!r} holds NaN, infinity or a number too large to be summed. "
                "A smaller learning rate often helps.",
            )
    return update


def not_finite(tensors: Mapping[str, Array]) -> str | None:
    """The first tensor with NaN, an infinity or a number too large to be summed; None when there is none."""
    return next((name for name, values in tensors.items() if not _is_finite(values)), None)


def _is_finite(values: Array) -> bool:
    if values.dtype.kind != "f":
        return True
    flat = values.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        if not np.isfinite(part).all() or (part.itemsize == 8 and np.abs(part).max() > _LARGEST):
            return False
    return True


# A strategy turns the sum into the next weights, piece by piece: it is given what reads the weights that the round
# began with, and the mean of the updates, and gives the next ones. Its parameters were checked when it was chosen.
Strategy = Callable[[Callable[[], Array], Array], Array]


def _fedavg(parameters: Mapping[str, float]) -> Strategy:
    """FedAvg (McMahan et al. 2017): the mean of the clients' weights by their examples."""
    if parameters:
        raise ValueError(f"fedavg takes no parameters, but was given {', '.join(sorted(parameters))}")
    return lambda _, mean: mean


STRATEGIES: Final[dict[str, Callable[[Mapping[str, float]], Strategy]]] = {"fedavg": _fedavg}


def choose_strategy(name: str, parameters: Mapping[str, float]) -> Strategy:
    """The plan's strategy. Raises `ValueError` when there is none of that name, or a parameter is wrong."""
    if name not in STRATEGIES:
        raise ValueError(f"there is no strategy {name!r}; there are: {', '.join(sorted(STRATEGIES))}")
    return STRATEGIES[name](parameters)


def aggregate(strategy: Strategy, layout: Layout, base: Place, total: WeightedSum) -> Iterator[memoryview]:
    """The next checkpoint in pieces: a safetensors body with the model's own header. A piece is good until the next."""
    yield memoryview(layout.header)
    start = len(layout.header)
    for tensor in layout.tensors:
        for first in range(0, tensor.elements, _CHUNK):
            where = slice(first, min(first + _CHUNK, tensor.elements))
            begin, end = (start + tensor.start + index * tensor.dtype.itemsize for index in (where.start, where.stop))
            values = total.means(tensor, where)
            if tensor.averaged:
                before = partial(_values, base, begin, end, tensor.dtype)
                values = strategy(before, values).astype(tensor.dtype)
            yield values.view(np.uint8).data


def _values(body: Place, start: int, stop: int, dtype: np.dtype[Any]) -> Array:
    return np.frombuffer(body.read(start, stop), dtype)


def mean_metrics(reported: list[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """Each metric's mean by examples, over the clients that sent it: pairs of examples and metrics.

    Clients choose the names, so of more than `MOST_METRICS` only those are kept that most examples were sent with.
    """
    sums: dict[str, float] = {}
    weights: dict[str, int] = {}
    for examples, metrics in reported:
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + examples * value
            weights[name] = weights.get(name, 0) + examples
    means = {name: total / weights[name] for name, total in sums.items()}
    finite = (name for name, value in means.items() if math.isfinite(value))
    kept = sorted(finite, key=lambda name: (-weights[name], name))[:MOST_METRICS]
    return {name: means[name] for name in sorted(kept)}
