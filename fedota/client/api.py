"""The gateway's REST interface, for scripts of setters and organizations: one method an action."""

import asyncio
import hashlib
import random
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from time import monotonic
from typing import Any, Final, Self
from urllib.parse import quote, urlsplit

import aiohttp
import msgspec

from fedota.contracts.commands import AnnouncedFile, UploadSlot, UploadSlots
from fedota.contracts.kit import Kit
from fedota.errors import FedotaError, Problem
from fedota.events import Event, decode, to_json, uuid7
from fedota.events.problems import Plan
from fedota.events.rounds import Checkpoint
from fedota.events.storage import Role

_POSITION: Final = "Fedota-Position"
_CHUNK: Final = 1024 * 1024
_MOST: Final = 1000  # events in one page
_LONGEST_LINE: Final = 16 * 1024 * 1024  # of the stream of events; aiohttp refuses lines of over 128 KiB by itself
_REQUEST: Final = aiohttp.ClientTimeout(total=30)
# Files and streams: aiohttp's own `total`, 5 minutes, would cut them off. `sock_read` counts once a body is sent.
_LONG: Final = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
_PASSING: Final = frozenset({"unavailable", "timeout"})  # errors that another try may not meet
_FIRST_DELAY: Final = 0.2
_LONGEST_DELAY: Final = 10.0


class LocalFile(msgspec.Struct, frozen=True):
    """A file to be uploaded; exactly one of a problem's files has the role `model`."""

    path: Path
    role: Role = "other"

    def announced(self) -> AnnouncedFile:
        """What it is, before its upload."""
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return AnnouncedFile(name=self.path.name, size=self.path.stat().st_size, sha256=digest, role=self.role)


