"""How updates come in: each in its turn, by one connection at a time, and counted or refused as a whole."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final

import structlog
from aiohttp import web

from fedota.errors import FedotaError
from fedota.process import Service
from fedota.runtime.aggregation import checked
from fedota.runtime.portions import Portions
from fedota.runtime.receiving import held_back, invite, read_body
from fedota.runtime.selector.cohort import Cohort, SumLostError, already_reported
from fedota.runtime.selector.crowding import Crowding
from fedota.runtime.selector.headers import AHEAD, Sent, ahead_of, sent_with
from fedota.runtime.selector.selecting import Selecting
from fedota.runtime.selector.spool import MOST_UPLOADS, Spool
from fedota.runtime.selector.turns import Turns
from fedota.runtime.tickets import Ticket
from fedota.runtime.uploads import OffsetError, Upload

_QUEUE: Final = 20.0  # seconds that an update waits for its turn
_WAIT: Final = 40.0  # seconds, of all that it waits for before it is asked for
_MOST_AHEAD: Final = 64 * AHEAD  # bytes, of all that wait for their turn
_ELSEWHERE: Final = (
    "Send the update to the selector that gave you its ticket. This one takes it once that one is known to be gone."
)
_log = structlog.get_logger(__name__)


class Reporting:
    """Takes updates for the cohort that is going on."""

    def __init__(self, selecting: Selecting, service: Service) -> None:
        self._selecting = selecting
        self._uploads = 0
        self._ahead = Portions(_MOST_AHEAD)  # bytes, at most, that came of those who wait for their turn
        self._turns = Turns(MOST_UPLOADS)
        self._waiting: dict[str, asyncio.Timeout] = {}  # by ticket, the one request that waits
        self._crowding = Crowding()
        self._tasks: set[asyncio.Task[None]] = set()
        self._accepted = service.add_counter("updates_accepted", "Updates that were added to a sum")
        service.add_gauge("uploads", "Updates that are on their way in", lambda: self._uploads)

    async def take(self, request: web.Request, ticket: Ticket, cohort: Cohort) -> int | None:
        """Read an update and count it. When it is not whole by its own words: the bytes that are here.

        Everything that can be refused without reading the body is refused before.
        """
        cohort.require_open(ticket)
        spool = self._selecting.spool
        assert spool is not None
        sent = sent_with(request, spool.size)
        with self._counted_ahead(request, ticket, cohort), held_back(request):
            async with self._only_one_waiting(ticket, cohort):
                await self.require_alone(cohort, ticket)
                await self._require_claim(ticket, cohort)
                await self._take_turn(ticket, cohort)
                try:
                    upload = self._begin(request, ticket, cohort, sent)
                except BaseException:
                    self._turns.give_back(ticket.organization)
                    raise
        return await self._read(request, spool, ticket, cohort, sent, upload)

    @contextmanager
    def _counted_ahead(self, request: web.Request, ticket: Ticket, cohort: Cohort) -> Iterator[None]:
        """Only so much may come of those who wait; of who holds the body back nothing does."""
        ahead, organization = ahead_of(request), ticket.organization
        if ahead and not self._ahead.admits(organization, ahead):
            raise self._crowded(cohort)
        self._ahead.take(organization, ahead)
        try:
            yield
        finally:
            self._ahead.give_back(organization, ahead)

    @asynccontextmanager
    async def _only_one_waiting(self, ticket: Ticket, cohort: Cohort) -> AsyncIterator[None]:
        """Of the requests with one ticket the latest waits: else a single client would be the whole queue."""
        if (older := self._waiting.get(ticket.id)) is not None and not older.expired():
            older.reschedule(0)
        waiting = self._waiting[ticket.id] = asyncio.timeout(_WAIT)
        try:
            async with waiting:
                yield
        except TimeoutError:
            if self._waiting.get(ticket.id) is not waiting:
                raise already_reported() from None
            raise self._crowded(cohort) from None
        finally:
            if self._waiting.get(ticket.id) is waiting:
                del self._waiting[ticket.id]

    async def _take_turn(self, ticket: Ticket, cohort: Cohort) -> None:
        """Return when the update may come: each in its turn."""
        try:
            async with asyncio.timeout(_QUEUE):
                await self._turns.take(ticket.organization)
        except TimeoutError:
            raise self._crowded(cohort) from None

    def _crowded(self, cohort: Cohort) -> FedotaError:
        left = (cohort.selected or 0) - len(cohort.accepted) - self._uploads
        again = random.randint(1, self._crowding.seconds(left))  # noqa: S311 - only spreads the attempts
        return FedotaError("unavailable", "Too many updates come at once. Send it again.", retry_after=again)

    def _begin(self, request: web.Request, ticket: Ticket, cohort: Cohort, sent: Sent) -> Upload:
        """An update is on its way from now on, until `_end`."""
        cohort.require_open(ticket)
        uploads = cohort.uploads
        if ticket.id in uploads.receiving:
            raise already_reported()
        if request.method == "PATCH":
            if sent.offset != (received := uploads.received(ticket.id)):
                raise OffsetError(received)
        else:
            uploads.forget(ticket.id)
        upload = uploads.receiving[ticket.id] = Upload(request.transport)
        if not self._uploads:
            self._crowding.begins(time.monotonic())
        self._uploads += 1
        return upload

    async def require_alone(self, cohort: Cohort, ticket: Ticket) -> None:
        """Raise while the update comes by another connection that lives."""
        upload = cohort.uploads.receiving.get(ticket.id)
        if upload is None:
            return
        if not await upload.gives_way():
            raise already_reported()
        cohort.require_open(ticket)

    async def _read(
        self, request: web.Request, spool: Spool, ticket: Ticket, cohort: Cohort, sent: Sent, upload: Upload
    ) -> int | None:
        uploads = cohort.uploads
        try:
            upload.place = uploads.taken(ticket.id) or await spool.place()
            await invite(request)
            await read_body(request, upload.place)
        except BaseException as error:
            keep = not isinstance(error, FedotaError) or error.problem.code == "timeout"
            self._beside(self._set_aside(spool, ticket, cohort, upload, keep=keep))
            raise
        if sent.length is not None and upload.received < sent.length:
            await asyncio.shield(self._beside(self._set_aside(spool, ticket, cohort, upload, keep=True)))
            return uploads.received(ticket.id)
        # From here on the client may go: what works on its place must end before another update comes into it.
        upload.whole = True
        await asyncio.shield(self._beside(self._count(spool, ticket, cohort, upload, sent)))
        return None

    def _end(self, ticket: Ticket, cohort: Cohort, upload: Upload) -> None:
        """Nothing of this update is on its way any more."""
        self._uploads -= 1
        self._turns.give_back(ticket.organization)
        del cohort.uploads.receiving[ticket.id]
        upload.ended.set()

    async def _set_aside(self, spool: Spool, ticket: Ticket, cohort: Cohort, upload: Upload, *, keep: bool) -> None:
        """An update broke off. Its connection is gone, and its place may be needed."""
        try:
            if upload.place is not None and keep and upload.received:
                cohort.uploads.keep(ticket.id, await spool.kept(upload.place))
            elif upload.place is not None:
                spool.release(upload.place)
        finally:
            self._end(ticket, cohort, upload)

    async def _require_claim(self, ticket: Ticket, cohort: Cohort) -> None:
        if ticket.life == self._selecting.life or ticket.id in cohort.claimed:
            return
        match await self._selecting.claim(cohort, ticket):
            case "wait":
                raise FedotaError("unavailable", _ELSEWHERE, retry_after=1)
            case "taken" | "counted":
                raise already_reported("Another selector has this update in its sum; it counts once.")
            case "over" | "left_out":
                raise FedotaError("round_over", "The round takes no more updates. Check in for the next one.")

    def _beside(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Work that is done whether or not anybody waits for it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) and not isinstance(error, FedotaError):
            _log.error("an update was lost", exc_info=error)  # whoever waited for it may have gone

    async def _count(self, spool: Spool, ticket: Ticket, cohort: Cohort, upload: Upload, sent: Sent) -> None:
        place = upload.place
        assert place is not None
        try:
            update = await asyncio.to_thread(checked, cohort.layout, place)
            require = self._selecting.require_participation
            try:
                await cohort.count(ticket, update, sent.examples, sent.metrics, require)
            except SumLostError as error:
                _log.error("a sum was lost", exc_info=error)
                if self._selecting.cohort is cohort:  # else it is over, and its sum of no more use
                    self._selecting.begin_again()
                raise FedotaError("unavailable", "The selector lost its sum. Send the update again.") from None
        finally:
            spool.release(place)
            self._end(ticket, cohort, upload)
        self._accepted.inc()
        self._crowding.taken(time.monotonic())
        self._selecting.changed()
