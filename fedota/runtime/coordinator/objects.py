"""The object store by presigned URLs: models are fetched and checked, checkpoints stored with their manifest."""

import hashlib
from pathlib import Path
from typing import Final

import aiohttp
import structlog
from multidict import CIMultiDict

from fedota.contracts.runtime import PresignRequest
from fedota.runtime.bodies import pieces
from fedota.runtime.coordinator.platform import Platform

_PIECE: Final = 1 << 20
_TIMEOUT: Final = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60)
_THERE: Final = 412  # the object is there already: its key is made of its content
_log = structlog.get_logger(__name__)


class StoreError(Exception):
    """The object store did not do what it was asked; worth another try."""


class WrongObjectError(Exception):
    """An object is not what was recorded of it; no other try would change that."""


class Objects:
    """A problem's objects."""

    def __init__(self, platform: Platform, http: aiohttp.ClientSession) -> None:
        self._platform = platform
        self._http = http

    async def fetch(self, key: str, sha256: str, size: int, path: Path) -> None:
        """Have the object in the file `path`, whole and checked, or not at all."""
        signed = await self._platform.presign(PresignRequest(method="GET", key=key))
        draft, digest, received = path.with_suffix(".new"), hashlib.sha256(), 0
        try:
            async with self._http.get(signed.url, headers=signed.headers, timeout=_TIMEOUT) as reply:
                if reply.status != 200:
                    raise StoreError(f"GET of {key} was answered with {reply.status}")
                with draft.open("wb") as file:
                    async for piece in reply.content.iter_chunked(_PIECE):
                        received += len(piece)
                        if received > size:
                            raise WrongObjectError(f"{key} is larger than the {size} bytes that were recorded")
                        digest.update(piece)
                        file.write(piece)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise StoreError(f"GET of {key} failed: {str(error) or type(error).__name__}") from None
        if received != size or digest.hexdigest() != sha256:
            raise WrongObjectError(f"{key} is not the object that was recorded: its size or SHA-256 differs")
        draft.replace(path)

    async def store(self, key: str, body: memoryview, sha256: str) -> None:
        """Have exactly these bytes at `key`."""
        request = PresignRequest(method="PUT", key=key, size=len(body), sha256=sha256)
        signed = await self._platform.presign(request)
        headers = CIMultiDict(signed.headers)
        headers["Content-Length"] = str(len(body))
        try:
            async with self._http.put(
                signed.url, data=pieces([body]), headers=headers, timeout=_TIMEOUT, skip_auto_headers={"Content-Type"}
            ) as reply:
                if reply.status >= 300 and reply.status != _THERE:
                    raise StoreError(f"PUT of {key} was answered with {reply.status}: {(await reply.text())[:200]}")
        except (aiohttp.ClientError, TimeoutError) as error:
            raise StoreError(f"PUT of {key} failed: {str(error) or type(error).__name__}") from None
