"""A client's way to the selectors: one that answers is kept to, another is tried when it does not."""

import asyncio
import random
import secrets
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from time import monotonic
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
import msgspec

from fedota.client.errors import ClientError
from fedota.client.train import Update
from fedota.contracts.kit import Kit
from fedota.errors import FedotaError, Problem
from fedota.runtime.bodies import Parts, read_reply
from fedota.runtime.places import Memory
from fedota.runtime.protocol import (
    CHECK_IN,
    CLIENT,
    EXAMPLES,
    METRICS,
    MODELS,
    OFFSET,
    TICKET,
    UPDATES,
    WHOLE,
    CheckedIn,
    ModelRef,
)
from fedota.runtime.rooms import Rooms
from fedota.tls import client_context

_POLL: Final = aiohttp.ClientTimeout(total=90, sock_connect=10)
_SHORT: Final = aiohttp.ClientTimeout(total=30, sock_connect=10)
_FETCH: Final = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60)
_LARGE: Final = 1 << 16  # bytes of a body that are more than another round trip
_ASKED: Final = 45.0  # seconds in which a selector asks for a body: more than one waits there for its turn
_LATE: Final = 60.0  # seconds past a round's end that an answer to an update is still awaited
_FIRST_DELAY: Final = 0.2
_LONGEST_DELAY: Final = 15.0
_decode_answer: Final[Callable[[bytes], CheckedIn]] = msgspec.json.Decoder(CheckedIn).decode


class NoAnswerError(Exception):
    """The selector that was asked did not answer; the next request goes to another one."""


class _NeverAskedError(Exception):
    """What lies on the way to the selector does not let it ask for a body (RFC 9110, 10.1.1)."""


