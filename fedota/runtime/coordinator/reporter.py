"""Reports on their way: in order, numbered, each sent until it is answered, never in the training's way."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
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

    Changes of the stage are all told; of mere counts only the latest, about twice a second.
    """

    def __init__(self, send: Callable[[Report], Awaitable[object]], number: int) -> None:
        self._send = send
        self._number = number
        self._stages: deque[RoundUpdated] = deque()
        self._counts: RoundUpdated | None = None
        self._pushed = asyncio.Event()
        self._sent = 0.0

    @property
    def waiting(self) -> int:
        """How many reports are not told yet."""
        return len(self._stages) + (self._counts is not None)

    def tell(self, update: RoundUpdated) -> None:
        """A stage was entered: counts from before it are of no interest any more."""
        self._counts = None
        self._stages.append(update)
        self._pushed.set()

    def tell_counts(self, update: RoundUpdated) -> None:
        """Only counts changed, in the stage that was told last."""
        self._counts = update
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
                return self._stages.popleft()
            if self._counts is not None and (early := self._sent + _PACE - monotonic()) <= 0:
                update, self._counts = self._counts, None
                return update
            self._pushed.clear()
            try:
                await asyncio.wait_for(self._pushed.wait(), early if self._counts is not None else None)
            except TimeoutError:
                continue


def _complain(why: str) -> None:
    _log.warning("a report was not recorded yet", error=why)
