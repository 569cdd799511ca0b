"""A bounded number of buffers for updates on their way in: memory does not grow with the number of clients."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from fedota.runtime.tensors import room

_BUDGET: Final = 512 * 1024**2  # bytes
_MOST: Final = 32
_LEAST: Final = 2


class Buffers:
    """Buffers of one size, made when they are first needed and used again."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.count = max(_LEAST, min(_MOST, _BUDGET // max(size, 1)))
        self._turns = asyncio.Semaphore(self.count)
        self._free: list[memoryview] = []

    @asynccontextmanager
    async def one(self) -> AsyncIterator[memoryview]:
        """A buffer of one's own, as soon as one is free."""
        async with self._turns:
            buffer = self._free.pop() if self._free else room(self.size)
            try:
                yield buffer
            finally:
                self._free.append(buffer)
