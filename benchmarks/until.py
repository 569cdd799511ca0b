"""Waiting for what can only be looked at."""

import asyncio
from collections.abc import Awaitable, Callable


async def until(there: Callable[[], Awaitable[bool]], patience: float, every: float = 0.05) -> None:
    """Return once it is so. Raises `TimeoutError` after `patience` seconds."""
    async with asyncio.timeout(patience):
        while True:
            if await there():
                return
            await asyncio.sleep(every)
