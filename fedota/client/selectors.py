"""A client's way to the selectors: one that answers is kept to, another is tried when it does not."""

import asyncio
import os
import random
import secrets
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from time import monotonic
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
import msgspec
from aiohttp.abc import AbstractStreamWriter

from fedota.client.errors import ClientError
from fedota.client.kits import page_of
from fedota.client.train import Update
from fedota.contracts.kit import Kit
from fedota.errors import FedotaError, Problem
from fedota.runtime.places import Memory
from fedota.runtime.protocol import (
    BYTES,
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
from fedota.runtime.receiving import read_reply
from fedota.runtime.rooms import Rooms
from fedota.runtime.sending import Parts
from fedota.tls import client_context

_POLL: Final = aiohttp.ClientTimeout(total=90, sock_connect=10)
_SHORT: Final = aiohttp.ClientTimeout(total=30, sock_connect=10)
_FETCH: Final = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60)
_LARGE: Final = 1 << 16  # bytes of a body that are more than another round trip
_ASKED: Final = 45.0  # seconds in which a selector asks for a body: more than one waits there for its turn
# A selector that died without a word, its machine off, is noticed in a minute: the round waits for those it had. One
# that lives takes some of a body within that time, and answers when it has it all, once those before it are added.
_HEARD: Final = 60.0  # seconds
_ADDED: Final = 5e6  # bytes a second of an update, when many come at once
_LATE: Final = 60.0  # seconds past a round's end that an answer to an update is still awaited
_FIRST_DELAY: Final = 0.2
_LONGEST_DELAY: Final = 15.0
_LONGEST_PAUSE: Final = 3600.0  # seconds; no selector sends anybody away for longer
_DISTRUST: Final = 30.0  # seconds in which a certificate that is not good may be replaced
# What a selector refuses with, by address. Anything else is said by something between, or by a selector that is broken:
# it is as if that had not answered.
_NO_SELECTOR: Final = frozenset({"not_found", "method_not_allowed"})
_AT_CHECK_IN: Final = _NO_SELECTOR | {"token_refused", "invalid_field"}
_AT_MODELS: Final = frozenset({"token_refused", "not_found", "unavailable"})
_AT_UPDATES: Final = frozenset(
    {
        *("token_refused", "ticket_refused", "round_over", "already_reported", "offset_mismatch", "update_too_large"),
        *("unsupported_encoding", "update_malformed", "update_mismatch", "update_not_finite", "update_examples"),
        *("invalid_field", "unavailable", "timeout"),
    }
)
_NO_SENSE: Final = (ValueError, RecursionError)  # what decoding raises, also for text that is not UTF-8
_decode_answer: Final[Callable[[bytes], CheckedIn]] = msgspec.json.Decoder(CheckedIn).decode


class NoAnswerError(Exception):
    """The selector that was asked did not answer; the next request goes to another one."""


class _NeverAskedError(Exception):
    """What lies on the way to the selector does not let it ask for a body (RFC 9110, 10.1.1)."""


class _Request(aiohttp.ClientRequest):
    """One whose body is sent by a task that nobody asks how it ended: it must not end in an error."""

    async def write_bytes(
        self, writer: AbstractStreamWriter, conn: aiohttp.connector.Connection, content_length: int | None = None
    ) -> None:
        """Send the body; where the connection is gone, whoever waits for the answer hears of that."""
        with suppress(ConnectionError):
            await super().write_bytes(writer, conn, content_length)


