"""The selectors' sums of one cohort, taken in as they come."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, NamedTuple

from fedota.errors import FedotaError
from fedota.events.rounds import Contribution
from fedota.runtime.aggregation import WeightedSum, mean_metrics, sum_size
from fedota.runtime.contributions import of_updates
from fedota.runtime.places import Memory, Spooled
from fedota.runtime.protocol import Accepted, Meta
from fedota.runtime.rooms import Rooms
from fedota.runtime.tensors import Layout
from fedota.runtime.uploads import Uploads, drop

_LARGE: Final = 256 * 1024**2  # bytes from which on a second sum is not held in memory


class Handing(NamedTuple):
    """A sum that is being handed over. `name` is the SHA-256 of the `before` bytes that come before its numbers.

    Those say whose it is, for which collection, and which updates are in it: sums of one name have the same numbers.
    """

    meta: Meta
    name: str
    before: int


class _Whole(NamedTuple):
    """A sum whose numbers are all here."""

    numbers: Memory | Spooled
    examples: int
    updates: int


class Collector:
    """One running total. No update is in it twice: tickets are unique, and a sum is refused that repeats one.

    What broke off on its way is in `parts`, by life, as is what still comes; `sums` tells what it is a part of. Memory
    is taken from `rooms`.
    """

    def __init__(self, layout: Layout, directory: Path, rooms: Rooms | None = None) -> None:
        self.size = sum_size(layout)
        self._layout = layout
        self._directory = directory
        self._rooms = rooms or Rooms()
        self.damaged = False  # whether the total may hold a part of a sum
        self._lock = asyncio.Lock()
        self._closed = False
        self._given_up = False
        self._waiting: list[_Whole] = []
        self.total: WeightedSum | None = None
        self.accepted: dict[str, Accepted] = {}
        self.lives: dict[str, int] = {}
        self.parts = Uploads()
        self.sums: dict[str, Handing] = {}

    def place(self) -> Memory | Spooled:
        """Where a sum is read to: the first where it stays; of others large ones into a file."""
        if self.size <= _LARGE or (self.total is None and not self._is_filled()):
            return Memory(self._rooms.room(self.size))
        return Spooled.unlinked(self._directory, self.size)

    def _is_filled(self) -> bool:
        """Whether a large sum that becomes the total is not whole yet: there is no memory for another one."""
        return self.size > _LARGE and any(isinstance(place, Memory) for place in self.parts.places())

    async def keep(self, life: str, place: Memory | Spooled) -> None:
        """A sum broke off. A large one stays where it lies; small ones may be many, and go into files."""
        if isinstance(place, Memory) and self.size <= _LARGE and place.received:
            place = await asyncio.to_thread(self._in_file, place)
        self.parts.keep(life, place)

    def _in_file(self, place: Memory) -> Spooled:
        file = Spooled.unlinked(self._directory, self.size)
        try:
            file.copy(place.read(0, place.received))
        except BaseException:
            file.close()
            raise
        return file

    async def take(self, meta: Meta, numbers: Memory | Spooled) -> None:
        """Add a selector's sum, which is the collector's then; once more is harmless.

        Raises `conflict` when it holds an update that is in already, `round_over` when it comes too late.
        """
        async with self._alone():
            if self._closed:
                raise FedotaError("round_over", "The sum came too late.")
            if meta.life in self.lives:
                drop(numbers)
                return
            if any(one.ticket in self.accepted for one in meta.accepted):
                raise FedotaError("conflict", "The sum holds an update that another selector's sum holds too.")
            whole = _Whole(numbers, sum(one.examples for one in meta.accepted), len(meta.accepted))
            self._waiting.insert(0 if isinstance(numbers, Memory) else len(self._waiting), whole)
            # One in a file that comes before the one that has the memory waits for it there: it may take its time.
            if isinstance(numbers, Memory) or self.total is not None or not self._is_filled():
                await self._add()
            self.accepted |= {one.ticket: one for one in meta.accepted}
            self.lives[meta.life] = len(meta.accepted)

    async def close(self) -> WeightedSum:
        """The total, to which nothing is added any more. Raises `RuntimeError` when it may hold a part of a sum."""
        async with self._alone():
            self._closed = True
            self.parts.close()
            if not self.damaged:
                await self._add()
        self.require_whole()
        if self.total is None:
            raise RuntimeError("no sum was handed over")
        return self.total

    def require_whole(self) -> None:
        """Raise `RuntimeError` when the total may hold a part of a sum."""
        if self.damaged:
            raise RuntimeError("a sum could not be added as a whole: whoever comes next collects them anew")

    def give_up(self) -> None:
        """Nobody wants the total: what is here, and what still comes, is dropped."""
        self._closed = self._given_up = True
        self.parts.close()
        if not self._lock.locked():
            self._forget()

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        async with self._lock:
            try:
                yield
            finally:
                if self._given_up:
                    self._forget()

    def _forget(self) -> None:
        for one in self._waiting:
            drop(one.numbers)
        self._waiting.clear()

    async def _add(self) -> None:
        """Add what waits."""
        try:
            await asyncio.to_thread(self._merge)
        except BaseException:  # in the middle, as far as one can know
            self.damaged = self._closed = True
            raise

    def _merge(self) -> None:
        while self._waiting:
            numbers, examples, updates = self._waiting[0]
            if self.total is None and isinstance(numbers, Memory):
                self.total = WeightedSum(self._layout, numbers.view, examples, updates)
            else:
                total = self.total or WeightedSum(self._layout)
                total.merge(numbers, examples, updates)
                self.total = total
            del self._waiting[0]
            drop(numbers)

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
