"""What a measurement stands on: embedded servers of its own, a fresh log, and processes beside it."""

import os
import secrets
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit, urlunsplit

import aiohttp
import asyncpg
import msgspec
import nats
from nats.aio.client import Client
from nats.js.errors import NotFoundError

from fedota.contracts import subjects
from fedota.contracts.runtime import Ready
from fedota.events import NewEvent, uuid7
from fedota.events.rounds import Refusal, RoundUpdated
from fedota.kernel.bus import Bus
from fedota.kernel.database import Pool, connect_pool
from fedota.kernel.event_log import Append, Context, EventLog
from fedota.kernel.files import write_private
from fedota.kernel.migrations import PROCESSES, migrate, role_of
from fedota.kernel.nats_accounts import Permissions
from fedota.kernel.settings import Secret
from fedota.local.nats_server import platform_keys
from fedota.local.programs import READY, Program, kept_alive
from fedota.local.servers import Servers, embedded
from fedota.local.state import DataDirectory

_PASSWORD: Final = "made-up"
CONTEXT: Final = Context(actor="benchmark", correlation=uuid7())


class World(NamedTuple):
    """The servers, and a directory to leave things in."""

    servers: Servers
    directory: Path


class Database(NamedTuple):
    """A migrated database with an empty log; `admin_url` is a superuser's."""

    world: World
    admin_url: str

    def url(self, process: str) -> Secret:
        """The database as the login role of a process sees it."""
        parts = urlsplit(self.admin_url)
        place = parts.netloc.rpartition("@")[2]
        return Secret(urlunsplit(parts._replace(netloc=f"{role_of(process)}:{_PASSWORD}@{place}")))

    @asynccontextmanager
    async def pool(self, process: str, size: int = 8) -> AsyncIterator[Pool]:
        """Connections of a process."""
        async with connect_pool(self.url(process), process, size=size) as pool:
            yield pool

    @asynccontextmanager
    async def log(self, process: str, size: int = 4) -> AsyncIterator[EventLog]:
        """The log, written as `process`."""
        async with self.pool(process, size) as pool, EventLog.open(pool) as log:
            yield log

    @asynccontextmanager
    async def bus(self, process: str) -> AsyncIterator[Bus]:
        """NATS, as `process`."""
        nats_access = self.world.servers.nats
        async with Bus.connect(nats_access.url, process, nats_access.keys[process]) as bus:
            yield bus

    @asynccontextmanager
    async def process(self, name: str, module: str, more: Mapping[str, Any] | None = None) -> AsyncIterator[Ready]:
        """A process of the platform, ready."""
        nats_access = self.world.servers.nats
        told = {
            "database_url": self.url(name).reveal(),
            "nats_url": nats_access.url,
            "nats_credentials": str(nats_access.keys[name]),
            **(more or {}),
        }
        async with launched(self.world.directory / f"{name}-{secrets.token_hex(4)}", module, told) as ready:
            yield ready


@asynccontextmanager
async def servers(directory: Path) -> AsyncIterator[World]:
    """PostgreSQL, NATS and S3, new and empty."""
    async with embedded(DataDirectory(directory / "servers")) as running:
        yield World(running, directory)


@asynccontextmanager
async def database(world: World) -> AsyncIterator[Database]:
    """A fresh log, and no stream."""
    name = f"bench_{secrets.token_hex(4)}"
    admin_url = world.servers.database_url
    connection = await asyncpg.connect(admin_url)
    try:
        await connection.execute(f"create database {name} template template0")
        url = urlunsplit(urlsplit(admin_url)._replace(path=f"/{name}"))
        await migrate(url, dict.fromkeys(PROCESSES, _PASSWORD), share_roles=True)
        await forget_stream(world)
        yield Database(world, url)
        await connection.execute(f"drop database {name} with (force)")
    finally:
        await connection.close()


async def forget_stream(world: World) -> None:
    """What the stream holds is another log's."""
    async with anything(world) as client:
        with suppress(NotFoundError):
            await client.jetstream().delete_stream(subjects.STREAM)


@asynccontextmanager
async def anything(world: World) -> AsyncIterator[Client]:
    """NATS, as somebody to whom nothing is denied."""
    operator = world.servers.nats.operator
    assert operator is not None
    credentials = world.directory / "anything.creds"
    everything = Permissions(publish=[">"], subscribe=[">"])
    write_private(credentials, platform_keys(operator.parent).credentials("benchmark", everything).encode())
    client = await nats.connect(world.servers.nats.url, user_credentials=str(credentials))
    try:
        yield client
    finally:
        await client.close()


def environment() -> dict[str, str]:
    """Where a process of ours finds the modules that we have."""
    return {"PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}


@asynccontextmanager
async def launched(directory: Path, module: str, settings: Mapping[str, Any]) -> AsyncIterator[Ready]:
    """`python -m module`, told these settings by file, ready. It never outlives this process."""
    directory.mkdir(mode=0o700)
    file = directory / "settings.json"
    write_private(file, msgspec.json.encode({**settings, "directory": str(directory)}))

    async def ready() -> bool:
        if not (directory / READY).exists():
            return False
        url = msgspec.json.decode((directory / READY).read_bytes(), type=Ready).url
        async with aiohttp.ClientSession() as http, http.get(f"{url}/readyz", ssl=False) as reply:
            return reply.status == 200

    env = {**environment(), "FEDOTA_SETTINGS": str(file)}
    async with kept_alive(Program(module, [sys.executable, "-m", module], directory, ready, env=env)):
        yield msgspec.json.decode((directory / READY).read_bytes(), type=Ready)


def an_event(problem_id: str, report: int = 1) -> RoundUpdated:
    """A report of a round, of 1.1 KB as it is stored."""
    refusals = [
        Refusal(
            organization=f"Hospital {letter}",
            code="update_mismatch",
            detail="The update lacks the tensor 'head.weight' and has 'head.bias' with 3 values where 2 belong.",
        )
        for letter in "ABC"
    ]
    return RoundUpdated(
        problem_id=problem_id,
        run=1,
        report=report,
        round=1,
        attempt=1,
        stage="reporting",
        goal_count=8,
        minimum_count=7,
        selected=8,
        reported=5,
        participants=[f"Hospital {letter}" for letter in "DEFGH"],
        refusals=refusals,
        examples=1234,
        metrics={"loss": 0.693147, "accuracy": 0.8125, "auc": 0.90625, "f1": 0.75},
        seconds=12.345,
        reason="reporting: 5 of 8 updates are in, at least 7 are needed; 3 were refused, see refusals",
    )


def an_append(problem_id: str, count: int = 1) -> Append:
    """A request of `count` events."""
    events = [NewEvent(data=an_event(problem_id, number)) for number in range(1, count + 1)]
    return Append(subject=f"rounds/{problem_id}", events=events, context=CONTEXT)
