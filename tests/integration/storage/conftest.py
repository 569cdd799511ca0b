"""Storage between real servers; setters and coordinators are played by the tests."""

import asyncio
import hashlib
import io
import os
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
import msgspec
import numpy as np
import pytest
from minio import Minio
from minio.error import S3Error
from safetensors.numpy import save

from fedota.contracts.commands import (
    AnnouncedFile,
    Download,
    PrepareUpload,
    PresignDownload,
    StoreFiles,
    UploadSlot,
    UploadSlots,
)
from fedota.contracts.runtime import Ready
from fedota.events import EventData
from fedota.events.storage import Role
from fedota.kernel.settings import Secret
from services.storage.app import create_app
from services.storage.settings import Settings
from tests.support.door import Door
from tests.support.servers import RunningServers
from tests.support.services import Platform, Running, new_id, running, until

MODEL: Final = save({"w": np.ones((2, 3), "f4")})
DATA: Final = b"a,b\n1,2\n"
AUTOMATIC: Final = ["Content-Type", "Accept", "Accept-Encoding", "User-Agent"]


def announced(name: str, body: bytes, role: Role = "other") -> AnnouncedFile:
    """A file as its setter announces it."""
    return AnnouncedFile(name=name, size=len(body), sha256=hashlib.sha256(body).hexdigest(), role=role)


FILES: Final = [announced("model.safetensors", MODEL, "model"), announced("data.csv", DATA)]
BODIES: Final = {"model.safetensors": MODEL, "data.csv": DATA}


def key_of(problem_id: str, file: AnnouncedFile) -> str:
    """Where a file lies."""
    return f"problems/{problem_id}/files/{file.sha256}/{file.name}"


class World:
    """The platform, the object store behind its door, and somebody who uploads past both."""

    def __init__(self, platform: Platform, door: Door, directory: Path) -> None:
        self.platform = platform
        self.door = door
        self.directory = directory
        self.s3 = platform.servers.s3
        self.bucket: str = self.s3.bucket
        self.admin = Minio(
            endpoint=urlsplit(self.s3.url).netloc,
            access_key=self.s3.access_key,
            secret_key=self.s3.secret_key,
            secure=False,
            region="us-east-1",
        )

    def settings(self, **more: Any) -> Settings:
        """Storage's own; it goes through the door, people do not."""
        keys = {"s3_access_key": Secret(self.s3.access_key), "s3_secret_key": Secret(self.s3.secret_key)}
        places = {"s3_url": self.door.url, "s3_public_url": self.s3.url, "s3_bucket": self.bucket}
        return self.platform.settings(Settings, "storage", **{**keys, **places, **more})

    @asynccontextmanager
    async def running(self, **more: Any) -> AsyncIterator[Running]:
        """Storage in the test's process, ready."""
        async with running(create_app, self.settings(**more)) as service:
            await self.ready(service.url)
            yield service

    @asynccontextmanager
    async def process(self) -> AsyncIterator["Spawned"]:
        """Storage as a process of its own, ready; killed in the end."""
        directory = self.directory / new_id()
        directory.mkdir(mode=0o700)
        spawned = await Spawned.start(directory, self.settings(directory=directory))
        try:
            await self.ready(spawned.url)
            yield spawned
        finally:
            await spawned.kill()

    async def ready(self, url: str) -> None:
        """Return when all checks pass."""

        async def no_failures() -> bool:
            return not await failures(url)

        await until(no_failures, "storage is ready")

    async def prepare(self, problem_id: str, files: list[AnnouncedFile]) -> list[UploadSlot]:
        """Ask for slots."""
        reply = await self.platform.send(PrepareUpload(problem_id=problem_id, files=files))
        return msgspec.convert(reply.result, UploadSlots).slots

    async def upload(self, problem_id: str, files: list[AnnouncedFile], bodies: Mapping[str, bytes]) -> None:
        """PUT each file to its slot."""
        for slot in await self.prepare(problem_id, files):
            assert await put(slot.url, bodies[slot.name], slot.headers) == 200

    async def store(self, problem_id: str, files: list[AnnouncedFile], bodies: Mapping[str, bytes]) -> int:
        """The whole way; the position that it reached."""
        await self.upload(problem_id, files, bodies)
        return (await self.platform.send(StoreFiles(problem_id=problem_id, files=files))).position

    async def plant(self, key: str, body: bytes) -> None:
        """What an S3 that checks less than ours would have taken."""
        await asyncio.to_thread(self.admin.put_object, self.bucket, key, io.BytesIO(body), len(body))

    async def object(self, key: str) -> bytes | None:
        """What lies in the store; None when nothing does."""
        try:
            response = await asyncio.to_thread(self.admin.get_object, self.bucket, key)
        except S3Error as error:
            assert error.code == "NoSuchKey"
            return None
        with response:
            return response.read()

    async def manifest(self, problem_id: str, version: int) -> Any:
        """The problem's manifest, once it stands for that version of its stream."""

        async def written() -> Any:
            body = await self.object(f"problems/{problem_id}/files/manifest.json")
            found = msgspec.json.decode(body) if body else None
            return found if found and found["version"] == version else None

        return await until(written, f"the manifest of version {version}")

    async def download(self, problem_id: str, key: str) -> str:
        """A link."""
        reply = await self.platform.send(PresignDownload(problem_id=problem_id, key=key))
        return msgspec.convert(reply.result, Download).url

    async def events(self, problem_id: str) -> list[EventData]:
        """What storage has said of the problem."""
        return [event.data for event in await self.platform.events(f"storage/{problem_id}")]