class Selectors:
    """Asks one selector at a time. Raises `ClientError` when none has answered for `patience` seconds."""

    def __init__(self, kit: Kit, http: aiohttp.ClientSession, patience: float) -> None:
        self._http = http
        self._urls = random.sample(kit.selectors, len(kit.selectors))  # spread: not everybody asks the first
        self._headers = {"Authorization": f"Bearer {kit.token}", CLIENT: secrets.token_hex(8)}
        self._patience = patience
        self._silent_since: float | None = None
        self._delay = 0.0
        self._broken = False  # whether the last connection to the present selector broke
        self._rooms = Rooms()  # a model that `train` has kept a part of stays as it is
        self._unasked: dict[str, bool] = {}  # who gets updates without asking; True when it cannot ask, as we know

    @classmethod
    @asynccontextmanager
    async def of(cls, kit: Kit, patience: float) -> AsyncIterator["Selectors"]:
        """The selectors that a kit names. Proxies are taken from the environment, unless they could read what is sent.

        Only the authority of the kit is trusted; where it names none, those that the system trusts.
        """
        connector, secret = aiohttp.TCPConnector(ssl=_trusted(kit)), all(map(_is_secret, kit.selectors))
        async with aiohttp.ClientSession(connector=connector, trust_env=secret) as http:
            yield cls(kit, http, patience)

    async def check_in(self, ticket: str | None) -> CheckedIn:
        """Wait to be told what to do; `ticket` is of the update that is kept."""
        headers = {TICKET: ticket} if ticket else {}
        url = self._urls[0]
        try:
            body = await self._ask("POST", CHECK_IN, headers=headers, timeout=_POLL)
        except FedotaError as error:
            if error.problem.code in ("not_found", "method_not_allowed"):
                raise ClientError(f"{url} is not a selector. Download the join kit again.") from None
            raise
        try:
            return _decode_answer(body)
        except msgspec.DecodeError:
            raise FedotaError(
                "unavailable", "The selector's answer was not understood. Is this client too old?"
            ) from None

    async def fetch(self, model: ModelRef) -> memoryview:
        """The weights, as yet unchecked. What came before a connection broke is not asked for again."""
        place = Memory(self._rooms.room(model.size))
        while True:
            before = place.received
            try:
                await self._fetch_rest(model, place)
                return place.view
            except NoAnswerError:
                if place.received <= before:
                    raise

    async def _fetch_rest(self, model: ModelRef, place: Memory) -> None:
        headers = {"Range": f"bytes={place.received}-"} if place.received else {}
        async with self._asked("GET", MODELS.format(sha256=model.sha256), headers=headers, timeout=_FETCH) as reply:
            await _raise_problem(reply)
            if reply.status != 206:
                place.received = 0
            if reply.content_length != model.size - place.received:
                raise NoAnswerError("the model is not as large as it was announced")
            try:
                await read_reply(reply, place)
            except FedotaError as error:  # it stalled: another selector may do better
                raise NoAnswerError(error.problem.detail) from None

    async def send(self, ticket: str, update: Update, seconds: float, *, begun: bool = False) -> None:
        """Send an update; `begun` when that was tried before. Raises `FedotaError` when it is refused.

        When the connection breaks it goes on where the selector's part of it ends.
        """
        deadline = monotonic() + max(0.0, seconds) + _LATE
        offset = await self._offset(ticket) if begun else 0
        while True:
            try:
                await self._send_rest(ticket, update, offset, deadline - monotonic())
                return
            except NoAnswerError:
                before, offset = offset, await self._offset(ticket)
                if offset <= before:
                    raise

    async def _send_rest(self, ticket: str, update: Update, offset: int, seconds: float) -> None:
        headers = {TICKET: ticket, EXAMPLES: str(update.examples), METRICS: update.metrics}
        if offset:
            headers |= {OFFSET: str(offset), WHOLE: str(update.size)}
        timeout = aiohttp.ClientTimeout(total=max(_LATE, seconds), sock_connect=10)
        send = partial(self._ask, "PATCH" if offset else "POST", UPDATES, headers=headers, timeout=timeout)
        url = self._urls[0]
        try:
            # a selector asks for the body when it has a place for it: nothing is sent in vain
            if update.size >= _LARGE and url not in self._unasked:
                await self._send_when_asked(send, update, offset)
                return
        except _NeverAskedError:
            self._unasked[url] = True
        await send(data=Parts(update.parts, offset))
        if not self._unasked.get(url, True):
            del self._unasked[url]

    async def _send_when_asked(self, send: Callable[..., Awaitable[bytes]], update: Update, offset: int) -> None:
        """Raises `NoAnswerError` when nobody asks: the selector is gone, or what it says does not get here.

        Which of the two it was is not known. So the next one is sent unasked, and when that arrives we wait again.
        """
        url = self._urls[0]
        try:
            async with asyncio.timeout(_ASKED) as asked:
                await send(data=Parts(update.parts, offset, begins=lambda: asked.reschedule(None)), expect100=True)
        except TimeoutError:
            self._unasked[url] = False
            why = f"{url} did not ask for the update within {_ASKED:.0f} seconds"
            self._failed(why, gone=True)
            raise NoAnswerError(why) from None
        except FedotaError as error:
            # it asked, waited and gave up, and nothing of that but the last got here
            if error.problem.code == "timeout" and asked.when() is not None:
                raise _NeverAskedError from None
            raise

    async def _offset(self, ticket: str) -> int:
        """How much of the update the selector has; 0 also where it takes no more of it, which sending will tell."""
        async with self._asked("HEAD", UPDATES, headers={TICKET: ticket}, timeout=_SHORT) as reply:
            offset = reply.headers.get(OFFSET, "")
            return int(offset) if reply.status == 204 and offset.isascii() and offset.isdigit() else 0

    def turn(self) -> None:
        """Ask another selector from now on."""
        self._urls.append(self._urls.pop(0))
        self._broken = False

    async def pause(self, seconds: float) -> None:
        """Come back after so many seconds, not at the same moment as everybody else."""
        await asyncio.sleep(seconds * random.uniform(1.0, 1.2))  # noqa: S311 - only spreads the requests

    async def _ask(self, method: str, path: str, **arguments: Any) -> bytes:
        async with self._asked(method, path, **arguments) as reply:
            await _raise_problem(reply)
            return await reply.read()

    @asynccontextmanager
    async def _asked(
        self, method: str, path: str, *, headers: dict[str, str] | None = None, **arguments: Any
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        await self._back_off()
        url = self._urls[0].rstrip("/") + path
        try:
            sent = {**self._headers, **(headers or {})}
            async with self._http.request(method, url, headers=sent, allow_redirects=False, **arguments) as reply:
                if reply.status == 417 and arguments.get("expect100"):
                    raise _NeverAskedError
                if reply.status >= 300 and reply.content_type != "application/problem+json":
                    raise NoAnswerError(f"{url} answered with {reply.status}")  # something else stands there
                yield reply
            self._answered()
        except (aiohttp.ClientError, TimeoutError, ConnectionError, NoAnswerError) as error:
            why = _in_words(error)
            self._failed(why, gone=isinstance(error, aiohttp.ClientConnectorError | TimeoutError | NoAnswerError))
            raise NoAnswerError(why) from None
        except FedotaError:
            self._answered()
            raise

    def _answered(self) -> None:
        self._silent_since, self._delay, self._broken = None, 0.0, False

    async def _back_off(self) -> None:
        if self._delay:
            await asyncio.sleep(self._delay * random.uniform(0.5, 1.0))  # noqa: S311 - only spreads the requests

    def _failed(self, why: str, *, gone: bool) -> None:
        """Turn to the next selector, unless it was only a connection that broke: this one may have half of an update.

        The wait grows with each round in which none answers.
        """
        # Counted from the first request that failed: while a client trains for hours, nobody is silent.
        self._silent_since = self._silent_since or monotonic()
        silent = monotonic() - self._silent_since
        if silent > self._patience:
            tried = ", ".join(self._urls)
            raise ClientError(
                f"No selector answered for {silent:.0f} seconds (tried: {tried}; the last said: {why}). "
                "Check the network and whether the training is still running."
            )
        if gone or self._broken:
            self.turn()
        else:
            self._broken = True
        self._delay = min(1.5 * self._delay + _FIRST_DELAY / len(self._urls), _LONGEST_DELAY, self._patience)


def _in_words(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return (
            f"the certificate at {error.host} is not good by the join kit: {error.certificate_error}. The kit may be "
            "of an earlier start of the training, or something stands between; download the kit again"
        )
    return str(error) or type(error).__name__


def _is_secret(url: str) -> bool:
    """Whether a proxy sees nothing of what is sent there; plain HTTP is spoken to this very machine alone."""
    return urlsplit(url).scheme == "https"


def _trusted(kit: Kit) -> ssl.SSLContext | bool:
    try:
        return client_context(kit.authority) if kit.authority else True
    except ValueError as error:
        raise ClientError(f"The join kit's authority cannot be used ({error}). Download it again.") from None


async def _raise_problem(reply: aiohttp.ClientResponse) -> None:
    if reply.status < 300:
        return
    try:
        raise FedotaError.of(msgspec.json.decode(await reply.read(), type=Problem))
    except msgspec.DecodeError:
        raise NoAnswerError(f"the selector answered with {reply.status}") from None
