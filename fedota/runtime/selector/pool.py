"""The clients that wait to be selected, each in a long poll."""

import asyncio
import random
from collections.abc import Callable, Collection
from typing import Final, NamedTuple

MOST_WAITING: Final = 10_000


class Waiting(NamedTuple):
    """A client by its organization and the name that it gave itself."""

    organization: str
    client: str


class Pool:
    """Who waits; `changed` is called when somebody comes or goes. A waiter's result is the ticket, or None."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._waiters: dict[Waiting, asyncio.Future[str | None]] = {}
        self._came = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiters)

    async def wait(self, who: Waiting, seconds: float) -> str | None:
        """The ticket of a client that was selected; None when it was not, for so long or because nobody will be."""
        if (before := self._waiters.get(who)) is not None and not before.done():
            before.set_result(None)  # it came again: its earlier connection is worth nothing
        waiter: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._waiters[who] = waiter
        self._came.set()
        self._changed()
        try:
            async with asyncio.timeout(seconds):
                return await waiter
        except TimeoutError:
            return waiter.result() if waiter.done() and not waiter.cancelled() else None
        finally:
            if self._waiters.get(who) is waiter:
                del self._waiters[who]
                self._changed()

    async def gathered(self, count: int, seconds: float) -> None:
        """Return when so many wait, or after so many seconds: clients come again between two long polls."""
        deadline = asyncio.get_running_loop().time() + seconds
        while len(self._waiters) < count and (left := deadline - asyncio.get_running_loop().time()) > 0:
            self._came.clear()
            try:
                await asyncio.wait_for(self._came.wait(), left)
            except TimeoutError:
                return

    def select(self, count: int, ticket: Callable[[Waiting], str]) -> int:
        """Pick so many of those who wait, at random, and give each a ticket; how many there were."""
        there = [who for who, waiter in self._waiters.items() if not waiter.done()]
        chosen = random.sample(there, min(count, len(there)))
        for who in chosen:
            self._waiters.pop(who).set_result(ticket(who))
        self._changed()
        return len(chosen)

    def dismiss(self, organizations: Collection[str] | None = None) -> None:
        """Answer everybody, or those of some organizations: there is nothing for them to wait for."""
        for who in [who for who in self._waiters if organizations is None or who.organization in organizations]:
            waiter = self._waiters.pop(who)
            if not waiter.done():
                waiter.set_result(None)
        self._changed()
