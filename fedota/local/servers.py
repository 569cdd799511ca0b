"""The three servers that the platform stands on, embedded: PostgreSQL, NATS with JetStream, and S3."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import NamedTuple

from fedota.local.nats_server import NatsAccess, nats_server
from fedota.local.postgres import postgres
from fedota.local.programs import Program, kept_alive
from fedota.local.seaweedfs import S3Access, seaweedfs
from fedota.local.state import DataDirectory
from fedota.local.together import entered


class Servers(NamedTuple):
    """How to reach them; `database_url` is a superuser's."""

    database_url: str
    nats: NatsAccess
    s3: S3Access


@asynccontextmanager
async def embedded(data: DataDirectory) -> AsyncIterator[Servers]:
    """All three, answering."""
    async with AsyncExitStack() as stack:
        database, database_url = await postgres(data)
        bus, nats = nats_server(data)
        store, s3 = seaweedfs(data)
        await start(stack, [database, bus, store])
        yield Servers(database_url, nats, s3)


async def start(stack: AsyncExitStack, programs: list[Program]) -> None:
    """Start programs beside each other; they stop with the stack."""
    await stack.enter_async_context(entered([kept_alive(program) for program in programs]))
