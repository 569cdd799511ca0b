"""The selectors' sums of one cohort, taken in as they come."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from fedota.errors import FedotaError
from fedota.events.rounds import Contribution
from fedota.runtime.aggregation import WeightedSum, mean_metrics, sum_size
from fedota.runtime.contributions import of_updates
from fedota.runtime.places import Memory, Spooled, room
from fedota.runtime.protocol import Accepted, Meta
from fedota.runtime.tensors import Layout

_LARGE: Final = 256 * 1024**2  # bytes from which on a second sum is not held in memory


class Collector:
    """One running total. No update is in it twice: tickets are unique, and a sum is refused that repeats one."""

    def __init__(self, layout: Layout, directory: Path) -> None:
        self.size = sum_size(layout)
        self._layout = layout
        self._directory = directory
        self.damaged = False  # whether the total may hold a part of a sum
        self._first = False  # whether memory was given for a sum that becomes the total
        self._lock = asyncio.Lock()
        self._closed = False
        self.total: WeightedSum | None = None
        self.accepted: dict[str, Accepted] = {}
        self.lives: dict[str, int] = {}

    @contextmanager
    def place(self) -> Iterator[Memory | Spooled]:
        """Where a sum is read to: the first where it stays; of others large ones into a file."""
        if self.size <= _LARGE or (self.total is None and not self._first):
            self._first = True
            try:
                yield Memory(room(self.size))
            finally:
                self._first = False  # it is the total now, or was lost on its way
            return
        file = Spooled.unlinked(self._directory, self.size)
        try:
            yield file
        finally:
            file.close()

    async def take(self, meta: Meta, numbers: Memory | Spooled) -> None:
        """Add a selector's sum; once more is harmless. Raises `conflict` when it holds an update that is in already."""
        async with self._lock:
            if self._closed:
                raise FedotaError("round_over", "The sum came too late.")
            if meta.life in self.lives:
                return
            if any(one.ticket in self.accepted for one in meta.accepted):
                raise FedotaError("conflict", "The sum holds an update that another selector's sum holds too.")
            examples = sum(one.examples for one in meta.accepted)
            try:
                await asyncio.to_thread(self._merge, numbers, examples, len(meta.accepted))
            except BaseException:  # in the middle, as far as one can know
                self.damaged = self._closed = True
                raise
            self.accepted |= {one.ticket: one for one in meta.accepted}
            self.lives[meta.life] = len(meta.accepted)

    async def close(self) -> WeightedSum:
        """The total, to which nothing is added any more. Raises `RuntimeError` when it may hold a part of a sum."""
        async with self._lock:
            self._closed = True
        self.require_whole()
        if self.total is None:
            raise RuntimeError("no sum was handed over")
        return self.total

    def require_whole(self) -> None:
        """Raise `RuntimeError` when the total may hold a part of a sum."""
        if self.damaged:
            raise RuntimeError("a sum could not be added as a whole: whoever comes next collects them anew")

    def _merge(self, numbers: Memory | Spooled, examples: int, count: int) -> None:
        if self.total is None and isinstance(numbers, Memory):
            self.total = WeightedSum(self._layout, numbers.view, examples, count)
            return
        total = self.total or WeightedSum(self._layout)
        total.merge(numbers, examples, count)
        self.total = total

    @property
    def participants(self) -> list[str]:
        """The organizations whose updates are in."""
        return sorted({one.organization for one in self.accepted.values()})

    @property
    def contributions(self) -> list[Contribution]:
        """What each organization gave to the total."""
        return of_updates(self.accepted.values())

    @property
    def metrics(self) -> dict[str, float]:
        """The clients' metrics, averaged by examples."""
        return mean_metrics([(one.examples, one.metrics) for one in self.accepted.values()])
