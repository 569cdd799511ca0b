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
from fedota.runtime.bodies import pieces, read_reply
from fedota.runtime.protocol import (
    CLAIMS,
    MODELS,
    ORDERS,
    PARTIALS,
    STATES,
    Claim,
    Claimed,
    Meta,
    ModelRef,
    Orders,
    Told,
)
from fedota.runtime.tensors import room

A = TypeVar("A")
_SHORT: Final = aiohttp.ClientTimeout(total=10)
_LONG: Final = aiohttp.ClientTimeout(total=3600, sock_connect=5)  # a body that stalls is noticed sooner


class Link:
    """Asks the coordinator. Whatever fails raises `FedotaError`: `unavailable` when it does not answer."""

    def __init__(self, url: str, key: str, name: str, life: str) -> None:
        self._url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {key}"}
        self._name = name
        self.life = life
        self._tag = ""
        self._http: aiohttp.ClientSession

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Usable within this."""
        async with aiohttp.ClientSession() as self._http:
            yield

    async def tell(self, told: Told) -> None:
        """Say how things stand here."""
        await self._send("POST", STATES, to_json(told), _SHORT)

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
        """Send a sum."""
        head = to_json(meta)
        body = pieces([memoryview(struct.pack("<Q", len(head)) + head), numbers])
        await self._send("PUT", PARTIALS, body, _LONG, {"Content-Length": str(8 + len(head) + len(numbers))})

    async def fetch(self, model: ModelRef, path: Path) -> None:
        """Have the model in the file `path`, whole and checked, or not at all."""
        body = room(model.size)
        url = self._url + MODELS.format(sha256=model.sha256)
        try:
            async with self._http.get(url, headers=self._headers, timeout=_LONG) as reply:
                if reply.status != 200:
                    await _checked(reply)
                await read_reply(reply, body)
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            raise _unavailable(error) from None
        await asyncio.to_thread(_keep, body, model.sha256, path)

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


def _keep(body: memoryview, sha256: str, path: Path) -> None:
    if hashlib.sha256(body).hexdigest() != sha256:
        raise FedotaError("unavailable", "The coordinator's model came damaged; it is fetched again.")
    draft = path.with_suffix(".new")
    draft.write_bytes(body)
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
