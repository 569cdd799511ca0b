"""One component of a namespace as a child process: started, watched, started again at the same address."""

import asyncio
import ssl
import sys
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from time import monotonic, time
from typing import Any, Final, NamedTuple, TypeVar
from urllib.parse import urlsplit

import aiohttp
import msgspec
import structlog

from fedota.contracts.runtime import CoordinatorSettings, Ready, SelectorSettings
from fedota.events import to_json, uuid7
from fedota.kernel.files import free_port, last_lines, private_directory, write_private
from fedota.kernel.processes import Guarded, spawn
from fedota.tls import origin
from services.orchestrator.domain import Death, Failure
from services.orchestrator.launchers.files import ALIVE, CERTIFICATE, LOG, READY, SETTINGS, locked, recall

Settings = CoordinatorSettings | SelectorSettings
T = TypeVar("T")
_POLL: Final = 0.05  # seconds
_TIMEOUT: Final = aiohttp.ClientTimeout(total=2)
_MOST_SAID: Final = 1 << 16  # bytes of an answer that are read
_MOST_TOLD: Final = 500  # characters of that
_KNOWN: Final = 16  # different words of it that are remembered
_ALL_ADDRESSES: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - who listens at all of them is asked at one
_LIMITED: Final = ("/bin/sh", "-c", 'ulimit -c 0; ulimit -n 16384 2>/dev/null; exec "$@"', "sh")
_log = structlog.get_logger(__name__)


class Pace(NamedTuple):
    """How patient the launcher is, in seconds.

    A process that is not ready is ended when it has said nothing new for `ready`: whoever fetches a large model says
    how far it is, and may take long. A component that was never ready in this run is given up when it did not even
    answer, or after `deaths` such ends in a row. One that was is given up after `patience` without it: NATS or a
    service may be away for a while.
    """

    first_delay: float = 0.2
    longest_delay: float = 30.0
    ready: float = 30.0
    patience: float = 900.0
    look: float = 5.0  # between two looks whether it is still ready
    grace: float = 10.0
    deaths: int = 5
    renewal: float = 30 * 86_400.0  # the age of a certificate at which it is renewed


class End(NamedTuple):
    """How a life of the process ended, after it had been ready or not; `hung` when it ran and did not answer.

    `said` is why it ended or was not ready then, in its own words.
    """

    reason: str
    was_ready: bool = False
    hung: bool = False
    said: str = ""

    @property
    def last_words(self) -> str:
        """To be told after the reason."""
        return f". It last said: {self.said}" if self.said else ""


class _Readiness(msgspec.Struct):
    """What `/readyz` answers: each thing that is wrong, by its name."""

    failing: dict[str, str] = {}


class Program(NamedTuple):
    """What a component runs: `python -m module` in `directory`, told `settings(port)`.

    What it speaks TLS with is made by `certificate` (None: it speaks plain HTTP), and those who ask it are to trust
    `trusted`.
    """

    name: str
    module: str
    directory: Path
    run: int
    settings: Callable[[int], Settings]
    certificate: Callable[[], bytes] | None = None
    trusted: ssl.SSLContext | bool = True


class _Line(msgspec.Struct):
    """A line of a process's log."""

    level: str = ""
    error: str = ""


