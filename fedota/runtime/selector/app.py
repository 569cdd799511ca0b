"""The selector's composition, and what it answers to clients."""

import asyncio
import math
import random
import re
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import structlog
from aiohttp import web

from fedota.contracts import participation
from fedota.contracts.runtime import SelectorSettings
from fedota.errors import FedotaError
from fedota.process import Service, attach
from fedota.runtime.aggregation import checked
from fedota.runtime.portions import Portions
from fedota.runtime.protocol import (
    BYTES,
    CHECK_IN,
    CLIENT,
    EXAMPLES,
    METRICS,
    METRICS_LIMIT,
    MODELS,
    MOST_EXAMPLES,
    MOST_METRICS,
    OFFSET,
    TICKET,
    UPDATES,
    WHOLE,
    Metrics,
    Received,
)
from fedota.runtime.receiving import ONLY_TENSORS, expects, held_back, invite, read_body, unhurried
from fedota.runtime.selector.cohort import Cohort, SumLostError, already_reported
from fedota.runtime.selector.crowding import Crowding
from fedota.runtime.selector.pool import Waiting
from fedota.runtime.selector.selecting import Selecting
from fedota.runtime.selector.spool import MOST_UPLOADS, Spool
from fedota.runtime.selector.turns import Turns
from fedota.runtime.sending import send_file
from fedota.runtime.tickets import Ticket
from fedota.runtime.uploads import OffsetError, Upload
from fedota.runtime.web import bearer, goes_on_at, json_response, problems

SERVER: Final[dict[str, Any]] = {
    "handler_cancellation": True,  # a client that goes away must not be selected: its request ends with its connection
    "read_bufsize": 1 << 14,  # bytes of a body that may wait for us in memory, for each connection
}
_CLIENT: Final = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_NUMBER: Final = re.compile(r"[0-9]{1,10}", re.ASCII)
_QUEUE: Final = 20.0  # seconds that an update waits for its turn
_WAIT: Final = 40.0  # seconds, of all that it waits for before it is asked for
_AHEAD: Final = 1 << 18  # bytes that the event loop may read of a body before it is wanted
_MOST_AHEAD: Final = 64 * _AHEAD  # of all that wait for their turn
# Said to one client about the way there, not about its update: no refusal of the round.
_PASSING: Final = frozenset({"unavailable", "internal_error", "offset_mismatch", "already_reported"})
_ELSEWHERE: Final = (
    "Send the update to the selector that gave you its ticket. This one takes it once that one is known to be gone."
)
_GONE: Final = "These weights are not in use now. Check in for the present round."
_log = structlog.get_logger(__name__)


class _Sent(NamedTuple):
    """What comes with an update: where its bytes go on, and how many there are in all, where that is known."""

    offset: int
    length: int | None
    examples: int
    metrics: dict[str, float]


