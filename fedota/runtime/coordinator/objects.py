"""The object store by presigned URLs: models are fetched and checked, checkpoints stored with their manifest."""

import os
import re
from pathlib import Path
from typing import Final

import aiohttp
import structlog
from multidict import CIMultiDict

from fedota.contracts.runtime import Presigned, PresignRequest
from fedota.runtime.coordinator.inspection import Tell, digest, portion
from fedota.runtime.coordinator.platform import Platform
from fedota.runtime.sending import Parts

_PIECE: Final = 1 << 20
# A body that stalls is asked for again before a launcher takes whoever waits for it to be stuck.
_GET: Final = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=20)
_PUT: Final = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60)
_THERE: Final = 412  # the object is there already: its key is made of its content
_CODE: Final = re.compile(r"<Code>([A-Za-z]{1,64})</Code>")
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
        self._furthest = 0  # bytes of a model that were ever here

    async def fetch(self, key: str, sha256: str, size: int, path: Path, tell: Tell = lambda _: None) -> None:
        """Have the model in the file `path`, whole and checked, or not at all. What came before a break is kept.

        `tell` hears how far it is; nothing where it begins anew, until it is further than before: a download that never
        comes to its end is no progress.
        """
        signed = await self._platform.presign(PresignRequest(method="GET", key=key))
        draft = path.with_suffix(".new")
        went_on = draft.exists()
        await self._download(key, signed, size, draft, tell)
        if draft.stat().st_size != size or await digest(draft, tell) != sha256:
            draft.unlink()
            if went_on:  # what an earlier life had left may be damaged, which says nothing of the object
                raise StoreError(f"what was here of {key} is damaged; it is fetched anew")
            raise WrongObjectError(f"{key} is not the object that was recorded: its size or SHA-256 differs")
        draft.replace(path)

    async def _download(self, key: str, signed: Presigned, size: int, draft: Path, tell: Tell) -> None:
        have = draft.stat().st_size if draft.exists() else 0
        if have > size:
            os.truncate(draft, have := 0)
        headers = {**signed.headers, **({"Range": f"bytes={have}-"} if 0 < have < size else {})}
        if have == size:
            return
        try:
            async with self._http.get(signed.url, headers=headers, timeout=_GET) as reply:
                if reply.status not in (200, 206):
                    raise StoreError(f"GET of {key} was answered with {reply.status}")
                goes_on = reply.headers.get("Content-Range", "").startswith(f"bytes {have}-")
                with draft.open("ab" if reply.status == 206 and goes_on else "wb") as file:
                    async for piece in reply.content.iter_chunked(_PIECE):
                        if file.tell() + len(piece) > size:
                            raise WrongObjectError(f"{key} is larger than the {size} bytes that were recorded")
                        file.write(piece)
                        if file.tell() > self._furthest:
                            self._furthest = file.tell()
                            tell(f"the model: {portion(self._furthest, size)} fetched")
        except (aiohttp.ClientError, TimeoutError) as error:
            raise StoreError(f"GET of {key} failed: {_said(error)}") from None

    async def store(self, key: str, body: memoryview, sha256: str) -> None:
        """Have exactly these bytes at `key`."""
        request = PresignRequest(method="PUT", key=key, size=len(body), sha256=sha256)
        signed = await self._platform.presign(request)
        headers = CIMultiDict(signed.headers)
        headers["Content-Length"] = str(len(body))
        try:
            async with self._http.put(
                signed.url, data=Parts([body]), headers=headers, timeout=_PUT, skip_auto_headers={"Content-Type"}
            ) as reply:
                if reply.status >= 300 and reply.status != _THERE:
                    text = await reply.text(errors="replace")
                    _log.warning("the object store refused", key=key, status=reply.status, reply=text[:1000])
                    raise StoreError(f"PUT of {key} was answered with {reply.status}{_code(text)}")
        except (aiohttp.ClientError, TimeoutError) as error:
            raise StoreError(f"PUT of {key} failed: {_said(error)}") from None


def _said(error: Exception) -> str:
    """What went wrong, not in the error's own words: those may hold the URL, and with it the right to use it."""
    number = error.errno if isinstance(error, OSError) else None
    return os.strerror(number) if number and number > 0 else type(error).__name__


def _code(text: str) -> str:
    """S3's code of an error; the rest names hosts and keys, differs with each answer, and is not for everybody."""
    found = _CODE.search(text)
    return f" ({found[1]})" if found else ""
