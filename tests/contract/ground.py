"""What the kernel's tests stand on, and the programs that they start and kill."""

import os
import signal
import sys
from asyncio.subprocess import PIPE, Process, create_subprocess_exec
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import aiohttp
import asyncpg
import msgspec
import nats
from nats.aio.client import Client
from nats.errors import TimeoutError as NatsTimeoutError
from nats.js.api import AckPolicy, ConsumerConfig
from nats.js.errors import NotFoundError

from fedota.contracts import subjects
from fedota.contracts.runtime import Ready
from fedota.events import encode
from fedota.events.problems import ParticipationRequested, Plan, ProblemCreated
from fedota.events.storage import FilesDeleted
from fedota.kernel.database import Pool, connect_pool
from fedota.kernel.event_log import EventLog
from fedota.kernel.processes import Guarded, spawn
from fedota.local.nats_server import NatsAccess, nats_server
from fedota.local.servers import Servers
from fedota.local.state import DataDirectory
from tests.support.servers import ANYTHING, RunningServers
from tests.support.services import Platform, new_id, until

ROOT: Final = Path(__file__).parents[2]


class Stored(NamedTuple):
    """A message as the stream holds it."""

    sequence: int
    subject: str
    body: bytes


class Ground(Platform):
    """A log, and ways to look at the stream; nothing runs by itself."""

    @asynccontextmanager
    async def superuser(self) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
        """The database, as who may do anything."""
        connection = await asyncpg.connect(self.database_url)
        try:
            yield connection
        finally:
            await connection.close()

    @asynccontextmanager
    async def as_role(self, process: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
        """The database, as the login role of a process."""
        connection = await asyncpg.connect(self.role_url(process).reveal())
        try:
            yield connection
        finally:
            await connection.close()

    @asynccontextmanager
    async def pool(self, process: str) -> AsyncIterator[Pool]:
        """Connections of a process."""
        async with connect_pool(self.role_url(process), process) as pool:
            yield pool

    @asynccontextmanager
    async def nats(self, user: str = ANYTHING) -> AsyncIterator[Client]:
        """NATS, as one of its users."""
        client = await nats.connect(
            self.servers.nats_url,
            user_credentials=str(self.servers.nats_keys[user]),
            inbox_prefix=f"_INBOX_{user}".encode(),
        )
        try:
            yield client
        finally:
            await client.close()

    async def stream(self) -> list[Stored]:
        """All that the event stream holds, in its order."""
        async with self.nats() as client:
            js = client.jetstream()
            last = (await js.stream_info(subjects.STREAM)).state.last_seq
            if not last:
                return []
            no_acks = ConsumerConfig(ack_policy=AckPolicy.NONE)
            subscription = await js.pull_subscribe(subjects.EVENTS, stream=subjects.STREAM, config=no_acks)
            found: list[Stored] = []
            while len(found) < last:
                messages = await subscription.fetch(500, timeout=10)
                found += [Stored(one.metadata.sequence.stream, one.subject, one.data) for one in messages]
            return found

    async def last_sequence(self) -> int:
        """Where the stream stands; 0 when there is none."""
        async with self.nats() as client:
            try:
                return (await client.jetstream().stream_info(subjects.STREAM)).state.last_seq
            except (NotFoundError, NatsTimeoutError):
                return 0

    async def reaches(self, sequence: int) -> None:
        """Return when the stream stands there."""

        async def reached() -> bool:
            return await self.last_sequence() == sequence

        await until(reached, f"the stream holds {sequence} events")

    async def told(self, log: EventLog) -> list[Stored]:
        """What the stream must hold, from the log."""
        return [
            Stored(
                row["position"],
                subjects.event(row["type"], row["subject"].partition("/")[2]),
                encode(dict(row)),
            )
            for row in await log.records(0, limit=1_000_000)
        ]

    async def program(self, module: str, process: str, directory: Path, **more: str) -> Process:
        """A Python program of its own, told who it is; whoever starts it ends it."""
        told = {
            "FEDOTA_DATABASE_URL": self.role_url(process).reveal(),
            "FEDOTA_NATS_URL": self.servers.nats_url,
            "FEDOTA_NATS_CREDENTIALS": str(self.servers.nats_keys[process]),
            "FEDOTA_DIRECTORY": str(directory),
            **more,
        }
        directory.mkdir(exist_ok=True)
        with (directory / "log").open("ab") as log:
            return await create_subprocess_exec(
                sys.executable, "-m", module, env=told, cwd=ROOT, stdout=PIPE, stderr=log
            )

    @asynccontextmanager
    async def running(self, module: str, process: str, directory: Path, **more: str) -> AsyncIterator[Process]:
        """The same, killed at the end."""
        child = await self.program(module, process, directory, **more)
        try:
            yield child
        finally:
            await kill(child)


async def kill(child: Process) -> None:
    """End it with -9."""
    if child.returncode is None:
        child.kill()
    await child.communicate()


async def readiness(directory: Path) -> dict[str, Any]:
    """What a process that was started in this directory says of itself, once it says anything."""

    async def answered() -> dict[str, Any] | None:
        try:
            ready = msgspec.json.decode((directory / "ready.json").read_bytes(), type=Ready)
            async with aiohttp.ClientSession() as http, http.get(f"{ready.url}/readyz") as reply:
                return {"code": reply.status, **await reply.json()}
        except (FileNotFoundError, aiohttp.ClientError):
            return None

    found: dict[str, Any] = await until(answered, f"the process in {directory} answers")
    return found


class OwnNats:
    """A NATS server of the test's own, to be killed."""

    def __init__(self, directory: Path) -> None:
        self._program, access = nats_server(DataDirectory(directory))
        self.access: NatsAccess = access
        self._running: Guarded | None = None

    def beside(self, servers: RunningServers) -> RunningServers:
        """The other servers, with this NATS."""
        return RunningServers.of(Servers(servers.admin_url, self.access, servers.s3))

    async def start(self) -> None:
        """Start it and wait until it answers."""
        program = self._program
        self._running = await spawn(program.argv, directory=program.directory, env={}, log=program.log)
        await until(program.ready, "NATS answers")

    async def kill(self) -> None:
        """End it with -9, if it runs: its guard takes it along."""
        if self._running is not None:
            os.kill(self._running.pid, signal.SIGKILL)
            await self._running.wait()
            self._running = None


def created(problem_id: str | None = None, name: str = "Tumours") -> ProblemCreated:
    """A problem was published."""
    return ProblemCreated(
        problem_id=problem_id or new_id(),
        name=name,
        description="About",
        data_format="csv",
        client_image="registry.test/i",
        plan=Plan(rounds=3, goal_count=2),
    )


def requested(problem_id: str, organization: str = "Clinic A") -> ParticipationRequested:
    """An organization asked to take part."""
    return ParticipationRequested(problem_id=problem_id, organization=organization)


def deleted(problem_id: str) -> FilesDeleted:
    """Something small that storage records."""
    return FilesDeleted(problem_id=problem_id, names=["a"])
