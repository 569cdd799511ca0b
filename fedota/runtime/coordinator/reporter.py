"""Reports on their way: in order, numbered, each sent until it is answered, never in the training's way."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from time import monotonic
from typing import Final

import msgspec
import structlog

from fedota.contracts.runtime import Report
from fedota.errors import FedotaError
from fedota.events.rounds import RoundUpdated
from fedota.runtime.coordinator.platform import insist

_PACE: Final = 0.5  # seconds between reports of mere counts
REFUSED: Final = frozenset({"report_refused"})  # codes; asking again would change nothing
_log = structlog.get_logger(__name__)


class Reporter:
    """Sends reports, the first with the number after `number`.

    Changes of the stage are all told. Of mere counts only the latest are, about twice a second: `counts` gives them.
    A report that is `held` waits, and those after it wait with it; `meanwhile` gives what can be told instead.

    What must outlive a crash is given to `keep` before it counts: all reports that are not recorded, from the one that
    is being sent to the last that ends an attempt. What comes after that is told anew by whoever begins there.
    """

    def __init__(
        self,
        send: Callable[[Report], Awaitable[object]],
        number: int,
        *,
        counts: Callable[[], RoundUpdated | None] = lambda: None,
        held: Callable[[RoundUpdated], bool] = lambda _: False,
        meanwhile: Callable[[RoundUpdated], RoundUpdated | None] = lambda _: None,
        keep: Callable[[Sequence[RoundUpdated]], None] = lambda _: None,
    ) -> None:
        self._send = send
        self._number = number  # of the report that was recorded last
        self._counts = counts
        self._held = held
        self._meanwhile = meanwhile
        self._keep = keep
        self._queue: deque[RoundUpdated] = deque()
        self._changed = False
        self._last: RoundUpdated | None = None
        self._pushed = asyncio.Event()
        self._sent = 0.0

    @property
    def number(self) -> int:
        """Of the report that was recorded last."""
        return self._number

    @property
    def waiting(self) -> int:
        """How many reports are not told yet."""
        return len(self._queue) + self._changed

    def tell(self, updates: Sequence[RoundUpdated]) -> None:
        """Stages were entered."""
        new = _numbered(updates, self._number + len(self._queue) + 1)
        if any(_ends_attempt(update) for update in new):
            self._keep(_kept([*self._queue, *new]))
        self._queue.extend(new)
        self._pushed.set()

    def restore(self, updates: Sequence[RoundUpdated]) -> None:
        """These were kept in an earlier life; the first of them comes next."""
        self._queue.extend(updates)
        self._pushed.set()

    def counts_changed(self) -> None:
        """Perhaps only counts changed, in the stage that was told last."""
        self._changed = True
        self._pushed.set()

    def look_again(self) -> None:
        """Perhaps the report that comes next is not held any more, or something else can be told meanwhile."""
        self._pushed.set()

    async def run(self) -> None:
        """Send. Raises `FedotaError` when a report is refused: nothing that follows it could be recorded."""
        while True:
            report = Report(update=await self._next())

            async def attempt(report: Report = report) -> None:
                await self._send(report)

            await insist(attempt, retried=(FedotaError, msgspec.DecodeError), fatal=REFUSED, trouble=_complain)
            self._last = self._queue.popleft()
            self._number = self._last.report
            self._sent = monotonic()

    async def _next(self) -> RoundUpdated:
        """The first of the queue, once it may be sent. It stays there until it is recorded."""
        while True:
            self._pushed.clear()
            is_held = bool(self._queue) and self._held(self._queue[0])
            if self._queue and not is_held:
                return self._queue[0]
            early = self._sent + _PACE - monotonic()
            wanted = is_held or self._changed
            if wanted and early <= 0 and (update := self._in_between()) is not None:
                self._put_first(update)
                return self._queue[0]
            with suppress(TimeoutError):
                await asyncio.wait_for(self._pushed.wait(), early if wanted and early > 0 else None)

    def _in_between(self) -> RoundUpdated | None:
        """What can be told before the next stage is, if it is new."""
        if self._queue:
            update = self._meanwhile(self._queue[0])
        else:
            self._changed, update = False, self._counts()
        return None if update is None or _same(update, self._last) else update

    def _put_first(self, update: RoundUpdated) -> None:
        """All that is in the queue comes one later."""
        following = _numbered([update, *self._queue], self._number + 1)
        if kept := _kept(following):
            self._keep(kept)
        self._queue = deque(following)


def _numbered(updates: Sequence[RoundUpdated], first: int) -> list[RoundUpdated]:
    return [msgspec.structs.replace(update, report=number) for number, update in enumerate(updates, first)]


def _ends_attempt(update: RoundUpdated) -> bool:
    return update.stage in ("completed", "abandoned")


def _kept(updates: Sequence[RoundUpdated]) -> list[RoundUpdated]:
    """Up to the last that ends an attempt."""
    count = max((number for number, update in enumerate(updates, 1) if _ends_attempt(update)), default=0)
    return list(updates[:count])


def _same(one: RoundUpdated, other: RoundUpdated | None) -> bool:
    """Whether nothing but time has passed between two reports."""
    return other is not None and msgspec.structs.replace(one, seconds=other.seconds, report=other.report) == other


def _complain(why: str) -> None:
    _log.warning("a report was not recorded yet", error=why)
