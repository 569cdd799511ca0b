"""The clients that wait to be selected, each in a long poll."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import islice
from types import MappingProxyType
from typing import Final, NamedTuple

MOST_WAITING: Final = 10_000
_NO_QUOTAS: Final[Mapping[str, int]] = MappingProxyType({})


class Waiting(NamedTuple):
    """A client by its organization and the name that it gave itself."""

    organization: str
    client: str


class Pool:
    """Who waits; `changed` is called when somebody comes or goes. A waiter's result is the ticket, or None."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._waiters: dict[Waiting, asyncio.Future[str | None]] = {}
        self._kept: dict[Waiting, str] = {}  # the cohort for which a waiter keeps an update
        self._came = asyncio.Event()
        self._organizations: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._waiters)

    def admits(self, who: Waiting) -> bool:
        """Whether a client may wait. In a full pool the organization with the most gives way to one with fewer.

        Clients name themselves: a single one may pose as so many that nobody else would get in.
        """
        if len(self._waiters) < MOST_WAITING or who in self._waiters:
            return True
        largest, most = self._organizations.most_common(1)[0]
        if self._organizations[who.organization] + 1 >= most:
            return False
        self._answer(next(one for one in self._waiters if one.organization == largest))
        return True

    @property
    def organizations(self) -> dict[str, int]:
        """How many wait, by their organization."""
        return dict(self._organizations)

    def _put(self, who: Waiting, waiter: "asyncio.Future[str | None]") -> None:
        if who not in self._waiters:
            self._organizations[who.organization] += 1
        self._waiters[who] = waiter

    def _take(self, who: Waiting) -> "asyncio.Future[str | None]":
        self._organizations[who.organization] -= 1
        if not self._organizations[who.organization]:
            del self._organizations[who.organization]
        self._kept.pop(who, None)
        return self._waiters.pop(who)

    async def wait(self, who: Waiting, seconds: float, kept: str = "") -> str | None:
        """The ticket of a client that was selected; None when it was not, for so long or because nobody will be.

        Who keeps an update for a cohort is not selected for it again: both would count.
        """
        if (before := self._waiters.get(who)) is not None and not before.done():
            before.set_result(None)  # it came again: its earlier connection is worth nothing
        waiter: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._put(who, waiter)
        self._kept[who] = kept
        self._came.set()
        self._changed()
        try:
            async with asyncio.timeout(seconds):
                return await waiter
        except TimeoutError:
            return waiter.result() if waiter.done() and not waiter.cancelled() else None
        finally:
            if self._waiters.get(who) is waiter:
                self._take(who)
                self._changed()

    async def gathered(self, count: int, seconds: float, quotas: Mapping[str, int] = _NO_QUOTAS) -> None:
        """Return when so many wait, or after so many seconds: clients come again between two long polls."""
        deadline = asyncio.get_running_loop().time() + seconds
        while self._available(quotas) < count and (left := deadline - asyncio.get_running_loop().time()) > 0:
            self._came.clear()
            try:
                await asyncio.wait_for(self._came.wait(), left)
            except TimeoutError:
                return

    def _available(self, quotas: Mapping[str, int]) -> int:
        if not quotas:
            return len(self._waiters)
        return sum(min(quota, self._organizations[name]) for name, quota in quotas.items())

    def select(
        self,
        count: int,
        ticket: Callable[[Waiting], str],
        quotas: Mapping[str, int] = _NO_QUOTAS,
        cohort: str = "",
    ) -> int:
        """Pick so many of those who wait for this cohort, at random, and give each a ticket; how many there were.

        Where there are quotas, no more of an organization than its own, and none of one that has none.
        """
        there = [
            who
            for who, waiter in self._waiters.items()
            if not waiter.done() and not (cohort and self._kept.get(who) == cohort)
        ]
        chosen = list(islice(_within(quotas, random.sample(there, len(there))), count))
        for who in chosen:
            self._take(who).set_result(ticket(who))
        self._changed()
        return len(chosen)

    def dismiss(self, organizations: Collection[str] | None = None) -> None:
        """Answer everybody, or those of some organizations: there is nothing for them to wait for."""
        for who in [who for who in self._waiters if organizations is None or who.organization in organizations]:
            self._answer(who)
        self._changed()

    def _answer(self, who: Waiting) -> None:
        """Let one go without a ticket."""
        waiter = self._take(who)
        if not waiter.done():
            waiter.set_result(None)


def _within(quotas: Mapping[str, int], people: Iterable[Waiting]) -> Iterator[Waiting]:
    """Those of them, in order, that their organizations' quotas let through."""
    left = dict(quotas)
    for who in people:
        if not quotas:
            yield who
        elif left.get(who.organization):
            left[who.organization] -= 1
            yield who
