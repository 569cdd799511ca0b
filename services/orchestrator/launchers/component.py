"""One component of a namespace as a child process: started, watched, started again at the same address."""

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Final, NamedTuple
from urllib.parse import urlsplit

import aiohttp
import msgspec

from fedota.contracts.runtime import CoordinatorSettings, Ready, SelectorSettings
from fedota.events import to_json, uuid7
from fedota.kernel.processes import Guarded, spawn
from services.orchestrator.domain import Death, Failure
from services.orchestrator.launchers.files import (
    LOG,
    READY,
    SETTINGS,
    last_lines,
    private_directory,
    recall,
    usable_port,
    write_private,
)

Settings = CoordinatorSettings | SelectorSettings
_POLL: Final = 0.05  # seconds
_TIMEOUT: Final = aiohttp.ClientTimeout(total=2)


class Pace(NamedTuple):
    """How patient the launcher is, in seconds; `deaths` in a row without an answer are too many."""

    first_delay: float = 0.2
    longest_delay: float = 30.0
    ready: float = 30.0
    grace: float = 10.0
    deaths: int = 5


class End(NamedTuple):
    """How a life of the process ended; `hung` when it ran and never answered."""

    reason: str
    answered: bool = False
    hung: bool = False


class Program(NamedTuple):
    """What a component runs: `python -m module` in `directory`, told `settings(port)`."""

    name: str
    module: str
    directory: Path
    run: int
    settings: Callable[[int], Settings]


class Component:
    """Keeps one child process alive until cancelled, or until there is a `failure`.

    `changed` is called when it answers, dies (then with its death) or is given up.
    """

    def __init__(
        self, program: Program, changed: Callable[[Death | None], None], http: aiohttp.ClientSession, pace: Pace
    ) -> None:
        self.url = ""  # where it answers now
        self.failure: Failure | None = None
        self.grace = pace.grace
        self._program = program
        self._changed = changed
        self._http = http
        self._pace = pace

    @property
    def name(self) -> str:
        """Which component of the namespace this is."""
        return self._program.name

    async def keep_alive(self) -> None:
        """Start the process again whenever it ends, ever more slowly, up to the limit of patience."""
        unanswered, delay = 0, self._pace.first_delay
        while True:
            began = monotonic()
            end = await self._live()
            unanswered = 0 if end.answered else unanswered + 1
            if end.hung or unanswered >= self._pace.deaths:
                return self._give_up(end, unanswered)
            if monotonic() - began > self._pace.longest_delay:
                delay = self._pace.first_delay
            await asyncio.sleep(delay)
            delay = min(2 * delay, self._pace.longest_delay)

    def _give_up(self, end: End, unanswered: int) -> None:
        times = "" if end.hung else f" {unanswered} times in a row before it answered"
        self.failure = Failure(reason=f"{self.name} {end.reason}{times}", log=self._log())
        self._changed(None)

    async def _live(self) -> End:
        """One life of the process, from its start to its end."""
        try:
            process = await self._start()
            try:
                return await self._watch(process)
            finally:
                self.url = ""
                await process.stop(self.grace)
        except OSError as error:  # such as a full disk
            return End(f"could not be run ({error})")

    async def _start(self) -> Guarded:
        directory = private_directory(self._program.directory)
        (directory / READY).unlink(missing_ok=True)
        memory = recall(directory)
        port = memory.port if memory and memory.run == self._program.run else 0
        settings = self._program.settings(port)
        write_settings(directory, self._program.settings(usable_port(settings.host, port)))
        return await spawn(
            [sys.executable, "-m", self._program.module], directory=directory, env={}, log=directory / LOG
        )

    async def _watch(self, process: Guarded) -> End:
        exited = asyncio.ensure_future(process.wait())
        answer = asyncio.ensure_future(self._answer())
        try:
            await asyncio.wait({exited, answer}, timeout=self._pace.ready, return_when=asyncio.FIRST_COMPLETED)
            if exited.done():
                return End(in_words(exited.result()))
            if not answer.done():
                return End(f"did not answer within {self._pace.ready:g} seconds", hung=True)
            self._answers(answer.result())
            reason = in_words(await exited)
        finally:
            exited.cancel()
            answer.cancel()
        self.url = ""
        self._changed(
            Death(run=self._program.run, component=self.name, life=uuid7().hex, reason=reason, log=self._log())
        )
        return End(reason, answered=True)

    def _answers(self, url: str) -> None:
        """From now on this is the component's address; before anybody is told, it is remembered."""
        port = urlsplit(url).port or 0
        write_settings(self._program.directory, self._program.settings(port))
        self.url = url
        self._changed(None)

    async def _answer(self) -> str:
        """The address, once the process answers there."""
        while True:
            if (url := self._announced()) and await self._is_ready(url):
                return url
            await asyncio.sleep(_POLL)

    def _announced(self) -> str | None:
        try:
            return msgspec.json.decode((self._program.directory / READY).read_bytes(), type=Ready).url
        except (FileNotFoundError, msgspec.DecodeError):  # not there, or not whole
            return None

    async def _is_ready(self, url: str) -> bool:
        try:
            async with self._http.get(f"{url}/readyz", timeout=_TIMEOUT) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    def _log(self) -> list[str]:
        return last_lines(self._program.directory / LOG)


def write_settings(directory: Path, settings: Settings) -> None:
    """What the process reads when it starts."""
    write_private(directory / SETTINGS, to_json(settings))


def in_words(code: int) -> str:
    """An exit code as a person says it."""
    return f"was killed by signal {-code}" if code < 0 else f"ended by itself with exit code {code}"
