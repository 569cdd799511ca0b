"""Processes that are killed and stopped where they stand, and are started again at the address that they had."""

import asyncio
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import msgspec

from fedota.contracts.runtime import Ready
from tests.contract.ground import ROOT

_PAUSE: Final = 0.05  # seconds before a process that ended is started again


class Kept:
    """A process that is started again whenever it is killed; `prepare` writes what it is told, and gives its arguments.

    A process that ends by itself is started again as well, and noted in `surprises`.
    """

    def __init__(self, name: str, directory: Path, prepare: Callable[[], list[str]]) -> None:
        self.name = name
        self.directory = directory
        self.lives = 0
        self.surprises: list[str] = []
        self.ended = asyncio.Event()  # well, and for good
        self.rest = 0.0  # seconds until it is started again when it is killed the next time
        self._prepare = prepare
        self._process: Process | None = None
        self._killed = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Kept"]:
        """Kept running."""
        keeper = asyncio.create_task(self._keep(), name=f"keep {self.name}")
        try:
            yield self
        finally:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)

    @property
    def runs(self) -> bool:
        """Whether there is a process now."""
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int:
        """The process that runs now, or ran last."""
        assert self._process is not None
        return self._process.pid

    def kill(self, rest: float = 0.0) -> None:
        """End it as a crash would; it is started again after `rest` seconds."""
        if self.runs:
            self.rest, self._killed = rest, True
            self._signal(signal.SIGKILL)

    def pause(self) -> None:
        """Stop it where it stands."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def log(self) -> str:
        """What all its lives wrote."""
        return (self.directory / "log").read_text() if (self.directory / "log").exists() else ""

    def _signal(self, number: int) -> None:
        if self.runs:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def _keep(self) -> None:
        try:
            while True:
                code = await self._live()
                if code == 0:
                    self.ended.set()
                    return
                if not self._killed:
                    self.surprises.append(f"{self.name} ended by itself with {code}: {self.log()[-2000:]}")
                self._killed = False
                await asyncio.sleep(_PAUSE + self.rest)
                self.rest = 0.0
        finally:
            await self._end()

    async def _live(self) -> int:
        self.lives += 1
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        arguments = self._prepare()
        with (self.directory / "log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", *arguments),
                cwd=self.directory,
                stdin=PIPE,  # it ends with the test
                stdout=log,
                stderr=log,
                env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
            )
        return await self._process.wait()

    async def _end(self) -> None:
        self.kill()
        if self._process is not None:
            await self._process.wait()


class Served(Kept):
    """A coordinator or a selector: it has an address, which it keeps."""

    def __init__(self, name: str, directory: Path, module: str, settings: Callable[[int], msgspec.Struct]) -> None:
        super().__init__(name, directory, self._told)
        self._module = module
        self._settings = settings

    @property
    def url(self) -> str:
        """Where it answers; "" before it did for the first time."""
        with suppress(FileNotFoundError):
            return msgspec.json.decode((self.directory / "ready.json").read_bytes(), type=Ready).url
        return ""

    def _told(self) -> list[str]:
        port = urlsplit(self.url).port or 0
        (self.directory / "settings.json").write_bytes(msgspec.json.encode(self._settings(port)))
        return [self._module]
