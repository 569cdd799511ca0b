"""Where updates are read to: a bounded part of memory, and files for those that find no room there."""

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Final

from fedota.runtime.places import SMALL_PIECE, Memory, Spooled, room
from fedota.runtime.protocol import HEADER_SLACK

MOST_UPLOADS: Final = 64  # at the same time; more are asked to come back
_BUDGET: Final = 32 * 1024**2  # bytes of buffers, unless a single update is larger
_HELD: Final = 256 * 1024**2  # bytes of a buffer that is held for the next update; a larger one is worth its making
_PATIENCE: Final = 1.0  # seconds that an update waits for memory, which is faster than a file


class Spool:
    """Gives updates their places. Its memory is one model's size or 32 MB, however many clients there are."""

    def __init__(self, model: int, directory: Path) -> None:
        self.model = model
        self.size = model + HEADER_SLACK
        self.count = max(1, min(MOST_UPLOADS, _BUDGET // self.size))
        self._directory = directory
        self._turns = asyncio.Semaphore(self.count)
        self._free: list[memoryview] = []
        self._scratch: memoryview | None = None

    async def place(self) -> Memory | Spooled:
        """A place of one's own, to be given back with `release`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE):
                await self._turns.acquire()
            with suppress(MemoryError):  # the machine has less than we may take: a file will do
                return self._memory()
        return self._file()

    def _memory(self) -> Memory:
        try:
            return Memory(self._free.pop() if self._free else room(self.size))
        except BaseException:
            self._turns.release()
            raise

    def release(self, place: Memory | Spooled) -> None:
        """The place is not needed any more, nor what is in it."""
        if isinstance(place, Spooled):
            place.close()
            return
        if self.size <= _HELD:
            self._free.append(place.view)
        self._turns.release()

    async def kept(self, place: Memory | Spooled) -> Spooled:
        """What is in a place, in a file; the place is given back."""
        if isinstance(place, Spooled):
            return place
        try:
            file = self._file()
            try:
                await asyncio.to_thread(file.copy, place.read(0, place.received))
            except BaseException:
                file.close()
                raise
            return file
        finally:
            self.release(place)

    def _file(self) -> Spooled:
        if self._scratch is None:
            self._scratch = room(SMALL_PIECE)
        return Spooled.unlinked(self._directory, self.size, self._scratch)