class Spawned:
    """Storage as a process of its own."""

    def __init__(self, process: Process, url: str, log: Path) -> None:
        self._process = process
        self.url = url
        self.log = log

    @classmethod
    async def start(cls, directory: Path, settings: Settings) -> "Spawned":
        """It runs, and has said where."""
        file = directory / "settings.json"
        file.write_bytes(msgspec.json.encode(settings, enc_hook=_told))
        file.chmod(0o600)
        environment = {**os.environ, "FEDOTA_SETTINGS": str(file)}
        log = directory / "log"
        with log.open("wb") as output:
            argv = (sys.executable, "-m", "services.storage")
            process = await asyncio.create_subprocess_exec(*argv, env=environment, stderr=output)

        async def announced_itself() -> Ready | None:
            assert process.returncode is None, log.read_text()
            path = directory / "ready.json"
            return msgspec.json.decode(path.read_bytes(), type=Ready) if path.exists() else None

        ready: Ready = await until(announced_itself, "storage has announced itself")
        return cls(process, ready.url, log)

    def peak(self) -> int:
        """The most memory that it ever had, in bytes."""
        for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("this kernel does not tell")

    async def kill(self) -> None:
        """End it as a crash would. Harmless when it is over."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()


def _told(value: Any) -> str:
    return value.reveal() if isinstance(value, Secret) else str(value)


async def put(url: str, body: Any, headers: Mapping[str, str]) -> int:
    """The status with which S3 answers a PUT that has these headers and no others."""
    return await asked("PUT", url, data=body, headers=headers)


async def asked(method: str, url: str, **more: Any) -> int:
    """The status of a request without any credentials but the URL's own."""
    async with (
        aiohttp.ClientSession(skip_auto_headers=AUTOMATIC) as session,
        session.request(method, url, **more) as reply,
    ):
        await reply.read()
        return reply.status


async def got(url: str) -> bytes:
    """What lies behind a link."""
    async with aiohttp.ClientSession(raise_for_status=True) as session, session.get(url) as reply:
        return await reply.read()


async def failures(url: str) -> dict[str, str]:
    """What is not ready in a service, and why."""
    async with aiohttp.ClientSession() as session, session.get(f"{url}/readyz") as reply:
        body = await reply.json()
        assert (reply.status == 200) == (not body["failing"])
        failing: dict[str, str] = body["failing"]
        return failing


@pytest.fixture
async def world(servers: RunningServers, migrated_url: str, tmp_path: Path) -> AsyncIterator[World]:
    """Everything but storage; the door to the object store is open."""
    async with Platform.open(servers, migrated_url) as platform, Door.to(servers.s3.url) as door:
        await door.open()
        yield World(platform, door, tmp_path)


@pytest.fixture
async def storage(world: World) -> AsyncIterator[World]:
    """With storage running in the test's process."""
    async with world.running():
        yield world


@pytest.fixture
def problem_id() -> str:
    """A problem that nobody has heard of."""
    return new_id()
