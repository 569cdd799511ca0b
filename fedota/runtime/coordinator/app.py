"""The coordinator's composition, and what it answers to selectors."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Final, TypeVar

import aiohttp
import msgspec
from aiohttp import web
from aiohttp.typedefs import Middleware

from fedota.contracts.runtime import CoordinatorSettings
from fedota.errors import FedotaError
from fedota.events import to_json, uuid7
from fedota.process import Service, attach
from fedota.runtime.coordinator.objects import Objects
from fedota.runtime.coordinator.partials import MOST_META, Partials
from fedota.runtime.coordinator.platform import Platform
from fedota.runtime.coordinator.state import Rules
from fedota.runtime.coordinator.training import Training
from fedota.runtime.protocol import CLAIMS, MODELS, ORDERS, STATES, Claim, Told
from fedota.runtime.sending import send_file
from fedota.runtime.web import Handler, json_response, problems, require_key

_HOLD: Final = 5.0  # seconds that orders are awaited in one request
_TRAINING: Final = web.AppKey("training", Training)
B = TypeVar("B")


def create_app(settings: CoordinatorSettings, directory: Path) -> web.Application:
    """The coordinator, ready to be served."""
    app = web.Application(middlewares=[problems, _guard(settings.key)], client_max_size=MOST_META)
    app.router.add_post(STATES, _take_state)
    app.router.add_get(ORDERS, _give_orders)
    app.router.add_post(CLAIMS, _answer_claim)
    app.router.add_routes(Partials(lambda: app[_TRAINING]).routes())
    app.router.add_get(MODELS, _give_model)
    service = Service("coordinator")
    app.on_shutdown.append(_let_go)
    attach(app, service, _resources(app, service, settings, directory))
    return app


async def _let_go(app: web.Application) -> None:
    """Orders that are awaited would hold up the end."""
    app[_TRAINING].close()


def _guard(key: str) -> Middleware:
    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path.startswith("/v1/"):
            require_key(request, key)
            request.app[_TRAINING].require_begun()
        return await handler(request)

    return guard


@asynccontextmanager
async def _resources(
    app: web.Application, service: Service, settings: CoordinatorSettings, directory: Path
) -> AsyncIterator[None]:
    """It is served at once, and says what it does until it can begin: a large model takes a while."""
    rules = Rules(problem_id=settings.problem_id, run=settings.run, plan=settings.plan, life=uuid7().hex)
    training = Training(settings, rules, directory)
    app[_TRAINING] = training
    service.add_check("training", training.check)

    async def train() -> None:
        async with aiohttp.ClientSession() as http, Platform.connect(settings, training.says) as platform:
            await training.load(platform, Objects(platform, http))
            _measure(service, training)
            await training.keep_time()

    async with AsyncExitStack() as stack:
        for name, work in (
            ("clock", train()),
            ("reports", training.report()),
            ("checkpoints", training.conclude()),
            ("store", training.store()),
            ("attention", training.attend()),
        ):
            await stack.enter_async_context(service.running(name, work, vital=True))
        yield


def _measure(service: Service, training: Training) -> None:
    service.add_gauge("round", "The round that is being run", lambda: training.state.round)
    service.add_gauge("round_attempt", "Which attempt of the round this is", lambda: training.state.attempt)
    service.add_gauge("clients_waiting", "Clients that wait to be selected", lambda: training.state.waiting)
    service.add_gauge("selectors", "Selectors that are heard of", lambda: len(training.state.presences))
    service.add_gauge("rounds_unrecorded", "Rounds that count and are not recorded yet", training.unrecorded)
    service.add_gauge("reports_waiting", "Reports that are not recorded yet", lambda: training.reporter.waiting)


async def _decoded(request: web.Request, kind: type[B]) -> B:
    try:
        return msgspec.json.decode(await request.read(), type=kind)
    except msgspec.DecodeError as error:
        raise FedotaError("invalid_request", f"The body is not what is expected here: {error}.") from None


async def _take_state(request: web.Request) -> web.Response:
    request.app[_TRAINING].happened(await _decoded(request, Told))
    return web.Response(status=204)


async def _give_orders(request: web.Request) -> web.Response:
    """Orders that differ from those that the selector has; 304 when there were none for a while."""
    training, life = request.app[_TRAINING], request.query.get("life", "")
    known = request.headers.get("If-None-Match")
    until = asyncio.get_running_loop().time() + _HOLD
    while True:
        changed = training.changed
        body = to_json(training.orders(request.match_info["name"], life))
        tag = f'"{hashlib.blake2b(body, digest_size=16).hexdigest()}"'
        if tag != known:
            return web.Response(body=body, content_type="application/json", headers={"ETag": tag})
        left = until - asyncio.get_running_loop().time()
        if left <= 0 or training.closing:
            return web.Response(status=304, headers={"ETag": tag})
        with suppress(TimeoutError):
            await asyncio.wait_for(changed.wait(), left)


async def _answer_claim(request: web.Request) -> web.Response:
    return json_response(request.app[_TRAINING].claim(await _decoded(request, Claim)))


async def _give_model(request: web.Request) -> web.StreamResponse:
    training, sha256 = request.app[_TRAINING], request.match_info["sha256"]
    if not training.has_model(sha256):
        raise FedotaError("not_found", "These weights are not in use now.")
    return await send_file(request, training.model_file(sha256), sha256)