class Selectors:
    """Asks one selector at a time. Raises `ClientError` when none has answered for `patience` seconds."""

    def __init__(self, kit: Kit, http: aiohttp.ClientSession, patience: float) -> None:
        self._http = http
        self._urls = random.sample(kit.selectors, len(kit.selectors))  # spread: not everybody asks the first
        self._headers = {"Authorization": f"Bearer {kit.token}", CLIENT: secrets.token_hex(8)}
        self._patience = patience
        self._page = page_of(kit)
        self._silent_since: float | None = None
        self._wrong: dict[str, float] = {}  # whose certificate was not good when it was asked last, and since when
        self._delay = 0.0
        self._broken = False  # whether the last connection to the present selector broke
        self._rooms = Rooms()  # a model that `train` has kept a part of stays as it is
        self._fetching: tuple[ModelRef, Memory] | None = None  # what there is of a model that is not whole
        self._unasked: dict[str, bool] = {}  # who gets updates without asking; True when it cannot ask, as we know

    @classmethod
    @asynccontextmanager
    async def of(cls, kit: Kit, patience: float) -> AsyncIterator["Selectors"]:
        """The selectors that a kit names. Proxies are taken from the environment, unless they could read what is sent.

        Only the authority of the kit is trusted; where it names none, those that the system trusts.
        """
        connector, secret = aiohttp.TCPConnector(ssl=_trusted(kit)), all(map(_is_secret, kit.selectors))
        async with aiohttp.ClientSession(
            connector=connector, trust_env=secret, trace_configs=[_tracing()], request_class=_Request
        ) as http:
            yield cls(kit, http, patience)

    async def check_in(self, ticket: str | None) -> CheckedIn:
        """Wait to be told what to do; `ticket` is of the update that is kept."""
        headers = {TICKET: ticket} if ticket else {}
        url = self._urls[0]
        async with self._asked("POST", CHECK_IN, headers=headers, timeout=_POLL) as reply:
            try:
                await _raise_problem(reply, _AT_CHECK_IN)
                return _decode_answer(await reply.read())
            except FedotaError as error:
                if error.problem.code in _NO_SELECTOR:
                    raise ClientError(f"{url} is not a selector. Download the join kit again.") from None
                raise
            except _NO_SENSE:
                raise NoAnswerError(f"what {url} says was not understood: is this client too old?") from None

    async def fetch(self, model: ModelRef) -> memoryview:
        """The weights, as yet unchecked. What came before a connection broke is not asked for again.

        Nor is it in the next call, where this one raised: who is put off by a crowded selector keeps what it has.
        """
        place = self._place(model)
        while place.received < model.size:
            before = place.received
            try:
                await self._fetch_rest(model, place)
            except NoAnswerError:
                if place.received <= before:
                    raise
        self._fetching = None
        return place.view

    def _place(self, model: ModelRef) -> Memory:
        if self._fetching is None or self._fetching[0] != model:
            self._fetching = None  # its memory may do for this one
            try:
                self._fetching = model, Memory(self._rooms.room(model.size))
            except MemoryError:
                raise ClientError(
                    f"The model has {model.size / 1e9:.1f} GB, for which this computer has no memory left. Take part "
                    "from one with more, or tell the people who run the problem if its model is smaller."
                ) from None
        return self._fetching[1]

    async def _fetch_rest(self, model: ModelRef, place: Memory) -> None:
        headers = {"Range": f"bytes={place.received}-"} if place.received else {}
        async with self._asked("GET", MODELS.format(sha256=model.sha256), headers=headers, timeout=_FETCH) as reply:
            await _raise_problem(reply, _AT_MODELS)
            start = place.received if reply.status == 206 else 0
            if reply.content_length != model.size - start:
                raise NoAnswerError("the model is not as large as it was announced")
            place.received = start
            try:
                await read_reply(reply, place)
            except FedotaError as error:  # it stalled: another selector may do better
                raise NoAnswerError(error.problem.detail) from None

    async def send(self, ticket: str, update: Update, seconds: float, *, begun: bool = False) -> None:
        """Send an update; `begun` when that was tried before. Raises `FedotaError` when it is refused.

        When the connection breaks it goes on where the selector's part of it ends.
        """
        deadline = monotonic() + max(0.0, seconds) + _LATE
        offset = await self._offset(ticket, update.size) if begun else 0
        while True:
            try:
                await self._send_rest(ticket, update, offset, deadline - monotonic())
                return
            except NoAnswerError:
                before, offset = offset, await self._offset(ticket, update.size)
                if offset <= before or monotonic() > deadline:
                    raise

    async def _send_rest(self, ticket: str, update: Update, offset: int, seconds: float) -> None:
        headers = {TICKET: ticket, EXAMPLES: str(update.examples), METRICS: update.metrics}
        if offset:
            headers |= {OFFSET: str(offset), WHOLE: str(update.size)}
        heard = _HEARD + update.size / _ADDED  # counted from the last byte of the body on
        timeout = aiohttp.ClientTimeout(total=max(_LATE, seconds), sock_connect=10, sock_read=heard)
        send = partial(self._bring, "PATCH" if offset else "POST", headers=headers, timeout=timeout)
        url = self._urls[0]
        try:
            # a selector asks for the body when it has a place for it: nothing is sent in vain
            if update.size >= _LARGE and url not in self._unasked:
                await self._send_when_asked(send, update, offset)
                return
        except _NeverAskedError:
            self._unasked[url] = True
        await send(data=Parts(update.parts, offset, deaf=_HEARD))
        if not self._unasked.get(url, True):
            del self._unasked[url]

    async def _send_when_asked(self, send: Callable[..., Awaitable[None]], update: Update, offset: int) -> None:
        """Raises `NoAnswerError` when nobody asks: the selector is gone, or what it says does not get here.

        Which of the two it was is not known. So the next one is sent unasked, and when that arrives we wait again.
        """
        url, clock = self._urls[0], asyncio.get_running_loop().time
        try:
            async with asyncio.timeout(None) as asked:
                body = Parts(update.parts, offset, begins=lambda: asked.reschedule(None), deaf=_HEARD)
                # not counted before it is sent: we may wait first, and have to connect
                await send(data=body, expect100=True, trace_request_ctx=lambda: asked.reschedule(clock() + _ASKED))
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

    async def _offset(self, ticket: str, size: int) -> int:
        """How much of the update the selector has; 0 also where it takes no more of it, which sending will tell.

        And where it says what cannot be, of an update of `size` bytes.
        """
        async with self._asked("HEAD", UPDATES, headers={TICKET: ticket}, timeout=_SHORT) as reply:
            text = reply.headers.get(OFFSET, "")
            offset = int(text) if reply.status == 204 and BYTES.fullmatch(text) else 0
            return offset if offset <= size else 0

    def turn(self) -> None:
        """Ask another selector from now on."""
        self._urls.append(self._urls.pop(0))
        self._broken = False

    async def pause(self, seconds: float) -> None:
        """Come back after so many seconds, not at the same moment as everybody else."""
        await asyncio.sleep(bounded(seconds) * random.uniform(1.0, 1.2))  # noqa: S311 - only spreads the requests

    async def _bring(self, method: str, **arguments: Any) -> None:
        async with self._asked(method, UPDATES, **arguments) as reply:
            await _raise_problem(reply, _AT_UPDATES)
            await reply.read()

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
            self._judge(error)
            self._failed(why, gone=isinstance(error, aiohttp.ClientConnectorError | TimeoutError | NoAnswerError))
            raise NoAnswerError(why) from None
        except FedotaError:
            self._answered()
            raise

    def _answered(self) -> None:
        self._silent_since, self._delay, self._broken = None, 0.0, False
        self._wrong.pop(self._urls[0], None)

    def _judge(self, error: Exception) -> None:
        """Raise `ClientError` when no selector of the kit shows a certificate that is good by it: waiting is no help.

        Not at once: whatever stands between may go.
        """
        if not isinstance(error, aiohttp.ClientConnectorCertificateError):
            self._wrong.pop(self._urls[0], None)
            return
        self._wrong.setdefault(self._urls[0], monotonic())
        if self._wrong.keys() >= set(self._urls) and monotonic() - max(self._wrong.values()) > _DISTRUST:
            raise ClientError(
                f"No selector can be trusted: {_in_words(error)}. If a new kit does not help, tell the people who run "
                "your network, and see that this computer's clock is right."
            )

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
                f"The training may have ended, or been started anew: look at {self._page}. If it runs, download the "
                "join kit again, and check the network."
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
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"{error.host}:{error.port} cannot be reached: {_reason(error.os_error)}"
    return str(error) or type(error).__name__