class Gateway:
    """A gateway as the holder of one token reaches it. Errors are `FedotaError`, in the gateway's own words.

    Who does not answer is `unavailable`. Requests that end so, or with `timeout`, are repeated while patience lasts.
    """

    def __init__(self, http: aiohttp.ClientSession, url: str, patience: float) -> None:
        self._http = http
        self._url = url.rstrip("/")
        self._patience = patience
        self._position = 0

    @classmethod
    @asynccontextmanager
    async def open(cls, url: str, token: str, *, patience: float = 120.0) -> AsyncIterator[Self]:
        """The gateway at `url`. No request is repeated later than `patience` seconds after it was first made."""
        headers = {"Authorization": f"Bearer {token}"}
        async with aiohttp.ClientSession(headers=headers, timeout=_REQUEST) as http:
            yield cls(http, url, patience)

    def saw(self, position: int) -> None:
        """Make reads from now on show what had happened at this position of the log."""
        self._position = max(self._position, position)

    async def _get(self, path: str, **params: str | int) -> dict[str, Any]:
        return await self._ask("GET", path, params={**params, "at_least": self._position})

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Idempotency-Key": str(uuid7())}
        return await self._ask("POST", path, data=to_json(body), headers=headers)

    async def _ask(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        """The answer to a request, which is repeated as it is while that may help and patience lasts."""
        return await self._asked(method, path, self._patience, **request)

    async def _asked(self, method: str, path: str, patience: float, **request: Any) -> dict[str, Any]:
        end, delay = monotonic() + patience, _FIRST_DELAY
        while True:
            try:
                with _reaching(self._url):
                    async with self._http.request(method, self._url + path, **request) as reply:
                        return await self._answer(reply)
            except FedotaError as error:
                spread = random.uniform(1.0, 1.5)  # noqa: S311 - not everybody comes back at the same moment
                pause = max(delay, error.problem.retry_after or 0) * spread
                if error.problem.code not in _PASSING or monotonic() + pause > end:
                    raise
            await asyncio.sleep(pause)
            delay = min(2 * delay, _LONGEST_DELAY)

    async def _answer(self, reply: aiohttp.ClientResponse) -> dict[str, Any]:
        await _raise_refusal(reply)
        try:
            answer: dict[str, Any] = msgspec.json.decode(await reply.read(), type=dict[str, Any])
        except msgspec.DecodeError:
            raise _stranger(reply) from None
        self.saw(int(reply.headers.get(_POSITION, 0)))
        return answer

    async def _stream(self, params: Mapping[str, str] | Sequence[tuple[str, str]]) -> AsyncGenerator[bytes, None]:
        """The events that `params` ask for as they come, each a CloudEvent in JSON; b"" is a sign of life."""
        address = f"{self._url}/api/events/stream"
        with _reaching(self._url):
            async with self._http.get(address, params=params, timeout=_LONG, read_bufsize=_LONGEST_LINE) as reply:
                await _raise_refusal(reply)
                async for line in reply.content:
                    if line.startswith(b"data: "):
                        yield line[6:].rstrip(b"\n")
                    elif line.startswith(b":"):
                        yield b""


class Api(Gateway):
    """What setters and organizations do at a gateway.

    Reads show what this object's own writes did: it asks for the position that they reached. A write takes effect once,
    however often it is repeated.
    """

    async def create_problem(
        self, *, name: str, description: str, data_format: str, client_image: str, plan: Plan
    ) -> str:
        """Publish a problem; its id."""
        body = {
            "name": name,
            "description": description,
            "data_format": data_format,
            "client_image": client_image,
            "plan": plan,
        }
        made: str = (await self._post("/api/problems", body))["problem_id"]
        return made

    async def problem(self, problem_id: str) -> dict[str, Any]:
        """A problem with all that is known of it now."""
        return await self._get(f"/api/problems/{problem_id}")

    async def upload(self, problem_id: str, files: Sequence[LocalFile]) -> None:
        """Upload files straight to the object store, and have them verified and stored."""
        announced = [await asyncio.to_thread(file.announced) for file in files]
        reply = await self._post(f"/api/problems/{problem_id}/uploads", {"files": announced})
        local = {known.name: (file, known) for file, known in zip(files, announced, strict=True)}
        for slot in msgspec.convert(reply, UploadSlots).slots:
            await _upload(slot, *local[slot.name])
        await self._post(f"/api/problems/{problem_id}/files", {"files": announced})

    async def start(self, problem_id: str) -> None:
        """Ask for the training to begin."""
        await self._post(f"/api/problems/{problem_id}/start", {})

    async def stop(self, problem_id: str, reason: str) -> None:
        """End the training."""
        await self._post(f"/api/problems/{problem_id}/stop", {"reason": reason})

    async def request_participation(self, problem_id: str, organization: str) -> None:
        """Ask to take part."""
        await self._post(f"/api/problems/{problem_id}/participations", {"organization": organization})

    async def approve_participation(self, problem_id: str, organization: str) -> None:
        """Let an organization in."""
        await self._post(f"/api/problems/{problem_id}/participations/{quote(organization)}/approve", {})

    async def kit(self, problem_id: str, organization: str) -> Kit:
        """The join kit of an approved organization."""
        kit = await self._get(f"/api/problems/{problem_id}/participations/{quote(organization)}/kit")
        return msgspec.convert(kit, Kit)

    async def infrastructure(self, problem_id: str) -> dict[str, Any]:
        """Coordinator and selectors."""
        return await self._get(f"/api/problems/{problem_id}/infrastructure")

    async def rounds(self, problem_id: str) -> list[dict[str, Any]]:
        """The attempts of the newest run's rounds, in order."""
        return await self._pages(f"/api/problems/{problem_id}/rounds", "rounds")

    async def contributions(self, problem_id: str, organization: str = "") -> list[dict[str, Any]]:
        """What organizations, or one of them, gave to the newest run's rounds, in order.

        An organization that asks sees its own.
        """
        asked = {"organization": organization} if organization else {}
        return await self._pages(f"/api/problems/{problem_id}/contributions", "contributions", **asked)

    async def _pages(self, path: str, name: str, **params: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        after: int | None = 0
        while after is not None:
            page = await self._get(path, after=after, **params)
            found += page[name]
            after = page["next"]
        return found

    async def events(self, problem_id: str) -> list[Event]:
        """All events of a problem, as far as the log goes now."""
        found: list[Event] = []
        while True:
            after = found[-1].position if found else 0
            page = await self._get("/api/events", problem=problem_id, after=after, limit=_MOST)
            if not page["events"]:
                return found
            found += [decode(to_json(event)) for event in page["events"]]

    async def follow(self, problem_id: str, after: int = 0) -> AsyncGenerator[Event, None]:
        """A problem's events past position `after`, each once, as they happen; ends when the gateway ends the stream.

        Raises `FedotaError`: a refusal, or `unavailable` when the connection breaks. Nothing is repeated here: go on
        from the position of the last event.
        """
        async for body in self._stream({"problem": problem_id, "after": str(after)}):
            if body:
                yield decode(body)

    async def download_model(self, problem_id: str, path: Path) -> None:
        """Have the newest checkpoint in the file `path`: whole and checked, or `path` stays as it was."""
        link = await self._get(f"/api/problems/{problem_id}/model")
        draft = path.with_name(f"{path.name}.{uuid7()}.new")
        try:
            await _download(link["url"], msgspec.convert(link, Checkpoint), draft)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)


@contextmanager
def _reaching(who: str) -> Iterator[None]:
    """Say in words that a connection to `who` could not be made, or broke."""
    try:
        yield
    except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError):
        raise FedotaError("invalid_request", f"{who} is not an address. Give one like http://127.0.0.1:8080.") from None
    except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
        why = str(error) or type(error).__name__
        raise FedotaError(
            "unavailable", f"{who} does not answer ({why}). Check the address and the network, and try again."
        ) from None


