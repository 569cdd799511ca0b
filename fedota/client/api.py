"""The gateway's REST interface, for scripts of setters and organizations: one method an action."""

import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import aiohttp
import msgspec

from fedota.contracts.commands import AnnouncedFile, UploadSlot, UploadSlots
from fedota.contracts.kit import Kit
from fedota.errors import FedotaError, Problem
from fedota.events import Event, decode, to_json, uuid7
from fedota.events.problems import Plan
from fedota.events.storage import Role

_POSITION: Final = "Fedota-Position"
_CHUNK: Final = 1024 * 1024
_MOST: Final = 1000  # events in one page


class LocalFile(msgspec.Struct, frozen=True):
    """A file to be uploaded; exactly one of a problem's files has the role `model`."""

    path: Path
    role: Role = "other"

    def announced(self) -> AnnouncedFile:
        """What it is, before its upload."""
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return AnnouncedFile(name=self.path.name, size=self.path.stat().st_size, sha256=digest, role=self.role)


class Api:
    """A gateway as the holder of one token sees it. Errors are `FedotaError`, in the gateway's own words.

    Reads show what this object's own writes did: it asks for the position that they reached.
    """

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self._http = http
        self._url = url.rstrip("/")
        self._position = 0

    @classmethod
    @asynccontextmanager
    async def open(cls, url: str, token: str) -> AsyncIterator["Api"]:
        """The gateway at `url`."""
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {token}"}) as http:
            yield cls(http, url)

    def saw(self, position: int) -> None:
        """Make reads from now on show what had happened at this position of the log."""
        self._position = max(self._position, position)

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
        announced = [file.announced() for file in files]
        reply = await self._post(f"/api/problems/{problem_id}/uploads", {"files": announced})
        paths = {file.path.name: file.path for file in files}
        for slot in msgspec.convert(reply, UploadSlots).slots:
            await _put(slot, paths[slot.name])
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
        found: list[dict[str, Any]] = []
        after: int | None = 0
        while after is not None:
            page = await self._get(f"/api/problems/{problem_id}/rounds", after=after)
            found += page["rounds"]
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
        """A problem's events past position `after`, each once, as they happen. Ends when the connection does."""
        address = f"{self._url}/api/events/stream"
        params = {"problem": problem_id, "after": str(after)}
        timeout = aiohttp.ClientTimeout(total=None, sock_read=60)
        async with self._http.get(address, params=params, timeout=timeout) as reply:
            await _raise_refusal(reply)
            async for line in reply.content:
                if line.startswith(b"data: "):
                    yield decode(line[6:])

    async def download_model(self, problem_id: str, path: Path) -> None:
        """The newest checkpoint, into a file."""
        link = await self._get(f"/api/problems/{problem_id}/model")
        async with aiohttp.ClientSession() as http, http.get(link["url"]) as reply:
            reply.raise_for_status()
            with path.open("wb") as file:
                async for chunk in reply.content.iter_chunked(_CHUNK):
                    file.write(chunk)

    async def _get(self, path: str, **params: str | int) -> dict[str, Any]:
        params["at_least"] = self._position
        async with self._http.get(self._url + path, params=params) as reply:
            return await self._answer(reply)

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Idempotency-Key": str(uuid7())}
        async with self._http.post(self._url + path, data=to_json(body), headers=headers) as reply:
            return await self._answer(reply)

    async def _answer(self, reply: aiohttp.ClientResponse) -> dict[str, Any]:
        await _raise_refusal(reply)
        self.saw(int(reply.headers.get(_POSITION, 0)))
        answer: dict[str, Any] = msgspec.json.decode(await reply.read())
        return answer


async def _raise_refusal(reply: aiohttp.ClientResponse) -> None:
    if reply.status < 400:
        return
    if reply.content_type == "application/problem+json":
        raise FedotaError.of(msgspec.json.decode(await reply.read(), type=Problem))
    raise FedotaError("unavailable", f"{reply.url.origin()} answered {reply.status}, and not as a gateway does.")


async def _put(slot: UploadSlot, path: Path) -> None:
    with path.open("rb") as file:
        async with aiohttp.ClientSession() as http, http.put(slot.url, data=file, headers=slot.headers) as reply:
            if reply.status not in (200, 412):  # 412: the same bytes are there already
                raise FedotaError("file_rejected", f"The object store refused {path.name} ({reply.status}).")
