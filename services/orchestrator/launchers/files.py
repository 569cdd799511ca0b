"""The directory of a launched process: what it remembers, and who lives there."""

import asyncio
import errno
import fcntl
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import msgspec

SETTINGS: Final = "settings.json"
READY: Final = "ready.json"
LOG: Final = "log"
CERTIFICATE: Final = "tls.pem"
ALIVE: Final = "alive"  # locked by each process that lives there
_POLL: Final = 0.05  # seconds


class Memory(msgspec.Struct, frozen=True):
    """What is kept of a component's settings from one life of the launcher to the next."""

    run: int
    key: str
    port: int


def recall(directory: Path) -> Memory | None:
    """What the settings there remember; None when there are none, or none that can be read."""
    try:
        return msgspec.json.decode((directory / SETTINGS).read_bytes(), type=Memory)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


@asynccontextmanager
async def locked(path: Path, patience: float) -> AsyncIterator[int]:
    """A lock on a file, by its descriptor: it lasts until all who have inherited that have closed it or ended.

    Unlike a process id it cannot be mistaken for another's. Raises `OSError` when somebody else still has the lock
    after `patience` seconds.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            async with asyncio.timeout(patience):
                while not _lock(descriptor):  # noqa: ASYNC110 - the lock is another process's
                    await asyncio.sleep(_POLL)
        except TimeoutError:
            words = f"Another process still uses this after {patience:g} seconds; end that one first"
            raise OSError(errno.EAGAIN, words, str(path)) from None
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