async def _raise_refusal(reply: aiohttp.ClientResponse) -> None:
    if reply.status < 400:
        return
    try:
        problem = msgspec.json.decode(await reply.read(), type=Problem)
    except msgspec.DecodeError:
        raise _stranger(reply) from None
    wait = _retry_after(reply) if problem.retry_after is None else problem.retry_after
    raise FedotaError.of(msgspec.structs.replace(problem, retry_after=wait))


def _stranger(reply: aiohttp.ClientResponse) -> FedotaError:
    """What is wrong when the answer is no gateway's: a proxy whose gateway is gone, or the wrong address."""
    said = f"{reply.url.origin()} answered {reply.status}, and not as a gateway does."
    if reply.status == 429 or reply.status >= 500:
        return FedotaError("unavailable", f"{said} Try again in a moment.", retry_after=_retry_after(reply))
    return FedotaError("invalid_request", f"{said} Check the address.")


def _retry_after(reply: aiohttp.ClientResponse) -> int | None:
    """Seconds; the header's other form, a date, is left to the growing delay."""
    text = reply.headers.get("Retry-After", "")
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else None


def _store(url: str) -> str:
    """The object store that a signed URL leads to, without the signature: that one is a secret."""
    return f"The object store at {urlsplit(url).netloc}"


async def _upload(slot: UploadSlot, file: LocalFile, announced: AnnouncedFile) -> None:
    """Put a file where its slot says. When that fails, whether the file is still the announced one says why."""
    try:
        await _put(slot, file.path)
    except FedotaError:
        if await asyncio.to_thread(file.announced) == announced:
            raise
        raise FedotaError(
            "file_rejected", f"{file.path} changed while it was uploaded. Let nothing write to it, and upload it again."
        ) from None


async def _put(slot: UploadSlot, path: Path) -> None:
    store = _store(slot.url)
    with path.open("rb") as file, _reaching(store):
        async with (
            aiohttp.ClientSession(timeout=_LONG) as http,
            http.put(slot.url, data=file, headers=slot.headers, allow_redirects=False) as reply,
        ):
            if reply.status in (200, 412):  # 412: the same bytes are there already
                return
            if reply.status >= 500:
                raise FedotaError("unavailable", f"{store} answered {reply.status}. Upload {path.name} again.")
            raise FedotaError(
                "file_rejected",
                f"{store} refused {path.name} ({reply.status}). Its upload slot may have expired: upload it again.",
            )


async def _download(url: str, wanted: Checkpoint, draft: Path) -> None:
    """Have exactly the wanted bytes in the file `draft`."""
    store, digest, size = _store(url), hashlib.sha256(), 0
    with draft.open("wb") as file, _reaching(store):
        async with aiohttp.ClientSession(timeout=_LONG) as http, http.get(url, allow_redirects=False) as reply:
            if reply.status != 200:
                raise FedotaError("unavailable", f"{store} did not give the model ({reply.status}). Ask for it again.")
            async for chunk in reply.content.iter_chunked(_CHUNK):
                size += len(chunk)
                if size > wanted.size:
                    break
                digest.update(chunk)
                file.write(chunk)
    if (size, digest.hexdigest()) != (wanted.size, wanted.sha256):
        raise FedotaError(
            "file_rejected",
            f"{store} gave another model than the recorded one: its size or SHA-256 differs. Download it again.",
        )
