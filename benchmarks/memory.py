"""The most memory that processes have had, looked up while they live."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

import psutil

_KB_IN_MB: Final = 1024


class Peak(NamedTuple):
    """The most that one process has had, in megabytes.

    `whole` is what the kernel counted (VmHWM), with the files that it has mapped. `own` is without those, of the
    moments at which it was looked at; `first` is the earliest `own`.
    """

    whole: float
    own: float
    first: float

    @property
    def grown(self) -> float:
        """How much its own memory has grown."""
        return self.own - self.first


class Peaks(dict[int, Peak]):
    """The peaks of processes by their ids; also of those that have ended meanwhile."""

    @property
    def whole(self) -> float:
        """All processes' peaks together: what the machine needs at most."""
        return sum(peak.whole for peak in self.values())

    def look(self, pid: int) -> None:
        """See how much a process has now. One that has just ended keeps what it had."""
        with suppress(FileNotFoundError, ProcessLookupError, KeyError):
            found = status(pid)
            own = found["RssAnon"] + found["RssShmem"]
            before = self.get(pid, Peak(0.0, 0.0, own))
            self[pid] = Peak(max(before.whole, found["VmHWM"]), max(before.own, own), before.first)


def status(pid: int) -> dict[str, float]:
    """What a process has of each kind of memory, in megabytes, by the kernel's names."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) / _KB_IN_MB for words in lines if words[-1] == "kB"}


@asynccontextmanager
async def watched(pids: Callable[[], Iterable[int]], every: float = 0.05) -> AsyncIterator[Peaks]:
    """The peaks of processes while this lasts. `pids` is asked each time: they may come and go."""
    peaks = Peaks()

    async def watch() -> None:
        while True:
            for pid in pids():
                peaks.look(pid)
            await asyncio.sleep(every)

    task = asyncio.create_task(watch())
    try:
        yield peaks
        for pid in pids():
            peaks.look(pid)
    finally:
        task.cancel()
        await asyncio.wait([task])
    if not task.cancelled():
        task.result()  # it never ends by itself: whatever it raised makes the figures worthless


def family(process: psutil.Process) -> list[int]:
    """A process and all that it has started."""
    with suppress(psutil.NoSuchProcess):
        return [process.pid, *(child.pid for child in process.children(recursive=True))]
    return []
