"""What a scenario stands on: PostgreSQL and NATS of its own, and processes of the platform between them."""

import asyncio
import os
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec
import psutil
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedota.contracts.runtime import Ready
from fedota.kernel.files import write_private
from fedota.kernel.migrations import PROCESSES, migrate
from fedota.local.nats_server import nats_server
from fedota.local.platform import MODULES
from fedota.local.postgres import postgres
from fedota.local.programs import READY, Program
from fedota.local.seaweedfs import S3Access
from fedota.local.servers import Servers
from fedota.local.state import DataDirectory
from tests.contract.ground import ROOT, Ground
from tests.faults.servers import PATIENCE, Server
from tests.integration.gateway.conftest import write_tokens
from tests.support.servers import RunningServers
from tests.support.services import PASSWORD
from tests.support.waiting import until

USUAL: Final = ("relay", "problems", "gateway")
_NO_STORE: Final = S3Access("http://127.0.0.1:9", "none", "none")
_TIMEOUT: Final = aiohttp.ClientTimeout(total=5)


class Stand(Ground):
    """Servers and processes that nothing else uses; processes are started again when they end."""

    def __init__(self, servers: RunningServers, database_url: str, directory: Path) -> None:
        super().__init__(servers, database_url)
        self.directory = directory
        self.postgres: Server
        self.nats_server: Server

    @classmethod
    @asynccontextmanager
    async def up(
        cls, directory: Path, processes: Sequence[str] = USUAL, env: Mapping[str, str] = {}
    ) -> AsyncIterator["Stand"]:
        """Migrated, with these processes answering. `env` is PostgreSQL's."""
        data = DataDirectory(directory / "data")
        database, url = await postgres(data)
        bus, access = nats_server(data)
        stand = cls(RunningServers.of(Servers(url, access, _NO_STORE)), url, directory)
        stand.postgres = Server(database._replace(env={**database.env, **env}), database.directory / "data")
        stand.nats_server = Server(bus, bus.directory / "jetstream")
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(stand.postgres.up())
            await stack.enter_async_context(stand.nats_server.up())
            await migrate(url, dict.fromkeys(PROCESSES, PASSWORD))
            for name in processes:
                await stack.enter_async_context(stand.process(name))
            yield stand

    @asynccontextmanager
    async def process(self, name: str, place: str = "") -> AsyncIterator[None]:
        """A process of the platform, answering, and started again whenever it ends; `place` is for a second one."""
        directory = self._directory(place or name)
        file = directory / "settings.json"
        write_private(file, msgspec.json.encode({**self._told(name), "directory": str(directory)}))

        async def ready() -> bool:
            return (directory / READY).exists()

        told = {"FEDOTA_SETTINGS": str(file), "PYTHONPATH": str(ROOT)}
        argv = [sys.executable, "-m", MODULES[name]]
        server = Server(Program(place or name, argv, directory, ready, env=told), directory)
        async with server.up():
            keeper = asyncio.create_task(server.keep())
            try:
                yield
            finally:
                keeper.cancel()
                await asyncio.wait([keeper])

    def running_as(self, name: str) -> Ready | None:
        """The process that answers in this place; None while a new one is being started."""
        with suppress(FileNotFoundError):
            return msgspec.json.decode((self._directory(name) / READY).read_bytes(), type=Ready)
        return None

    def kill_process(self, name: str, number: int = signal.SIGKILL) -> int | None:
        """Send a signal to the process in this place, if one is there; who it was."""
        ready = self.running_as(name)
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            # a number that was given away again is not ours to kill
            if ready and "-m" in psutil.Process(ready.pid).cmdline():
                os.kill(ready.pid, number)
                return ready.pid
        return None

    async def comes_back(self, name: str, killed: int | None) -> None:
        """Return when another one answers in this place."""

        async def back() -> bool:
            ready = self.running_as(name)
            return ready is not None and ready.pid != killed

        await until(back, f"{name} runs again", PATIENCE)

    async def passes(self, sequence: int) -> None:
        """Return when the stream holds more than this."""

        async def passed() -> bool:
            return await self.last_sequence() > sequence

        await until(passed, f"the stream grows past {sequence}", PATIENCE)

    async def readiness_of(self, name: str) -> dict[str, Any]:
        """What the process in this place says of itself; nothing when it does not answer."""
        ready = self.running_as(name)
        if ready is None:
            return {}
        try:
            async with (
                aiohttp.ClientSession(timeout=_TIMEOUT) as http,
                http.get(f"{ready.url}/readyz") as reply,
            ):
                body: dict[str, Any] = await reply.json()
                return body
        except (aiohttp.ClientError, TimeoutError):
            return {}

    async def is_well(self, *names: str) -> None:
        """Return when these processes say that nothing is wrong."""
        for name in names:

            async def well(name: str = name) -> bool:
                return (await self.readiness_of(name)).get("status") == "ready"

            await until(well, f"{name} is ready; it says {await self.readiness_of(name)}", PATIENCE)

    def _directory(self, place: str) -> Path:
        directory = self.directory / "processes" / place
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def _told(self, name: str) -> dict[str, Any]:
        told = {
            "database_url": self.role_url(name).reveal(),
            "nats_url": self.servers.nats_url,
            "nats_credentials": str(self.servers.nats_keys[name]),
        }
        match name:
            case "problems":
                return {**told, "token_key_file": str(self._token_key())}
            case "gateway":
                return {**told, "tokens_file": str(write_tokens(self.directory / "tokens.json"))}
            case _:
                return told

    def _token_key(self) -> Path:
        path = self.directory / "token.pem"
        pem, none = serialization.Encoding.PEM, serialization.NoEncryption()
        key = Ed25519PrivateKey.generate().private_bytes(pem, serialization.PrivateFormat.PKCS8, none)
        write_private(path, key)
        return path


def new_place(directory: Path) -> Path:
    """A directory that nothing uses yet."""
    return directory / secrets.token_hex(4)