class Doors:
    """What clients may ask of a selector."""

    def __init__(self, settings: SelectorSettings, selecting: Selecting, service: Service) -> None:
        self._settings = settings
        self._selecting = selecting
        self._uploads = 0
        self._ahead = Portions(_MOST_AHEAD)  # bytes, at most, that came of those who wait for their turn
        self._turns = Turns(MOST_UPLOADS)
        self._waiting: dict[str, asyncio.Timeout] = {}  # by ticket, the one request that waits
        self._crowding = Crowding()
        self._tasks: set[asyncio.Task[None]] = set()
        self._accepted = service.add_counter("updates_accepted", "Updates that were added to a sum")
        self._refused = service.add_counter("refusals", "Requests of clients that were refused", ("code",))
        service.add_gauge("clients_waiting", "Clients that wait to be selected", lambda: len(selecting.pool))
        service.add_gauge("uploads", "Updates that are on their way in", lambda: self._uploads)
        service.add_gauge("coordinator_connected", "Whether the coordinator answers", lambda: selecting.connected)

    def routes(self) -> list[web.RouteDef]:
        """The addresses."""
        return [
            web.post(CHECK_IN, self.check_in),
            web.get(MODELS, self.model),
            web.post(UPDATES, self.update, expect_handler=unhurried),
            web.patch(UPDATES, self.update, expect_handler=unhurried),
            web.head(UPDATES, self.offset),
        ]

    async def check_in(self, request: web.Request) -> web.Response:
        """A client is here; the answer comes when there is something for it to do."""
        if request.can_read_body:  # it would be kept in memory as long as its client waits
            raise FedotaError("too_large", "A check-in has no body. Send it without.")
        who = Waiting(self._organization(request), _client(request))
        ticket = None
        if text := request.headers.get(TICKET):
            try:
                ticket = self._selecting.tickets.read(text, who.organization)
            except FedotaError as error:  # of an earlier run, say: the client is welcome without it
                self._refused.labels(error.problem.code).inc()
        return json_response(await self._selecting.check_in(who, ticket))

    async def model(self, request: web.Request) -> web.StreamResponse:
        """The weights that a round begins with."""
        organization, sha256 = self._organization(request), request.match_info["sha256"]
        if not self._selecting.has_model(sha256):
            raise FedotaError("not_found", _GONE)
        response = await send_file(request, self._selecting.model_file(sha256), sha256, gone=_GONE, to=organization)
        if request.method == "GET" and _reaches_the_end(response):
            self._selecting.has_sent(sha256, Waiting(organization, request.headers.get(CLIENT, "")))
        return response

    async def update(self, request: web.Request) -> web.Response:
        """A client's update, or the rest of one that broke off: counted, or refused with the reason."""
        organization = self._organization(request)
        cohort: Cohort | None = None
        try:
            ticket = self._ticket(request, organization)
            cohort = self._cohort(ticket)
            received = await self._take(request, ticket, cohort)
        except OffsetError as error:
            self._refused.labels("offset_mismatch").inc()
            return goes_on_at(error.offset, "The selector has {} bytes of this update.")
        except FedotaError as error:
            refusal = _in_full(request, error)
            self._note(organization, cohort, refusal)
            raise refusal from None
        if received is not None:  # the request was to bring no more than this
            return web.Response(status=204, headers={OFFSET: str(received)})
        return json_response(Received(round=ticket.round, attempt=ticket.attempt))

    async def offset(self, request: web.Request) -> web.Response:
        """How much of an update is here."""
        organization = self._organization(request)
        try:
            ticket = self._ticket(request, organization)
            cohort = self._cohort(ticket)
            cohort.require_open(ticket)
            await self._require_alone(cohort, ticket)
        except FedotaError as error:
            self._refused.labels(error.problem.code).inc()
            raise
        return web.Response(status=204, headers={OFFSET: str(cohort.uploads.received(ticket.id))})

    def _organization(self, request: web.Request) -> str:
        try:
            organization = participation.verify(self._settings.token_key, bearer(request), self._settings.problem_id)
            self._selecting.require_participation(organization)
        except FedotaError as error:
            self._refused.labels(error.problem.code).inc()
            raise
        return organization

    def _ticket(self, request: web.Request, organization: str) -> Ticket:
        return self._selecting.tickets.read(request.headers.get(TICKET), organization)

    def _cohort(self, ticket: Ticket) -> Cohort:
        cohort = self._selecting.cohort
        if cohort is None or cohort.id != ticket.cohort:
            if self._selecting.unsure(ticket):
                raise FedotaError("unavailable", "The selector is coming up. Send the update again.", retry_after=1)
            if self._selecting.counts(ticket):
                raise already_reported()
            raise FedotaError("round_over", "The round that this update is for is over. Check in for the next one.")
        return cohort

    def _note(self, organization: str, cohort: Cohort | None, error: FedotaError) -> None:
        code = error.problem.code
        self._refused.labels(code).inc()
        if code in _PASSING:
            return
        _log.info("update refused", organization=organization, code=code, detail=error.problem.detail)
        if (cohort := cohort or self._selecting.cohort) is not None and not cohort.handed:
            cohort.refuse(organization, error)
            self._selecting.changed()

    async def _take(self, request: web.Request, ticket: Ticket, cohort: Cohort) -> int | None:
        """Read an update and count it. When it is not whole by its own words: the bytes that are here.

        Everything that can be refused without reading the body is refused before.
        """
        cohort.require_open(ticket)
        spool = self._selecting.spool
        assert spool is not None
        sent = _sent(request, spool)
        with self._counted_ahead(request, ticket, cohort), held_back(request):
            async with self._only_one_waiting(ticket, cohort):
                await self._require_alone(cohort, ticket)
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
        ahead, organization = _ahead(request), ticket.organization
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

    def _begin(self, request: web.Request, ticket: Ticket, cohort: Cohort, sent: _Sent) -> Upload:
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

    async def _require_alone(self, cohort: Cohort, ticket: Ticket) -> None:
        """Raise while the update comes by another connection that lives."""
        upload = cohort.uploads.receiving.get(ticket.id)
        if upload is None:
            return
        if not await upload.gives_way():
            raise already_reported()
        cohort.require_open(ticket)

    async def _read(
        self, request: web.Request, spool: Spool, ticket: Ticket, cohort: Cohort, sent: _Sent, upload: Upload
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

    async def _count(self, spool: Spool, ticket: Ticket, cohort: Cohort, upload: Upload, sent: _Sent) -> None:
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


def create_app(settings: SelectorSettings, directory: Path) -> web.Application:
    """The selector, ready to be served."""
    app = web.Application(middlewares=[problems])
    service, selecting = Service("selector"), Selecting(settings, directory)
    app.router.add_routes(Doors(settings, selecting, service).routes())
    app.on_shutdown.append(partial(_let_go, selecting))
    attach(app, service, selecting.running(service))
    return app


async def _let_go(selecting: Selecting, _: web.Application) -> None:
    """Clients that wait would hold up the end: they are told to come back."""
    selecting.close()


def _client(request: web.Request) -> str:
    name = request.headers.get(CLIENT, "")
    if not _CLIENT.fullmatch(name):
        what = "1 to 64 letters, digits, dots, dashes or underscores"
        raise FedotaError("invalid_field", f"{CLIENT}: send {what}.", fields={CLIENT: what})
    return name


def _reaches_the_end(response: web.StreamResponse) -> bool:
    """Whether the file that was sent is all there now: the whole of it came, or the last part of it."""
    if response.status == 200:
        return True
    span, _, size = response.headers.get("Content-Range", "").partition("/")
    return response.status == 206 and span.endswith(f"-{int(size) - 1}")


def _examples(request: web.Request) -> int:
    text = request.headers.get(EXAMPLES, "")
    if not _NUMBER.fullmatch(text) or not 1 <= int(text) <= MOST_EXAMPLES:
        raise FedotaError(
            "update_examples", f"{EXAMPLES} must be a whole number from 1 to {MOST_EXAMPLES}, got {text[:40]!r}."
        )
    return int(text)


def _metrics(request: web.Request) -> dict[str, float]:
    text = request.headers.get(METRICS, "{}")
    if len(text) > METRICS_LIMIT:
        raise _wrong_metrics(f"it may have at most {METRICS_LIMIT} bytes, and has {len(text)}")
    try:
        metrics = msgspec.json.decode(text, type=Metrics)
    except msgspec.ValidationError as error:
        raise _wrong_metrics(str(error)) from None
    except (msgspec.DecodeError, UnicodeEncodeError):
        raise _wrong_metrics("it is not JSON") from None
    if infinite := [name for name, value in metrics.items() if not math.isfinite(value)]:
        raise _wrong_metrics(f"{infinite[0]!r} is not finite")
    return metrics


def _wrong_metrics(why: str) -> FedotaError:
    what = f"send a JSON object of at most {MOST_METRICS} finite numbers, with names of 1 to 100 characters"
    return FedotaError("invalid_field", f"{METRICS}: {why}. Correct it: {what}.", fields={METRICS: why})


def _in_full(request: web.Request, error: FedotaError) -> FedotaError:
    """What its client cannot see in it: that the body was taken for more than it was."""
    problem = error.problem
    if request.method != "PATCH" or WHOLE in request.headers or problem.code != "update_malformed":
        return error
    taken = f"Without {WHOLE} the body was taken for all that was left: send it with each part, and the update anew."
    return FedotaError(problem.code, f"{problem.detail} {taken}")


def _ahead(request: web.Request) -> int:
    """The bytes of a body, at most, that are read before it is wanted."""
    if expects(request):
        return 0
    length = request.content_length
    return _AHEAD if length is None else min(length, _AHEAD)


def _sent(request: web.Request, spool: Spool) -> _Sent:
    """What an update's headers say, checked."""
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise FedotaError("unsupported_encoding", "Send the update as it is, without Content-Encoding.")
    offset, whole = 0, None
    if request.method == "PATCH":
        offset = _bytes(request, OFFSET)
        whole = _bytes(request, WHOLE) if WHOLE in request.headers else None
    end = offset + (request.content_length or 0)
    if whole is None and request.content_length is not None:
        whole = end
    if whole is not None and end > whole:
        what = "the bytes of the whole update"
        said = f"{WHOLE}: send {what}; this request ends at byte {end}, and it says {whole}."
        raise FedotaError("invalid_field", said, fields={WHOLE: what})
    if whole is not None and whole > spool.size:
        said = f"The update has {whole} bytes; for this model {spool.size} are the most. {ONLY_TENSORS}"
        raise FedotaError("update_too_large", said)
    return _Sent(offset, whole, _examples(request), _metrics(request))


def _bytes(request: web.Request, name: str) -> int:
    text = request.headers.get(name, "")
    if not BYTES.fullmatch(text):
        what = "a whole number of bytes"
        raise FedotaError("invalid_field", f"{name}: send {what}, got {text[:40]!r}.", fields={name: what})
    return int(text)
