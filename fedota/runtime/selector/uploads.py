"""One cohort's updates on their way in, and those whose connection broke before they were whole."""

import asyncio
from typing import Any, Final

from fedota.runtime.places import Memory, Spooled

_MOST_KEPT: Final = 64
_MOMENT: Final = 1.0  # seconds without a byte after which an upload must give way to a newer one of the same ticket
_PARTING: Final = 5.0  # seconds, at most, that a connection which was broken off takes to end


class Upload:
    """An update on its way in. `whole` once all of it is here; `ended` when nothing more is done with it."""

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
        """Whether it has ended; one that has stalled is broken off for a newer one of the same client."""
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
    """By ticket, each at most once on its way. What broke off is kept until its cohort is over."""

    def __init__(self) -> None:
        self.receiving: dict[str, Upload] = {}
        self._kept: dict[str, Spooled] = {}
        self._over = False

    def received(self, ticket: str) -> int:
        """The bytes of an update that broke off."""
        kept = self._kept.get(ticket)
        return kept.received if kept else 0

    def keep(self, ticket: str, file: Spooled) -> None:
        """An update broke off: it may be gone on with. Of too many, the oldest is dropped."""
        self.forget(ticket)
        if self._over or not file.received:
            file.close()
            return
        self._kept[ticket] = file
        if len(self._kept) > _MOST_KEPT:
            self.forget(next(iter(self._kept)))

    def taken(self, ticket: str) -> Spooled | None:
        """What there is of an update that broke off; it is the caller's from now on."""
        return self._kept.pop(ticket, None)

    def forget(self, ticket: str) -> None:
        """The beginning of an update is not needed any more."""
        if (kept := self._kept.pop(ticket, None)) is not None:
            kept.close()

    def close(self) -> None:
        """The cohort is over: what still comes for it would only take places from the next one's."""
        self._over = True
        for upload in self.receiving.values():
            upload.break_off()
        for ticket in list(self._kept):
            self.forget(ticket)
