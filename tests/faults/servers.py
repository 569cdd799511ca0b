"""Servers of a test's own: killed, paused, put back to an older state."""

import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import psutil

from fedota.kernel.processes import Guarded, spawn
from fedota.local.programs import READY, Program
from tests.support.waiting import until

PATIENCE: Final = 90.0  # seconds: a small machine that others use too
_GRACE: Final = 30.0  # seconds


class Server:
    """A program that runs when it is told to, and is started again by nobody else."""

    def __init__(self, program: Program, store: Path) -> None:
        self.program = program
        self.store = store
        self._running: Guarded | None = None

    @asynccontextmanager
    async def up(self) -> AsyncIterator["Server"]:
        """Running, until the block ends."""
        await self.start()
        try:
            yield self
        finally:
            await self.stop()

    async def start(self) -> None:
        """Start it and wait until it answers."""
        program = self.program
        (program.directory / READY).unlink(missing_ok=True)
        env = program.env
        self._running = await spawn(program.argv, directory=program.directory, env=env, log=program.log)
        await until(program.ready, f"{program.name} answers", PATIENCE)

    async def keep(self) -> None:
        """Start it again whenever it ends, at once: a test has no time for a supervisor that is patient."""
        while self._running is not None:
            await self._running.wait()
            await self.start()

    async def stop(self) -> None:
        """As its administrator stops it. Harmless when it does not run."""
        if self._running is None:
            return
        self.resume()
        for process in self._tree()[1:2]:  # the server itself, below its guard
            with suppress(psutil.NoSuchProcess):
                process.send_signal(self.program.stop_signal)
        await self._running.stop(_GRACE)
        self._running = None

    async def kill(self) -> None:
        """End all of it with -9 in the same moment, as a power cut would but for the page cache."""
        if self._running is None:
            return
        tree = self._tree()
        for process in tree[1:]:  # its guard ends with it, and reaps it: PostgreSQL asks whether its last life is over
            with suppress(psutil.NoSuchProcess):
                process.kill()
        await self._running.wait()
        await until(lambda: _gone(tree), f"nothing of {self.program.name} is left", PATIENCE)
        self._running = None

    def pause(self) -> None:
        """Stop it where it stands: it answers nobody and breaks no connection."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def copy(self, to: Path) -> None:
        """Keep what it has stored; only while it is stopped."""
        assert self._running is None
        shutil.copytree(self.store, to, symlinks=True)

    def restore(self, copy: Path) -> None:
        """Put back what was kept; only while it is stopped."""
        self.wipe()
        shutil.copytree(copy, self.store, symlinks=True)

    def wipe(self) -> None:
        """Lose all that it has stored; only while it is stopped."""
        assert self._running is None
        shutil.rmtree(self.store, ignore_errors=True)

    def _signal(self, number: int) -> None:
        for process in self._tree()[1:]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _tree(self) -> list[psutil.Process]:
        """Its guard and all below it, from the top."""
        if self._running is None:
            return []
        with suppress(psutil.NoSuchProcess):
            guard = psutil.Process(self._running.pid)
            return [guard, *guard.children(recursive=True)]
        return []


async def _gone(processes: list[psutil.Process]) -> bool:
    return not [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
