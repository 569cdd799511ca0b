"""The gateway's composition: everything is built here, from settings."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from aiohttp import web

from fedota.kernel.bus import Bus
from fedota.kernel.database import connect_pool
from fedota.kernel.event_log import EventLog
from fedota.kernel.projection import Projector
from fedota.kernel.service import Service, attach
from gateway import pages
from gateway.auth import TokensFile
from gateway.guard import guard
from gateway.health import reasons_stay_here
from gateway.parts import HEARTBEAT, PARTS, SCHEME, TOKENS, Parts
from gateway.people import PEOPLE, People, PeopleKeys, named, read_key_file
from gateway.projection import PROJECTION
from gateway.reads import Reads
from gateway.routes import ACTIONS_OF, API, PAGES
from gateway.sessions import Sessions
from gateway.settings import Settings
from gateway.stream import Feed
from gateway.web_errors import BODY_LIMIT, problems

_STATIC: Final = Path(__file__).parent / "static"
_SECURITY_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def create_app(settings: Settings) -> web.Application:
    """The gateway, ready to be served."""
    tokens = TokensFile(settings.tokens_file, may_name_people=settings.people_key_file is not None)
    sessions = Sessions(settings.https, tokens.find)
    people_keys = read_key_file(settings.people_key_file, needed=bool(tokens.current.people))
    middlewares = [pages.error_pages, problems, guard(tokens, sessions, ACTIONS_OF), reasons_stay_here, named]
    app = web.Application(middlewares=middlewares, client_max_size=BODY_LIMIT)
    app[HEARTBEAT] = settings.heartbeat
    app[SCHEME] = "https" if settings.https else "http"
    app[TOKENS] = tokens
    app[pages.ENTRANCE] = pages.Entrance(tokens.find, sessions)
    app[pages.TEMPLATES] = pages.load_templates(uploads=bool(settings.s3_public_url))
    for route in (*API, *PAGES):
        for method in route.methods:
            app.router.add_route(method, route.path, route.handler)
    app.router.add_get("/sign-in", pages.show_sign_in)
    app.router.add_post("/sign-in", pages.sign_in)
    app.router.add_static("/static", _STATIC)
    app.on_response_prepare.append(partial(_add_headers, _content_security_policy(settings.s3_public_url)))
    app.on_shutdown.append(_end_streams)
    attach(app, Service("gateway"), settings, partial(_resources, app, people_keys))
    return app


@asynccontextmanager
async def _resources(
    app: web.Application, people_keys: PeopleKeys | None, service: Service, settings: Settings
) -> AsyncIterator[None]:
    async with (
        connect_pool(settings.database_url, service.name) as pool,
        Bus.connect(settings.nats_url, service.name, settings.nats_credentials) as bus,
        EventLog.open(pool) as log,
        Projector.open(service, PROJECTION, pool, log, bus) as projector,
    ):
        feed = Feed(log, projector)
        app[PEOPLE] = await People.open(pool, people_keys)
        app[PARTS] = Parts(bus, Reads(pool, projector, log), feed)
        service.add_check("log", log.head)
        service.add_check("nats", bus.check)
        service.add_gauge("event_streams", "Event streams that are open", lambda: feed.watchers)
        async with service.running("feed", feed.run()):
            yield


def _content_security_policy(s3_public_url: str) -> str:
    """Pages load nothing from elsewhere; all that they send elsewhere is files, to the object store."""
    scheme, place, *_ = urlsplit(s3_public_url)
    store = f" {scheme}://{place}" if place else ""
    return (
        f"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'{store}; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    )


async def _add_headers(policy: str, request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(_SECURITY_HEADERS)
    response.headers["Content-Security-Policy"] = policy
    # a page may hold what only its reader may see; a static file is asked for again, and mostly not changed
    response.headers.setdefault("Cache-Control", "no-cache" if request.path.startswith("/static/") else "no-store")


async def _end_streams(app: web.Application) -> None:
    """Streams never end by themselves: without this a stop would wait for them."""
    app[PARTS].feed.close()
