"""The one place that lets requests in: who asks, and may they."""

from collections.abc import Mapping
from typing import Final
from urllib.parse import urlencode

from aiohttp import web
from aiohttp.typedefs import Middleware

from fedota.errors import FedotaError
from gateway.auth import Identity, TokensFile, digest_of
from gateway.parts import IDENTITY, STILL_IN
from gateway.sessions import Sessions, require_same_origin
from gateway.web_errors import Handler

# /readyz is open for load balancers and probes: see `gateway.health` for what it keeps to itself
OPEN: Final = frozenset({"/livez", "/readyz", "/sign-in", "/static"})


def guard(tokens: TokensFile, sessions: Sessions, actions: Mapping[tuple[str, str], str]) -> Middleware:
    """A middleware that refuses every request but those to `OPEN` routes and those that the table allows."""

    @web.middleware
    async def guarding(request: web.Request, handler: Handler) -> web.StreamResponse:
        route = _route_of(request)
        if route[1] in OPEN:
            require_same_origin(request)
            return await handler(request)
        identity = _identify(request, tokens, sessions)
        if identity is None:
            return _refuse(request)
        request[IDENTITY] = identity
        if route in actions:
            identity.require(actions[route])
        elif request.match_info.http_exception is None:  # a route that nobody gave an action stays shut
            raise FedotaError("forbidden", "Nobody may do this.")
        return await handler(request)

    return guarding


def _route_of(request: web.Request) -> tuple[str, str]:
    resource = request.match_info.route.resource
    return request.method, resource.canonical if resource else ""


def _identify(request: web.Request, tokens: TokensFile, sessions: Sessions) -> Identity | None:
    """The bearer token decides where there is one; a session counts only for requests from our own pages."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme:
        digest = digest_of(token.strip())
        request[STILL_IN] = lambda: tokens.find(digest) is not None
        return tokens.find(digest) if scheme.lower() == "bearer" else None
    request[STILL_IN] = lambda: sessions.find(request) is not None
    if identity := sessions.find(request):
        require_same_origin(request)
    return identity


def _refuse(request: web.Request) -> web.StreamResponse:
    if request.path in ("/api", "/metrics") or request.path.startswith("/api/"):
        raise FedotaError("unauthenticated", "Send a valid token in the header Authorization: Bearer <token>.")
    at = f"?at={request.query['at']}" if "at" in request.query else ""
    wanted = f"?{urlencode({'next': request.path + at})}" if request.method == "GET" and request.path != "/" else ""
    return web.Response(status=303, headers={"Location": f"/sign-in{wanted}", "Cache-Control": "no-store"})
