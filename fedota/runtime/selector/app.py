"""The selector's composition, and what clients may ask of it."""

from functools import partial
from pathlib import Path
from typing import Any, Final

import structlog
from aiohttp import web

from fedota.contracts import participation
from fedota.contracts.runtime import SelectorSettings
from fedota.errors import FedotaError
from fedota.process import Service, attach
from fedota.runtime.protocol import CHECK_IN, CLIENT, MODELS, OFFSET, TICKET, UPDATES, Received
from fedota.runtime.receiving import unhurried
from fedota.runtime.selector.cohort import Cohort, already_reported
from fedota.runtime.selector.headers import client_of, in_full
from fedota.runtime.selector.pool import Waiting
from fedota.runtime.selector.reporting import Reporting
from fedota.runtime.selector.selecting import Selecting
from fedota.runtime.sending import send_file
from fedota.runtime.tickets import Ticket
from fedota.runtime.uploads import OffsetError
from fedota.runtime.web import bearer, goes_on_at, json_response, problems

SERVER: Final[dict[str, Any]] = {
    "handler_cancellation": True,  # a client that goes away must not be selected: its request ends with its connection
    "read_bufsize": 1 << 14,  # bytes of a body that may wait for us in memory, for each connection
}
# Said to one client about the way there, not about its update: no refusal of the round.
_PASSING: Final = frozenset({"unavailable", "internal_error", "offset_mismatch", "already_reported"})
_GONE: Final = "These weights are not in use now. Check in for the present round."
_log = structlog.get_logger(__name__)


class Doors:
    """What clients may ask of a selector."""

    def __init__(self, settings: SelectorSettings, selecting: Selecting, service: Service) -> None:
        self._settings = settings
        self._selecting = selecting
        self._reporting = Reporting(selecting, service)
        self._refused = service.add_counter("refusals", "Requests of clients that were refused", ("code",))
        service.add_gauge("clients_waiting", "Clients that wait to be selected", lambda: len(selecting.pool))
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
        who = Waiting(self._organization(request), client_of(request))
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
            received = await self._reporting.take(request, ticket, cohort)
        except OffsetError as error:
            self._refused.labels("offset_mismatch").inc()
            return goes_on_at(error.offset, "The selector has {} bytes of this update.")
        except FedotaError as error:
            refusal = in_full(request, error)
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
            await self._reporting.require_alone(cohort, ticket)
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


def _reaches_the_end(response: web.StreamResponse) -> bool:
    """Whether the file that was sent is all there now: the whole of it came, or the last part of it."""
    if response.status == 200:
        return True
    span, _, size = response.headers.get("Content-Range", "").partition("/")
    return response.status == 206 and span.endswith(f"-{int(size) - 1}")
