"""Reports on their way: in order, numbered, each sent until it is answered, never in the training's way."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
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
_FATAL: Final = frozenset({"report_refused"})
_log = structlog.get_logger(__name__)


class Reporter:
    """Sends reports, the first with the number after `number`.

    Changes of the stage are all told. Of mere counts only the latest are, about twice a second: `counts` gives them.
    """

    def __init__(
        self,
        send: Callable[[Report], Awaitable[object]],
        number: int,
        counts: Callable[[], RoundUpdated | None] = lambda: None,
    ) -> None:
        self._send = send
        self._number = number
        self._counts = counts
        self._stages: deque[RoundUpdated] = deque()
        self._changed = False
        self._last: RoundUpdated | None = None
        self._pushed = asyncio.Event()
        self._sent = 0.0

    @property
    def waiting(self) -> int:
        """How many reports are not told yet."""
        return len(self._stages) + self._changed

    def tell(self, update: RoundUpdated) -> None:
        """A stage was entered."""
        self._stages.append(update)
        self._pushed.set()

    def counts_changed(self) -> None:
        """Perhaps only counts changed, in the stage that was told last."""
        self._changed = True
        self._pushed.set()

    async def run(self) -> None:
        """Send. Raises `FedotaError` when a report is refused: nothing that follows it could be recorded."""
        while True:
            update = await self._next()
            self._number += 1
            report = Report(update=msgspec.structs.replace(update, report=self._number))

            async def attempt(report: Report = report) -> None:
                await self._send(report)

            await insist(attempt, retried=(FedotaError, msgspec.DecodeError), fatal=_FATAL, trouble=_complain)
            self._sent = monotonic()

    async def _next(self) -> RoundUpdated:
        while True:
            if self._stages:
                self._last = self._stages.popleft()
                return self._last
            early = self._sent + _PACE - monotonic()
            if self._changed and early <= 0:
                self._changed = False
                if (update := self._counts()) is not None and not _same(update, self._last):
                    self._last = update
                    return update
            self._pushed.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._pushed.wait(), max(0.0, early) if self._changed else None)


def _same(one: RoundUpdated, other: RoundUpdated | None) -> bool:
    """Whether nothing but time has passed between two reports."""
    return other is not None and msgspec.structs.replace(one, seconds=other.seconds) == other


def _complain(why: str) -> None:
    _log.warning("a report was not recorded yet", error=why)
