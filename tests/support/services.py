"""What integration tests of a service stand on: a fresh log, each owner's pen, a relay that runs.

The service under test is the real one, in the test's own process; the other services are played by what the test
records as their owners.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import asyncpg
import nats
from aiohttp import web
from nats.js.errors import NotFoundError

from fedota.contracts import subjects
from fedota.contracts.commands import Command, Reply
from fedota.errors import FedotaError
from fedota.events import CATALOGUE, Event, EventData, NewEvent, uuid7
from fedota.kernel.bus import Bus
from fedota.kernel.database import connect_pool
from fedota.kernel.event_log import Append, Context, EventLog, listen
from fedota.kernel.migrations import PROCESSES, migrate, role_of
from fedota.kernel.relay import Relay
from fedota.kernel.service import Service, serving
from fedota.kernel.settings import LogSettings, ProcessSettings, Secret
from tests.support.servers import RunningServers
from tests.support.waiting import until

OWNERS: Final = ("problems", "storage", "orchestrator", "rounds")
PASSWORD: Final = "made-up"
__all__ = ["OWNERS", "Platform", "Running", "forget_stream", "new_id", "running", "until"]
S = TypeVar("S", bound=ProcessSettings)
L = TypeVar("L", bound=LogSettings)


class Running(NamedTuple):
    """A service that runs in the test's process."""

    app: web.Application
    url: str


class Platform:
    """A migrated database with an empty log, a relay, and every owner's pen."""

    def __init__(self, servers: RunningServers, database_url: str) -> None:
        self.servers = servers
        self.database_url = database_url
        self.logs: dict[str, EventLog] = {}
        self.gateway: Bus  # commands are sent from here

    @classmethod
    @asynccontextmanager
    async def open(cls, servers: RunningServers, database_url: str) -> AsyncIterator["Platform"]:
        """The platform, without any service; `database_url` is of a superuser and an empty database."""
        platform = cls(servers, database_url)
        await migrate(database_url, dict.fromkeys(PROCESSES, PASSWORD), share_roles=True)
        await forget_stream(servers.nats_url, servers.nats_keys["anything"])
        async with AsyncExitStack() as stack:
            for owner in OWNERS:
                platform.logs[owner] = await stack.enter_async_context(platform.log(owner))
            await stack.enter_async_context(platform._relaying())
            platform.gateway = await stack.enter_async_context(platform.bus("gateway"))
            yield platform

    def role_url(self, process: str) -> Secret:
        """The database as the login role of a process sees it."""
        parts = urlsplit(self.database_url)
        place = parts.netloc.rpartition("@")[2]
        return Secret(urlunsplit(parts._replace(netloc=f"{role_of(process)}:{PASSWORD}@{place}")))

    def settings(self, kind: type[S], process: str, **more: Any) -> S:
        """The settings of a process here, and `more`."""
        return kind(
            database_url=self.role_url(process),
            nats_url=self.servers.nats_url,
            nats_credentials=self.servers.nats_keys[process],
            **more,
        )

    @asynccontextmanager
    async def log(self, process: str, size: int = 2) -> AsyncIterator[EventLog]:
        """The log, written as `process`."""
        async with connect_pool(self.role_url(process), process, size=size) as pool, EventLog.open(pool) as log:
            yield log

    @asynccontextmanager
    async def bus(self, process: str) -> AsyncIterator[Bus]:
        """NATS, as `process`."""
        async with Bus.connect(self.servers.nats_url, process, self.servers.nats_keys[process]) as bus:
            yield bus

    @asynccontextmanager
    async def _relaying(self) -> AsyncIterator[None]:
        wake = asyncio.Event()
        listener = await asyncpg.connect(self.role_url("relay").reveal())
        try:
            await listen(listener, wake)
            async with (
                self.bus("relay") as bus,
                self.log("relay") as log,
                Service("relay").running("relay", Relay(log, bus).run(wake)),
            ):
                yield
        finally:
            await listener.close()

    async def record(self, *events: EventData, actor: str = "test") -> int:
        """Append events as their owners; the position of the last."""
        position = 0
        for data in events:
            owner = CATALOGUE[type(data).__name__].owner
            context = Context(actor=actor, correlation=uuid7())
            append = Append(subject=f"{owner}/{data.problem_id}", events=[NewEvent(data=data)], context=context)
            position = (await self.logs[owner].append(append)).position
        return position

    async def events(self, subject: str) -> list[Event]:
        """All events of a stream."""
        return await self.logs[subject.partition("/")[0]].stream(subject)

    async def send(self, command: Command, *, actor: str = "setter", key: str | None = None) -> Reply:
        """A command, as the gateway sends it."""
        return await self.gateway.command(command, actor=actor, key=key)

    async def refused(self, command: Command, *, actor: str = "setter", key: str | None = None) -> FedotaError:
        """The error that a command is answered with."""
        try:
            reply = await self.send(command, actor=actor, key=key)
        except FedotaError as error:
            return error
        raise AssertionError(f"{command} was accepted: {reply}")


@asynccontextmanager
async def running(create_app: Callable[[L], web.Application], settings: L) -> AsyncIterator[Running]:
    """The service, in this process, on a free port, as its own `main` would run it."""
    app = create_app(settings)
    async with serving(app, "127.0.0.1", 0) as url:
        yield Running(app, url)


async def forget_stream(url: str, credentials: Path) -> None:
    """Delete the event stream: the log of this test is a new one, what the stream holds is another's."""
    client = await nats.connect(url, user_credentials=str(credentials))
    try:
        await client.jetstream().delete_stream(subjects.STREAM)
    except NotFoundError:
        pass
    finally:
        await client.close()


def new_id() -> str:
    """A problem's id that nothing has used."""
    return str(uuid4())
