"""The selector's side of what selector and coordinator say to each other."""

import asyncio
import hashlib
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import aiohttp
import msgspec

from fedota.errors import FedotaError, Problem
from fedota.events import to_json
from fedota.runtime.places import Spooled, file_sha256
from fedota.runtime.protocol import (
    CLAIMS,
    MODELS,
    OFFSET,
    ORDERS,
    PARTIALS,
    STATES,
    SUM,
    Claim,
    Claimed,
    Meta,
    ModelRef,
    Orders,
    Told,
)
from fedota.runtime.receiving import read_reply
from fedota.runtime.sending import Parts
from fedota.tls import client_context

A = TypeVar("A")
_SHORT: Final = aiohttp.ClientTimeout(total=10)
# Between two heartbeats and the end of the lease there is time for two of these: one message may be swallowed.
_TELL: Final = aiohttp.ClientTimeout(total=4)
# A body that stalls is noticed sooner. An answer may wait for other sums to be added; one that never comes is given up.
_LONG: Final = aiohttp.ClientTimeout(total=3600, sock_connect=5, sock_read=40)
_GOES_ON: Final = frozenset({"unavailable", "timeout", "offset_mismatch"})  # after these some of a sum may be there


class Link:
    """Asks the coordinator. Whatever fails raises `FedotaError`: `unavailable` when it does not answer."""

    def __init__(self, url: str, key: str, name: str, life: str, authority: str = "") -> None:
        self._url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {key}"}
        self._name = name
        self._authority = authority
        self.life = life
        self._tag = ""
        self._begun = ""  # the sum that was sent last, or a part of it
        self._http: aiohttp.ClientSession

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Usable within this."""
        trusted = client_context(self._authority) if self._authority else True
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trusted)) as self._http:
            yield

    async def tell(self, told: Told) -> None:
        """Say how things stand here."""
        await self._send("POST", STATES, to_json(told), _TELL)

    async def orders(self) -> Orders | None:
        """New orders; None when there were none for some seconds."""
        headers = {**self._headers, "If-None-Match": self._tag} if self._tag else self._headers
        url = self._url + ORDERS.format(name=self._name)
        try:
            async with self._http.get(url, params={"life": self.life}, headers=headers, timeout=_SHORT) as reply:
                if reply.status == 304:
                    return None
                body = await _checked(reply)
                self._tag = reply.headers.get("ETag", "")
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _unavailable(error) from None
        return _decoded(body, Orders)

    async def claim(self, claim: Claim) -> Claimed:
        """Ask whether an update may be accepted here that another selector had asked for."""
        return _decoded(await self._send("POST", CLAIMS, to_json(claim), _SHORT), Claimed)

    async def hand_over(self, meta: Meta, numbers: memoryview) -> None:
        """Send a sum. Where the connection breaks, or broke the last time, it goes on with what is not there yet."""
        said = to_json(meta)
        parts = [memoryview(struct.pack("<Q", len(said)) + said), numbers]
        name, size = hashlib.sha256(parts[0]).hexdigest(), sum(map(len, parts))
        offset = await self._handed(name) if name == self._begun else 0
        self._begun = name
        while offset < size:
            try:
                await self._hand_rest(name, parts, offset, size)
                return
            except FedotaError as error:
                if error.problem.code not in _GOES_ON:
                    raise
                before, offset = offset, await self._handed(name)
                if offset <= before:
                    raise

    async def _hand_rest(self, name: str, parts: list[memoryview], offset: int, size: int) -> None:
        method = "PATCH" if offset else "PUT"
        headers = {SUM: name, "Content-Length": str(size - offset), **({OFFSET: str(offset)} if offset else {})}
        await self._send(method, PARTIALS, Parts(parts, offset), _LONG, headers)

    async def _handed(self, name: str) -> int:
        """How much of a sum the coordinator has. Raises `round_over` when it does not ask for it any more."""
        url, headers = self._url + PARTIALS.format(name=self._name), {**self._headers, SUM: name}
        try:
            async with self._http.head(url, headers=headers, timeout=_SHORT) as reply:
                status, there = reply.status, reply.headers.get(OFFSET, "")
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _unavailable(error) from None
        if status == 409:
            raise FedotaError("round_over", "The sum is not asked for any more.")
        if status in (404, 405):  # a coordinator from before sums could be gone on with
            return 0
        if status != 204 or not (there.isascii() and there.isdigit()):
            raise FedotaError("unavailable", f"The coordinator answered with {status}.")
        return int(there)

    async def fetch(self, model: ModelRef, path: Path) -> None:
        """Have the model in the file `path`, whole and checked, or not at all. What came before a break is kept."""
        draft = path.with_suffix(".new")
        place = Spooled.at(draft, model.size)
        try:
            if place.received < model.size:
                await self._download(model.sha256, place)
            await asyncio.to_thread(_keep, draft, model.sha256, path)
        finally:
            place.close()

    async def _download(self, sha256: str, place: Spooled) -> None:
        url = self._url + MODELS.format(sha256=sha256)
        headers = {**self._headers, **({"Range": f"bytes={place.received}-"} if place.received else {})}
        try:
            async with self._http.get(url, headers=headers, timeout=_LONG) as reply:
                if reply.status not in (200, 206):
                    await _checked(reply)
                if reply.status != 206:
                    place.received = 0
                await read_reply(reply, place)
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            raise _unavailable(error) from None

    async def _send(
        self,
        method: str,
        path: str,
        body: Any,
        timeout: aiohttp.ClientTimeout,
        headers: dict[str, str] | None = None,
    ) -> bytes:
        url = self._url + path.format(name=self._name)
        sent = {**self._headers, **(headers or {})}
        try:
            async with self._http.request(method, url, data=body, headers=sent, timeout=timeout) as reply:
                return await _checked(reply)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _unavailable(error) from None


def _keep(draft: Path, sha256: str, path: Path) -> None:
    if file_sha256(draft) != sha256:
        draft.unlink()
        raise FedotaError("unavailable", "The coordinator's model came damaged; it is fetched again.")
    draft.replace(path)


async def _checked(reply: aiohttp.ClientResponse) -> bytes:
    body = await reply.read()
    if reply.status < 400:
        return body
    try:
        raise FedotaError.of(msgspec.json.decode(body, type=Problem))
    except msgspec.DecodeError:
        raise FedotaError("unavailable", f"The coordinator answered with {reply.status}.") from None


def _decoded(body: bytes, kind: type[A]) -> A:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError:
        raise FedotaError("unavailable", "Something else answers at the coordinator's address.") from None


def _unavailable(error: Exception) -> FedotaError:
    return FedotaError("unavailable", f"The coordinator does not answer ({str(error) or type(error).__name__}).")
