"""A client's way to the selectors: one that answers is kept to, another is tried when it does not."""

import asyncio
import random
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any, Final

import aiohttp
import msgspec

from fedota.client.errors import ClientError
from fedota.client.train import Update
from fedota.contracts.kit import Kit
from fedota.errors import FedotaError, Problem
from fedota.runtime.bodies import pieces, read_reply
from fedota.runtime.protocol import CHECK_IN, CLIENT, EXAMPLES, METRICS, MODELS, TICKET, UPDATES, CheckedIn, ModelRef
from fedota.runtime.tensors import room

_POLL: Final = aiohttp.ClientTimeout(total=90, sock_connect=10)
_FETCH: Final = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60)
_LATE: Final = 60.0  # seconds past a round's end that an answer to an update is still awaited
_FIRST_DELAY: Final = 0.2
_LONGEST_DELAY: Final = 15.0
_decode_answer: Final[Callable[[bytes], CheckedIn]] = msgspec.json.Decoder(CheckedIn).decode


class NoAnswerError(Exception):
    """The selector that was asked did not answer; the next request goes to another one."""


class Selectors:
    """Asks one selector at a time. Raises `ClientError` when none has answered for `patience` seconds."""

    def __init__(self, kit: Kit, http: aiohttp.ClientSession, patience: float) -> None:
        self._http = http
        self._urls = random.sample(kit.selectors, len(kit.selectors))  # spread: not everybody asks the first
        self._headers = {"Authorization": f"Bearer {kit.token}", CLIENT: secrets.token_hex(8)}
        self._patience = patience
        self._silent_since: float | None = None
        self._delay = 0.0

    @classmethod
    @asynccontextmanager
    async def of(cls, kit: Kit, patience: float) -> AsyncIterator["Selectors"]:
        """The selectors that a kit names. Proxies are taken from the environment."""
        async with aiohttp.ClientSession(trust_env=True) as http:
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
        """The weights, as yet unchecked."""
        body = room(model.size)
        async with self._asked("GET", MODELS.format(sha256=model.sha256), timeout=_FETCH) as reply:
            await _raise_problem(reply)
            if reply.content_length != model.size:
                raise NoAnswerError("the model is not as large as it was announced")
            await read_reply(reply, body)
        return body

    async def send(self, ticket: str, update: Update, seconds: float) -> None:
        """Send an update. Raises `FedotaError` when it is refused."""
        headers = {
            TICKET: ticket,
            EXAMPLES: str(update.examples),
            METRICS: update.metrics,
            "Content-Length": str(update.size),
            "Content-Type": "application/octet-stream",
        }
        timeout = aiohttp.ClientTimeout(total=max(0.0, seconds) + _LATE, sock_connect=10)
        await self._ask("POST", UPDATES, headers=headers, timeout=timeout, data=pieces(update.parts))

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
                if reply.status >= 300 and reply.content_type != "application/problem+json":
                    raise NoAnswerError(f"{url} answered with {reply.status}")  # something else stands there
                yield reply
            self._answered()
        except (aiohttp.ClientError, TimeoutError, ConnectionError, NoAnswerError) as error:
            self._next(str(error) or type(error).__name__)
            raise NoAnswerError(str(error) or type(error).__name__) from None
        except FedotaError:
            self._answered()
            raise

    def _answered(self) -> None:
        self._silent_since, self._delay = None, 0.0

    async def _back_off(self) -> None:
        if self._delay:
            await asyncio.sleep(self._delay * random.uniform(0.5, 1.0))  # noqa: S311 - only spreads the requests

    def _next(self, why: str) -> None:
        """Turn to the next selector; the wait grows with each round in which none answers."""
        # Counted from the first request that failed: while a client trains for hours, nobody is silent.
        self._silent_since = self._silent_since or monotonic()
        silent = monotonic() - self._silent_since
        if silent > self._patience:
            tried = ", ".join(self._urls)
            raise ClientError(
                f"No selector answered for {silent:.0f} seconds (tried: {tried}; the last said: {why}). "
                "Check the network and whether the training is still running."
            )
        self._urls.append(self._urls.pop(0))
        self._delay = min(1.5 * self._delay + _FIRST_DELAY / len(self._urls), _LONGEST_DELAY, self._patience)


async def _raise_problem(reply: aiohttp.ClientResponse) -> None:
    if reply.status < 300:
        return
    try:
        raise FedotaError.of(msgspec.json.decode(await reply.read(), type=Problem))
    except msgspec.DecodeError:
        raise NoAnswerError(f"the selector answered with {reply.status}") from None
