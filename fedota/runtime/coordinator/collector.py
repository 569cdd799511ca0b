"""The selectors' sums of one cohort, taken in as they come."""

import asyncio

from fedota.errors import FedotaError
from fedota.runtime.aggregation import WeightedSum, mean_metrics
from fedota.runtime.protocol import Accepted, Meta
from fedota.runtime.tensors import Layout


class Collector:
    """One running total. No update is in it twice: tickets are unique, and a sum is refused that repeats one."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._lock = asyncio.Lock()
        self._closed = False
        self.total: WeightedSum | None = None
        self.accepted: dict[str, Accepted] = {}
        self.lives: dict[str, int] = {}

    async def take(self, meta: Meta, numbers: memoryview) -> None:
        """Add a selector's sum; once more is harmless. Raises `conflict` when it holds an update that is in already."""
        async with self._lock:
            if self._closed:
                raise FedotaError("round_over", "The sum came too late.")
            if meta.life in self.lives:
                return
            if any(one.ticket in self.accepted for one in meta.accepted):
                raise FedotaError("conflict", "The sum holds an update that another selector's sum holds too.")
            examples = sum(one.examples for one in meta.accepted)
            await asyncio.to_thread(self._merge, numbers, examples, len(meta.accepted))
            self.accepted |= {one.ticket: one for one in meta.accepted}
            self.lives[meta.life] = len(meta.accepted)

    async def close(self) -> WeightedSum:
        """The total, to which nothing is added any more."""
        async with self._lock:
            self._closed = True
        if self.total is None:
            raise RuntimeError("no sum was handed over")
        return self.total

    def _merge(self, numbers: memoryview, examples: int, count: int) -> None:
        if self.total is None:
            self.total = WeightedSum(self._layout, numbers, examples, count)
        else:
            self.total.merge(numbers, examples, count)

    @property
    def participants(self) -> list[str]:
        """The organizations whose updates are in."""
        return sorted({one.organization for one in self.accepted.values()})

    @property
    def metrics(self) -> dict[str, float]:
        """The clients' metrics, averaged by examples."""
        return mean_metrics([(one.examples, one.metrics) for one in self.accepted.values()])
