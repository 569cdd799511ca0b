"""Updates into a checkpoint: pure numpy, exact across the hierarchy of selectors and coordinator.

Float tensors are summed in float64, each update weighted by its examples; the weighted mean of all sums is the weighted
mean of all updates. Integer tensors count something (such as BatchNorm's `num_batches_tracked`): their mean means
nothing, so the element-wise maximum of the updates is kept, which also does not depend on the order of arrival.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedota.errors import FedotaError
from fedota.runtime.tensors import Array, Layout, layout_of, mismatch, room

_CHUNK: Final = 1 << 15  # elements: what is worked on stays in the processor's cache
_LARGEST: Final = 1e290  # 100,000 clients × 10⁹ examples × this is still finite in float64

Floats = NDArray[np.float64]


class WeightedSum:
    """Σ examples × update. Its bytes are the float64 sums in the layout's order, then the integer tensors."""

    def __init__(self, layout: Layout, numbers: memoryview | None = None, examples: int = 0, count: int = 0) -> None:
        self.layout = layout
        self.examples = examples
        self.count = count
        self.numbers = room(sum_size(layout)) if numbers is None else numbers
        self._views = _sum_views(layout, self.numbers)

    def add(self, update: Mapping[str, Array], examples: int) -> None:
        """Take in an update that was checked."""
        scratch = np.empty(_CHUNK)
        for tensor in self.layout.tensors:
            total, values = self._views[tensor.name], update[tensor.name].reshape(-1)
            if tensor.averaged:
                _add_scaled(total, values, float(examples), scratch, first=not self.count)
            elif self.count:
                np.maximum(total, values, out=total)
            else:
                total[:] = values
        self.examples += examples
        self.count += 1

    def merge(self, numbers: memoryview, examples: int, count: int) -> None:
        """Take in another sum's bytes, over `count` updates with so many `examples`."""
        others = _sum_views(self.layout, numbers)
        for tensor in self.layout.tensors:
            total, values = self._views[tensor.name], others[tensor.name]
            if not self.count:
                total[:] = values
            elif tensor.averaged:
                np.add(total, values, out=total)
            else:
                np.maximum(total, values, out=total)
        self.examples += examples
        self.count += count

    def mean_into(self, out: Mapping[str, Array]) -> None:
        """The weighted mean, in each tensor's own type."""
        for tensor in self.layout.tensors:
            total, target = self._views[tensor.name], out[tensor.name].reshape(-1)
            if tensor.averaged:
                np.divide(total, float(self.examples), out=target, casting="same_kind")
            else:
                target[:] = total


def sum_size(layout: Layout) -> int:
    """The bytes of a sum over this layout."""
    return sum(tensor.elements * (8 if tensor.averaged else tensor.dtype.itemsize) for tensor in layout.tensors)


def _sum_views(layout: Layout, numbers: memoryview) -> dict[str, Array]:
    views, start = {}, 0
    for averaged in (True, False):  # the float64 sums first, so that they lie where a processor likes them
        for tensor in layout.tensors:
            if tensor.averaged == averaged:
                dtype = np.dtype("<f8") if averaged else tensor.dtype
                stop = start + tensor.elements * dtype.itemsize
                views[tensor.name] = np.frombuffer(numbers[start:stop], dtype)
                start = stop
    return views


def _add_scaled(total: Floats, values: Array, weight: float, scratch: Floats, *, first: bool) -> None:
    """Add the values times their weight; the first ones are written over what was there."""
    for start in range(0, values.size, _CHUNK):
        part, sum_ = values[start : start + _CHUNK], total[start : start + _CHUNK]
        scaled = sum_ if first else scratch[: part.size]
        np.multiply(part, weight, out=scaled, dtype=np.float64)
        if not first:
            np.add(sum_, scaled, out=sum_)


def checked(layout: Layout, body: memoryview) -> dict[str, Array]:
    """An update's tensors, after everything that can be wrong with them was looked at.

    Raises `update_malformed`, `update_mismatch` or `update_not_finite`, naming the tensor.
    """
    own = layout_of(body, layout)
    if own is not layout:
        found = {tensor.name: (tensor.dtype, tensor.shape) for tensor in own.tensors}
        if fault := mismatch(layout, found):
            raise FedotaError("update_mismatch", f"In the update {fault}. Return the tensors that `train` was given.")
    views = own.views(body)
    if (name := not_finite(views)) is not None:
        raise FedotaError(
            "update_not_finite",
            f"The update's tensor {name[:100]!r} holds NaN, infinity or a number too large to be summed. "
            "A smaller learning rate often helps.",
        )
    return views


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


# A strategy turns the sum into the next weights: it is given the weights that the round began with, the sum, and where
# to write the result. It raises nothing: its parameters were checked when it was chosen.
Strategy = Callable[[Mapping[str, Array], WeightedSum, Mapping[str, Array]], None]


def _fedavg(parameters: Mapping[str, float]) -> Strategy:
    """FedAvg (McMahan et al. 2017): the mean of the clients' weights by their examples."""
    if parameters:
        raise ValueError(f"fedavg takes no parameters, but was given {', '.join(sorted(parameters))}")

    def strategy(_: Mapping[str, Array], total: WeightedSum, out: Mapping[str, Array]) -> None:
        total.mean_into(out)

    return strategy


STRATEGIES: Final[dict[str, Callable[[Mapping[str, float]], Strategy]]] = {"fedavg": _fedavg}


def choose_strategy(name: str, parameters: Mapping[str, float]) -> Strategy:
    """The plan's strategy. Raises `ValueError` when there is none of that name, or a parameter is wrong."""
    if name not in STRATEGIES:
        raise ValueError(f"there is no strategy {name!r}; there are: {', '.join(sorted(STRATEGIES))}")
    return STRATEGIES[name](parameters)


def aggregate(strategy: Strategy, layout: Layout, base: memoryview, total: WeightedSum) -> memoryview:
    """The next checkpoint as a safetensors body with the model's own header."""
    body = room(layout.size)
    body[: len(layout.header)] = layout.header
    strategy(layout.views(base), total, layout.views(body))
    return body


def mean_metrics(reported: list[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """Each metric's mean by examples, over the clients that sent it: pairs of examples and metrics."""
    sums: dict[str, float] = {}
    weights: dict[str, int] = {}
    for examples, metrics in reported:
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + examples * value
            weights[name] = weights.get(name, 0) + examples
    means: dict[str, Any] = {name: sums[name] / weights[name] for name in sorted(sums)}
    return {name: value for name, value in means.items() if np.isfinite(value)}
