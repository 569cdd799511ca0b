"""One at a time for each problem, however many processes of storage run.

Between reading an object and recording it, nobody may remove it, and who removes an object must know that nobody has
recorded it meanwhile. PostgreSQL holds the lock, and lets go of it when the process that has it dies.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Final

import asyncpg
from asyncpg.pool import PoolConnectionProxy

from fedota.errors import FedotaError
from fedota.kernel.database import Pool
from fedota.kernel.event_log import OUTAGES, log_needed

SIZE: Final = 4  # turns at once in one process: half of the threads that speak to S3 stay free for short questions
_NO_LIMIT: Final = 1e6  # seconds: it is `patience` that ends the wait, not the pool's own timeout
_LOCK: Final = "select pg_advisory_lock(hashtextextended($1, 0))"


class Turns:
    """Hands out turns; each keeps a connection of the pool, which should serve nothing else."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    @asynccontextmanager
    async def turn(self, problem_id: str, patience: float) -> AsyncIterator[None]:
        """The problem's turn; raises `FedotaError("timeout")` when it does not come within `patience` seconds."""
        with log_needed():
            connection = await self._acquire(problem_id, patience)
        try:
            yield
        finally:
            await self._release(connection)

    async def _acquire(self, problem_id: str, patience: float) -> "PoolConnectionProxy[asyncpg.Record]":
        async with AsyncExitStack() as undo:
            try:
                async with asyncio.timeout(patience):
                    connection = await self._pool.acquire()
                    undo.push_async_callback(self._release, connection)
                    await connection.execute(_LOCK, f"storage/{problem_id}", timeout=_NO_LIMIT)
            except TimeoutError:
                raise FedotaError(
                    "timeout",
                    "The problem's files are still at work for an earlier request. "
                    "Ask again with the same Idempotency-Key.",
                ) from None
            undo.pop_all()
        return connection

    async def _release(self, connection: "PoolConnectionProxy[asyncpg.Record]") -> None:
        """Free the lock: the pool resets what it takes back. With a connection that is lost, the lock went before."""
        with suppress(*OUTAGES):
            await self._pool.release(connection)
