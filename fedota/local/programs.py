"""Programs that are kept alive: started, waited for until they answer, started again when they end."""

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic
from typing import Final, NamedTuple

import msgspec
import structlog

from fedota.kernel.files import last_lines
from fedota.kernel.processes import Guarded, spawn
from fedota.local.state import LocalError

READY: Final = "ready.json"  # where a process of the platform says its address
_POLL: Final = 0.03  # seconds
_READY: Final = 60.0  # seconds: a small machine under load is slow, and a start that fails is noticed by its end
_FIRST_DELAY: Final = 0.1  # seconds
_LONGEST_DELAY: Final = 10.0  # seconds
_log = structlog.get_logger(__name__)


class Program(NamedTuple):
    """What to run in `directory`; `ready` says whether it answers."""

    name: str
    argv: Sequence[str]
    directory: Path
    ready: Callable[[], Awaitable[bool]]
    env: Mapping[str, str] = {}
    stop_signal: int = signal.SIGTERM
    grace: float = 10.0

    @property
    def log(self) -> Path:
        """Where it writes to."""
        return self.directory / "log"


@asynccontextmanager
async def kept_alive(program: Program) -> AsyncIterator[None]:
    """The program, answering, for as long as the block lasts. Raises `LocalError` when it does not start."""
    process = await _started(program)
    keeper = asyncio.create_task(_keep(program, process), name=f"keep {program.name}")
    try:
        yield
    finally:
        while not keeper.done():
            keeper.cancel()
            await asyncio.wait([keeper], timeout=program.grace + 20)


@asynccontextmanager
async def all_kept_alive(programs: Sequence[Program], tell: Callable[[str], None]) -> AsyncIterator[None]:
    """Programs that start and stop beside each other; `tell` hears the name of each as soon as it answers.

    When one does not start, the others are stopped again.
    """
    down = asyncio.Event()
    up = asyncio.Semaphore(0)

    async def hold(program: Program) -> None:
        async with kept_alive(program):
            tell(program.name)
            up.release()
            await down.wait()

    try:
        async with asyncio.TaskGroup() as group:
            for program in programs:
                group.create_task(hold(program), name=program.name)
            try:
                for _ in programs:
                    await up.acquire()
                yield
            finally:
                down.set()
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None


async def _started(program: Program) -> Guarded:
    (program.directory / READY).unlink(missing_ok=True)
    process = await spawn(
        program.argv,
        directory=program.directory,
        env=program.env,
        log=program.log,
        stop_signal=program.stop_signal,
    )
    try:
        async with asyncio.timeout(_READY):
            while not await program.ready():
                _require_running(program, process)
                await asyncio.sleep(_POLL)
            _require_running(program, process)  # else it was another one that answered, on a port that we lost
    except TimeoutError:
        await process.stop(program.grace)
        raise LocalError(_failure(program, f"did not answer within {_READY:g} seconds")) from None
    except BaseException:
        await process.stop(program.grace)
        raise
    return process


def _require_running(program: Program, process: Guarded) -> None:
    if process.ended:
        raise LocalError(_failure(program, "ended before it answered"))


def _failure(program: Program, what: str) -> str:
    said = last_lines(program.log)
    if said and (reason := _reason(said[-1])):
        return f"{program.name} {what}: {reason}\n{program.log} says more."
    lines = "\n".join(f"    {line}" for line in said)
    return f"{program.name} {what}. The end of {program.log}:\n{lines or '    (nothing)'}"


def _reason(line: str) -> str:
    """Why a process of ours could not run, where that is what it said last."""
    try:
        said = msgspec.json.decode(line, type=_Said)
    except msgspec.DecodeError:
        return ""
    return said.error if said.event == "could not run" else ""


class _Said(msgspec.Struct):
    event: str
    error: str = ""


async def _keep(program: Program, process: Guarded) -> None:
    """Start the program again whenever it ends, ever more slowly while it does not live for long."""
    delay, began = _FIRST_DELAY, monotonic()
    try:
        while True:
            code = await process.wait()
            _log.warning("ended, and is started again", program=program.name, code=code)
            delay = _FIRST_DELAY if monotonic() - began > _LONGEST_DELAY else min(2 * delay, _LONGEST_DELAY)
            await asyncio.sleep(delay)
            began = monotonic()
            try:
                process = await _started(program)
            except Exception as error:  # whatever is wrong now, such as a full disk, may be over the next time
                _log.error("could not be started", program=program.name, error=str(error) or type(error).__name__)
    finally:
        await process.stop(program.grace)
