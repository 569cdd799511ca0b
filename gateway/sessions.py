"""Signed-in browsers: an opaque cookie, and all that it stands for kept here."""

import secrets
import time
from collections.abc import Callable
from typing import Final
from urllib.parse import urlsplit

from aiohttp import web

from fedota.errors import FedotaError
from gateway.auth import Identity

LIFETIME: Final = 12 * 3600.0  # seconds
_MOST: Final = 10_000  # sessions at once; the oldest gives way
_SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS"})


class Sessions:
    """Who is signed in. Lost when the gateway starts again: then everybody signs in again.

    A session stands for the token that it was begun with, by its digest, and ends with it: `whose` says whose it is.
    """

    def __init__(
        self, https: bool, whose: Callable[[str], Identity | None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._https = https
        self._whose = whose
        self._clock = clock
        self._sessions: dict[str, tuple[str, float]] = {}
        # a browser takes a __Host- cookie only from this very host, and only over HTTPS
        self._cookie = "__Host-fedota" if https else "fedota"

    def start(self, request: web.Request, response: web.Response, digest: str) -> None:
        """Sign a browser in under a new id, whatever id it had before."""
        self.end(request, response)
        session = secrets.token_urlsafe(32)
        self._sessions[session] = (digest, self._clock() + LIFETIME)
        while len(self._sessions) > _MOST:
            del self._sessions[next(iter(self._sessions))]
        response.set_cookie(
            self._cookie,
            session,
            max_age=int(LIFETIME),
            path="/",
            httponly=True,
            samesite="Strict",
            secure=self._https,
        )

    def end(self, request: web.Request, response: web.Response) -> None:
        """Forget a browser's session."""
        self._sessions.pop(request.cookies.get(self._cookie, ""), None)
        response.del_cookie(self._cookie, path="/", httponly=True, samesite="Strict", secure=self._https)

    def find(self, request: web.Request) -> Identity | None:
        """Who is signed in with the browser that sends this."""
        session = request.cookies.get(self._cookie, "")
        digest, expires = self._sessions.get(session, ("", 0.0))
        identity = self._whose(digest) if digest and self._clock() < expires else None
        if identity is None:
            self._sessions.pop(session, None)
        return identity


def require_same_origin(request: web.Request) -> None:
    """Refuse a change that another site made a signed-in browser send (CSRF)."""
    if request.method in _SAFE or _is_same_origin(request):
        return
    raise FedotaError("forbidden", "Another site sent this request. Open Fedota itself and do it there.")


def _is_same_origin(request: web.Request) -> bool:
    site = request.headers.get("Sec-Fetch-Site")
    if site is not None:
        return site in ("same-origin", "none")
    return urlsplit(request.headers.get("Origin", "")).netloc == request.host