class Component:
    """Keeps one child process alive until cancelled, or until there is a `failure`.

    `changed` is called when it is ready, dies (then with its death) or is given up.
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
        # its port is remembered when it has answered in this run, perhaps to an earlier life of the launcher
        self._has_answered = self._port() != 0
        self._told = not self._has_answered  # whether nobody believes any more that it answers
        self._said = ""  # why it was not ready when it answered last in this life; empty when it was, or never did
        self._alive = monotonic()  # when it was ready the last time, or got on

    @property
    def name(self) -> str:
        """Which component of the namespace this is."""
        return self._program.name

    async def keep_alive(self) -> None:
        """Start the process again whenever it ends, ever more slowly, up to the limit of patience."""
        unanswered, delay, self._alive = 0, self._pace.first_delay, monotonic()
        while True:
            began = monotonic()
            end = await self._live()
            if end.was_ready:
                unanswered, self._alive = 0, monotonic()
            else:
                unanswered += 1
            if self._is_hopeless(end, unanswered, monotonic() - self._alive):
                self._give_up(end, unanswered)
                return
            if end.was_ready and monotonic() - began > self._pace.longest_delay:
                delay = self._pace.first_delay
            await asyncio.sleep(delay)
            delay = min(2 * delay, self._pace.longest_delay)

    def _is_hopeless(self, end: End, unanswered: int, seconds: float) -> bool:
        if end.was_ready:
            return False
        if self._has_answered:
            return seconds > self._pace.patience
        return end.hung or unanswered >= self._pace.deaths

    def _give_up(self, end: End, unanswered: int) -> None:
        times = f" ({unanswered} times in a row, never ready)" if unanswered > 1 else ""
        self.failure = Failure(reason=f"{self.name} {end.reason}{times}{end.last_words}", log=self._log())
        self._changed(None)

    async def _live(self) -> End:
        """One life of the process, from its start to its end, which is told unless that was told before."""
        try:
            process = await self._start()
            try:
                end = await self._watch(process)
            finally:
                self.url = ""
                await process.stop(self.grace)
        except OSError as error:  # such as a full disk
            end = End(f"could not be run ({error})")
        if not self._told:
            self._told = True
            self._changed(self._death(end.reason + end.last_words))
        return end

    def _death(self, reason: str) -> Death:
        return Death(run=self._program.run, component=self.name, life=uuid7().hex, reason=reason, log=self._log())

    async def _start(self) -> Guarded:
        """Start the process as soon as the one before it is gone: then its port is free, and never do two run."""
        directory = private_directory(self._program.directory)
        async with locked(directory / ALIVE, self._pace.ready) as lock:
            (directory / READY).unlink(missing_ok=True)
            settings = self._program.settings(self._port())
            self._certify()
            self._write(msgspec.structs.replace(settings, port=free_port(settings.host, settings.port)))
            argv = [*_LIMITED, sys.executable, "-m", self._program.module]
            return await spawn(argv, directory=directory, env={}, log=directory / LOG, keep_open=[lock])

    def _port(self) -> int:
        memory = recall(self._program.directory)
        return memory.port if memory and memory.run == self._program.run else 0

    async def _watch(self, process: Guarded) -> End:
        """Until the process ends, or is not ready for too long."""
        self._said = ""
        exited = asyncio.ensure_future(process.wait())
        try:
            url = await _unless(exited, self._readiness())
            if url:
                self._answers(url)
                await _unless(exited, self._fall_ill(url))
            reason = in_words(exited.result()) if exited.done() else self._stuck(was_ready=bool(url))
            said = self._last_error() if exited.done() else ""
            hung = not exited.done() and not self._said
            return End(reason, was_ready=bool(url), hung=hung, said=said or self._said)
        finally:
            exited.cancel()

    def _stuck(self, *, was_ready: bool) -> str:
        never = "was not ready and said nothing new" if self._said else "did not answer"
        return f"{'was not ready any more' if was_ready else never} for {self._pace.ready:g} seconds"

    def _answers(self, url: str) -> None:
        """From now on this is the component's address; before anybody is told, it is remembered."""
        self._write(self._program.settings(urlsplit(url).port or 0))
        self._has_answered, self._told = True, False
        self.url = url
        self._changed(None)

    async def _readiness(self) -> str:
        """The address, once the process is ready there; empty when it says nothing new for too long.

        Words that come again are not new: whoever fails in two ways by turns gets no further.
        """
        heard, news = deque([self._said], _KNOWN), monotonic()
        while monotonic() - news < self._pace.ready:
            if (url := self._announced()) and await self._is_ready(url):
                return url
            if self._said not in heard:
                heard.append(self._said)
                news = self._alive = monotonic()
            await asyncio.sleep(_POLL)
        return ""

    def _announced(self) -> str | None:
        try:
            return msgspec.json.decode((self._program.directory / READY).read_bytes(), type=Ready).url
        except (FileNotFoundError, msgspec.DecodeError):  # not there, or not whole
            return None

    async def _fall_ill(self, url: str) -> None:
        """Return when it has not been ready for as long as a start may take: it hangs, or says that it is broken."""
        well = monotonic()
        while monotonic() - well < self._pace.ready:
            await asyncio.sleep(self._pace.look)
            self._renew()
            if await self._is_ready(url):
                well = monotonic()

    async def _is_ready(self, url: str) -> bool:
        """Whether it answers, and that it is; else what it `said` is kept.

        Asked where it listens: the address that others have for it may lead past this machine.
        """
        try:
            async with self._http.get(
                f"{self._here(url)}/readyz", timeout=_TIMEOUT, allow_redirects=False, ssl=self._program.trusted
            ) as response:
                self._said = "" if response.status == 200 else await _said(response)
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    def _here(self, url: str) -> str:
        port = urlsplit(url).port or 0
        return origin(urlsplit(url).scheme, probed(self._program.settings(port).host), port)

    def _certify(self) -> None:
        if self._program.certificate:
            write_private(self._program.directory / CERTIFICATE, self._program.certificate())

    def _renew(self) -> None:
        """The process takes up what is renewed: nobody is cut off, however long the training lasts.

        What cannot be renewed now, as on a full disk, is at the next look: the one before it is good for long yet.
        """
        path = self._program.directory / CERTIFICATE
        try:
            if path.exists() and time() - path.stat().st_mtime > self._pace.renewal:
                self._certify()
        except OSError as error:
            _log.warning("a certificate could not be renewed", component=self.name, path=str(path), error=str(error))

    def _last_error(self) -> str:
        """Why it ended by itself, as the last line of its log has it; empty when that is about something else."""
        with suppress(IndexError, msgspec.DecodeError):
            line = msgspec.json.decode(self._log()[-1], type=_Line)
            return line.error[:_MOST_TOLD] if line.level == "critical" else ""
        return ""

    def _log(self) -> list[str]:
        return last_lines(self._program.directory / LOG)

    def _write(self, settings: Settings) -> None:
        """What the process reads when it starts, and what is remembered of it."""
        write_private(self._program.directory / SETTINGS, to_json(settings))


def probed(host: str) -> str:
    """An address of this machine at which a process that listens at `host` answers."""
    return _ALL_ADDRESSES.get(host, host)


def in_words(code: int) -> str:
    """An exit code as a person says it."""
    return f"was killed by signal {-code}" if code < 0 else f"ended by itself with exit code {code}"


async def _said(response: aiohttp.ClientResponse) -> str:
    """What is wrong, in the words of whoever answered that it is not ready."""
    try:
        body = await response.content.readexactly(_MOST_SAID)
    except asyncio.IncompleteReadError as short:  # the whole of it, that is
        body = short.partial
    with suppress(msgspec.DecodeError):
        if failing := msgspec.json.decode(body, type=_Readiness).failing:
            return "; ".join(failing.values())[:_MOST_TOLD]
    return f"{response.status} {response.reason}"


async def _unless(exited: asyncio.Future[int], work: Coroutine[Any, Any, T]) -> T | None:
    """What `work` gives; None when the process ends before that."""
    task = asyncio.ensure_future(work)
    either: set[asyncio.Future[Any]] = {exited, task}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() and not exited.done() else None
    finally:
        task.cancel()
