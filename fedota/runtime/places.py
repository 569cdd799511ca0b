"""Where large bodies lie: in memory, or in a file that costs none. They are filled and looked at piece by piece."""

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Protocol

import numpy as np

from fedota.errors import FedotaError

PIECE: Final = 1 << 20  # bytes that are moved at once
SMALL_PIECE: Final = 1 << 18  # of those that pass through memory


def room(size: int) -> memoryview:
    """Memory for so many bytes, not yet cleared: `bytearray` writes zeros first, which takes as long as a sum does."""
    return np.empty(size, np.uint8).data


class Place(Protocol):
    """Takes `size` bytes at most and has `received`, from the first on without a gap."""

    @property
    def size(self) -> int:
        """The most that it takes."""
        ...

    @property
    def received(self) -> int:
        """What it has."""
        ...

    def room(self) -> memoryview:
        """Where the next bytes go: at least one, unless it is full."""
        ...

    def took(self, count: int) -> None:
        """So many bytes were put into `room`."""
        ...

    def read(self, start: int, stop: int) -> memoryview:
        """These bytes, good until the next call."""
        ...


class Memory:
    """A place in memory."""

    def __init__(self, view: memoryview, received: int = 0) -> None:
        self.view = view
        self.size = len(view)
        self.received = received

    def room(self) -> memoryview:
        """What is free."""
        return self.view[self.received :]

    def took(self, count: int) -> None:
        """More is there."""
        self.received += count

    def read(self, start: int, stop: int) -> memoryview:
        """The bytes themselves."""
        return self.view[start : min(stop, self.received)]


class Spooled:
    """A place in a file, which it closes. Only pieces pass through memory, and what the kernel caches it may drop.

    `scratch` may be shared by all who are filled by one event loop: between `room` and `took` nothing else runs.
    """

    def __init__(self, descriptor: int, size: int, received: int = 0, scratch: memoryview | None = None) -> None:
        self.size = size
        self.received = received
        self._descriptor = descriptor
        self._scratch = scratch
        self._page = memoryview(b"")

    @classmethod
    def unlinked(cls, directory: Path, size: int, scratch: memoryview | None = None) -> "Spooled":
        """In a file that nobody else can open and that goes with its process."""
        with on_disk(), tempfile.TemporaryFile(buffering=0, dir=directory) as file:
            return cls(os.dup(file.fileno()), size, scratch=scratch)

    @classmethod
    def at(cls, path: Path, size: int) -> "Spooled":
        """In the file of this name, with what is in it already."""
        with on_disk():
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        return cls(descriptor, size, min(size, os.fstat(descriptor).st_size))

    def room(self) -> memoryview:
        """A piece of memory that the next bytes pass through."""
        if self._scratch is None:
            self._scratch = room(SMALL_PIECE)
        return self._scratch[: self.size - self.received]

    def took(self, count: int) -> None:
        """Write them to the file. Raises `unavailable` when there is no room on the disk."""
        self._write(self.room()[:count])

    def copy(self, source: memoryview) -> None:
        """Take all of this."""
        for start in range(0, len(source), PIECE):
            self._write(source[start : start + PIECE])

    def _write(self, data: memoryview) -> None:
        with on_disk():
            while data:
                written = os.pwrite(self._descriptor, data, self.received)
                self.received += written
                data = data[written:]

    def read(self, start: int, stop: int) -> memoryview:
        """These bytes, in memory that is used again by the next call."""
        stop = min(stop, self.received)
        if len(self._page) < stop - start:
            self._page = room(max(SMALL_PIECE, stop - start))
        page, filled = self._page[: stop - start], 0
        while filled < len(page):
            count = os.preadv(self._descriptor, [page[filled:]], start + filled)
            if not count:
                raise OSError("a spooled body is shorter than what was written to it")
            filled += count
        return page

    def close(self) -> None:
        """Drop what it has; once more is harmless."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor, self._page = -1, memoryview(b"")


@contextmanager
def opened(path: Path) -> Iterator[Spooled]:
    """A file that is whole, to be looked at."""
    size = path.stat().st_size
    place = Spooled(os.open(path, os.O_RDONLY | os.O_CLOEXEC), size, size)
    try:
        yield place
    finally:
        place.close()


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex; it is read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def whole(view: memoryview) -> Memory:
    """A body that is in memory already."""
    return Memory(view, len(view))


def put(place: Place, data: bytes | memoryview) -> None:
    """Copy bytes to where they belong; there must be room for them."""
    left = memoryview(data)
    while left:
        into = place.room()[: len(left)]
        into[:] = left[: len(into)]
        place.took(len(into))
        left = left[len(into) :]


@contextmanager
def on_disk(what: str = "the body") -> Iterator[None]:
    """Raise `unavailable` when `what` finds no room: a full disk is no defect of ours, and may be over soon."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE):
            raise
        raise FedotaError(
            "unavailable", f"There is no room for {what} ({error.strerror}). Try again later.", retry_after=5
        ) from None
