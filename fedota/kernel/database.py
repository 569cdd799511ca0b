"""Connections to PostgreSQL."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeAlias

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from fedota.kernel.settings import Secret

if TYPE_CHECKING:
    Pool: TypeAlias = asyncpg.Pool[asyncpg.Record]
    Connection: TypeAlias = asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]
else:
    Pool = asyncpg.Pool
    Connection = asyncpg.Connection


@asynccontextmanager
async def connect_pool(url: Secret, name: str, *, size: int = 8) -> AsyncIterator[Pool]:
    """A pool of at most `size` connections of the process `name`, whose own schema is where plain table names live."""
    async with asyncpg.create_pool(
        url.reveal(),
        min_size=1,
        max_size=size,
        command_timeout=60,
        server_settings={"search_path": name, "application_name": f"fedota-{name}"},
    ) as pool:
        yield pool
