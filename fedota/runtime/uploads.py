"""Large bodies on their way in, and those whose connection broke before they were whole."""

import asyncio
from collections.abc import Collection, Iterator
from typing import Any, Final

from fedota.runtime.places import Memory, Spooled

_MOST_KEPT: Final = 64
_MOMENT: Final = 1.0  # seconds without a byte after which an upload must give way to a newer one of the same sender
_PARTING: Final = 5.0  # seconds, at most, that a connection which was broken off takes to end


class OffsetError(Exception):
    """A body does not go on where it broke off: `offset` bytes of it are here."""

    def __init__(self, offset: int) -> None:
        super().__init__(offset)
        self.offset = offset


class Upload:
    """A body on its way in. `whole` once all of it is here; `ended` when nothing more is done with it."""

    def __init__(self, transport: Any) -> None:
        self.place: Memory | Spooled | None = None
        self.whole = False
        self.ended = asyncio.Event()
        self._transport = transport

    @property
    def received(self) -> int:
        """How much of it is here."""
        return self.place.received if self.place else 0

    async def gives_way(self) -> bool:
        """Whether it has ended; one that has stalled is broken off for a newer one of the same sender."""
        before = self.received
        if await self._ends(_MOMENT):
            return True
        if not self.whole:
            if self.received != before:
                return False
            self.break_off()
        return await self._ends(_PARTING)

    def break_off(self) -> None:
        """Close its connection; what is whole needs it no more."""
        if not self.whole and self._transport is not None:
            self._transport.abort()

    async def _ends(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self.ended.wait(), seconds)
        except TimeoutError:
            return False
        return True


class Uploads:
    """By key (an update's ticket, a sum's life), each at most once on its way. What broke off is kept until `close`."""

    def __init__(self) -> None:
        self.receiving: dict[str, Upload] = {}
        self._kept: dict[str, Memory | Spooled] = {}
        self._over = False

    def received(self, key: str) -> int:
        """The bytes of a body that broke off."""
        kept = self._kept.get(key)
        return kept.received if kept else 0

    def places(self) -> Iterator[Memory | Spooled]:
        """Where bodies lie that are not whole, or were not taken yet."""
        yield from self._kept.values()
        for upload in self.receiving.values():
            if upload.place is not None:
                yield upload.place

    def keep(self, key: str, place: Memory | Spooled) -> None:
        """A body broke off: it may be gone on with. Of too many, the oldest is dropped."""
        self.forget(key)
        if self._over or not place.received:
            drop(place)
            return
        self._kept[key] = place
        if len(self._kept) > _MOST_KEPT:
            self.forget(next(iter(self._kept)))

    def taken(self, key: str) -> Memory | Spooled | None:
        """What there is of a body that broke off; it is the caller's from now on."""
        return self._kept.pop(key, None)

    def forget(self, key: str) -> None:
        """The beginning of a body is not needed any more."""
        if (kept := self._kept.pop(key, None)) is not None:
            drop(kept)

    def retain(self, keys: Collection[str]) -> None:
        """Nobody waits for others than these: they would only take places from those that are waited for."""
        for key, upload in self.receiving.items():
            if key not in keys:
                upload.break_off()
        for key in self._kept.keys() - set(keys):
            self.forget(key)

    def close(self) -> None:
        """Nobody waits for any of them, nor for one that breaks off from now on."""
        self._over = True
        self.retain(())


def drop(place: Memory | Spooled) -> None:
    """What is in a place is not needed any more."""
    if isinstance(place, Spooled):
        place.close()