def _reason(error: OSError) -> str:
    """Why there is no connection, in the system's words; a negative or missing number is not the system's."""
    if isinstance(error, ssl.SSLError) or not error.errno or error.errno < 0:
        return error.strerror or str(error)
    return os.strerror(error.errno)


def _is_secret(url: str) -> bool:
    """Whether a proxy sees nothing of what is sent there; plain HTTP is spoken to this very machine alone."""
    return urlsplit(url).scheme == "https"


def _trusted(kit: Kit) -> ssl.SSLContext | bool:
    try:
        return client_context(kit.authority) if kit.authority else True
    except ValueError as error:
        raise ClientError(f"The join kit's authority cannot be used ({error}). Download it again.") from None


def bounded(seconds: float) -> float:
    """How long somebody waits whom a selector tells to wait for so many seconds, whatever it says."""
    return min(max(0.0, seconds), _LONGEST_PAUSE)


def _tracing() -> aiohttp.TraceConfig:
    """Calls what is a request's `trace_request_ctx` when it is sent: it is connected, and its headers go out."""

    async def sent(_: aiohttp.ClientSession, context: Any, __: aiohttp.TraceRequestHeadersSentParams) -> None:
        if context.trace_request_ctx is not None:
            context.trace_request_ctx()

    tracing = aiohttp.TraceConfig()
    tracing.on_request_headers_sent.append(sent)
    return tracing


async def _raise_problem(reply: aiohttp.ClientResponse, described: frozenset[str]) -> None:
    """Raise the refusal that this is, if it is one; `NoAnswerError` where its code is none of those `described`."""
    if reply.status < 300:
        return
    try:
        problem = msgspec.json.decode(await reply.read(), type=Problem)
    except _NO_SENSE:
        raise NoAnswerError(f"the selector answered with {reply.status}") from None
    if problem.code not in described:
        raise NoAnswerError(f"{reply.url} answered with {reply.status}: {problem.detail or problem.title}")
    raise FedotaError.of(problem)
