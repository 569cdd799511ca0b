"""The selector's composition, and what it answers to clients."""

import asyncio
import math
import re
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
import structlog
from aiohttp import web

from fedota.contracts import participation
from fedota.contracts.runtime import SelectorSettings
from fedota.errors import FedotaError
from fedota.process import Service, attach
from fedota.runtime.aggregation import checked
from fedota.runtime.bodies import read_body, send_file
from fedota.runtime.protocol import (
    CHECK_IN,
    CLIENT,
    EXAMPLES,
    METRICS,
    METRICS_LIMIT,
    MODELS,
    MOST_EXAMPLES,
    TICKET,
    UPDATES,
    Metrics,
    Received,
)
from fedota.runtime.selector.buffers import Buffers
from fedota.runtime.selector.cohort import Cohort
from fedota.runtime.selector.pool import Waiting
from fedota.runtime.selector.selecting import Selecting
from fedota.runtime.tickets import Ticket
from fedota.runtime.web import bearer, json_response, problems

READ_BUFFER: Final = 1 << 18  # bytes of a body that may wait for us in memory, for each connection
_MOST_UPLOADS: Final = 64  # at the same time; more are asked to come back
_CLIENT: Final = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_NUMBER: Final = re.compile(r"[0-9]{1,10}", re.ASCII)
_log = structlog.get_logger(__name__)


class Doors:
    """What clients may ask of a selector."""

    def __init__(self, settings: SelectorSettings, selecting: Selecting, service: Service) -> None:
        self._settings = settings
        self._selecting = selecting
        self._uploads = 0
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
            web.post(UPDATES, self.update),
        ]

    async def check_in(self, request: web.Request) -> web.Response:
        """A client is here; the answer comes when there is something for it to do."""
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
        self._organization(request)
        sha256 = request.match_info["sha256"]
        if not self._selecting.has_model(sha256):
            raise FedotaError("not_found", "These weights are not in use now. Check in for the present round.")
        return await send_file(request, self._selecting.model_file(sha256))

    async def update(self, request: web.Request) -> web.Response:
        """A client's update: counted, or refused with the reason."""
        organization = self._organization(request)
        cohort: Cohort | None = None
        try:
            ticket = self._ticket(request, organization)
            cohort = self._cohort(ticket)
            await self._take(request, ticket, cohort)
        except FedotaError as error:
            self._note(organization, cohort, error)
            raise
        return json_response(Received(round=ticket.round, attempt=ticket.attempt))

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
            raise FedotaError("round_over", "The round that this update is for is over. Check in for the next one.")
        return cohort

    def _note(self, organization: str, cohort: Cohort | None, error: FedotaError) -> None:
        code = error.problem.code
        self._refused.labels(code).inc()
        if code in ("unavailable", "internal_error"):
            return
        _log.info("update refused", organization=organization, code=code, detail=error.problem.detail)
        if (cohort := cohort or self._selecting.cohort) is not None and not cohort.handed:
            cohort.refuse(organization, error)
            self._selecting.changed()

    async def _take(self, request: web.Request, ticket: Ticket, cohort: Cohort) -> None:
        """Everything that can be refused without reading the body is refused before."""
        cohort.require_open(ticket)
        buffers = self._selecting.buffers
        assert buffers is not None
        examples, metrics = _examples(request), _metrics(request)
        _check_body(request, buffers)
        await self._require_claim(ticket, cohort)
        if self._uploads >= _MOST_UPLOADS:
            raise FedotaError("unavailable", "Too many updates come at once. Send it again.", retry_after=2)
        cohort.require_open(ticket)
        async with AsyncExitStack() as stack:
            stack.enter_context(self._receiving(cohort, ticket))
            buffer = await stack.enter_async_context(buffers.one())
            size = await read_body(request, buffer)
            # From here on the client may go: what works on the buffer must end before another update comes into it.
            owned = stack.pop_all()
        task = asyncio.create_task(self._count(owned, ticket, cohort, buffer[:size], examples, metrics))
        self._tasks.add(task)
        task.add_done_callback(self._counted)
        await asyncio.shield(task)

    @contextmanager
    def _receiving(self, cohort: Cohort, ticket: Ticket) -> Iterator[None]:
        """The update of this ticket is on its way in, and no other is taken for it."""
        cohort.receiving.add(ticket.id)
        self._uploads += 1
        try:
            yield
        finally:
            self._uploads -= 1
            cohort.receiving.discard(ticket.id)

    async def _require_claim(self, ticket: Ticket, cohort: Cohort) -> None:
        if ticket.life == self._selecting.life or ticket.id in cohort.claimed:
            return
        match await self._selecting.claim(cohort, ticket):
            case "wait":
                raise FedotaError("unavailable", "Another selector may have this update. Send it again.", retry_after=1)
            case "taken":
                raise FedotaError("already_reported", "Another selector has this update in its sum; it counts once.")
            case "over":
                raise FedotaError("round_over", "The round takes no more updates. Check in for the next one.")

    def _counted(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waited for it may have gone

    async def _count(
        self,
        owned: AsyncExitStack,
        ticket: Ticket,
        cohort: Cohort,
        body: memoryview,
        examples: int,
        metrics: dict[str, float],
    ) -> None:
        async with owned:
            tensors = await asyncio.to_thread(checked, cohort.layout, body)
            self._selecting.require_participation(ticket.organization)
            await cohort.count(ticket, tensors, examples, metrics)
        self._accepted.inc()
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


def _examples(request: web.Request) -> int:
    text = request.headers.get(EXAMPLES, "")
    if not _NUMBER.fullmatch(text) or not 1 <= int(text) <= MOST_EXAMPLES:
        raise FedotaError(
            "update_examples", f"{EXAMPLES} must be a whole number from 1 to {MOST_EXAMPLES}, got {text[:40]!r}."
        )
    return int(text)


def _metrics(request: web.Request) -> dict[str, float]:
    text = request.headers.get(METRICS, "{}")
    try:
        metrics = msgspec.json.decode(text[: METRICS_LIMIT + 1], type=Metrics) if len(text) <= METRICS_LIMIT else None
    except (msgspec.DecodeError, UnicodeEncodeError):
        metrics = None
    if metrics is None or not all(math.isfinite(value) for value in metrics.values()):
        what = f"a JSON object of finite numbers, at most {METRICS_LIMIT} bytes"
        raise FedotaError("invalid_field", f"{METRICS}: send {what}.", fields={METRICS: what})
    return metrics


def _check_body(request: web.Request, buffers: Buffers) -> None:
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise FedotaError("unsupported_encoding", "Send the update as it is, without Content-Encoding.")
    if (request.content_length or 0) > buffers.size:
        raise FedotaError(
            "update_too_large",
            f"The update has {request.content_length} bytes; for this model {buffers.size} are the most.",
        )
