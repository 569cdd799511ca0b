"""Child processes that never outlive their parent, even when it is killed with -9."""

import asyncio
import os
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from fedota.kernel import guard

_ORPHAN_GRACE: Final = 3.0  # seconds that a child has to end by itself when its parent has gone
_GUARD_GRACE: Final = 5.0  # seconds that the guard has to reap what it has killed
_LOG_BYTES: Final = 16 * 1024 * 1024
_KEPT: Final = ("PATH", "LANG", "LC_ALL", "TMPDIR", "TZ")
_BASE: Final = {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}  # the working directory never is a place to import from


class Guarded:
    """A running child, in a session and a process group of its own."""

    def __init__(self, guard_process: Process) -> None:
        self._guard = guard_process

    @property
    def pid(self) -> int:
        """The process id of the child's guard."""
        return self._guard.pid

    @property
    def ended(self) -> bool:
        """Whether it is over."""
        return self._guard.returncode is not None

    async def wait(self) -> int:
        """The exit code, once it is over; a negative one is the signal that killed it."""
        return await self._guard.wait()

    async def stop(self, grace: float) -> None:
        """Ask it to end, and after `grace` seconds kill it with all of its group. Harmless when it is over."""
        if not await self._ended(signal.SIGTERM, grace) and not await self._ended(signal.SIGQUIT, _GUARD_GRACE):
            await self._ended(signal.SIGKILL, _GUARD_GRACE)

    async def _ended(self, number: int, seconds: float) -> bool:
        if not self.ended:
            with suppress(ProcessLookupError):
                self._guard.send_signal(number)
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._guard.wait()
        return self.ended


async def spawn(
    argv: Sequence[str],
    *,
    directory: Path,
    env: Mapping[str, str],
    log: Path,
    stop_signal: int = signal.SIGTERM,
    keep_open: Sequence[int] = (),
) -> Guarded:
    """Start a program in `directory`, with nothing of our environment but where programs and languages are found.

    What it writes is appended to `log` (mode 0600). Its standard input never has anything to read and ends with us.
    The descriptors `keep_open` stay open in the child and its guard: a lock on one lasts as long as either lives.
    Raises `OSError` when it cannot be started; a program that does not exist shows as exit code 127.
    """
    _turn_over(log)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", guard.__file__, str(_ORPHAN_GRACE), str(int(stop_signal)), *argv),
            cwd=directory,
            env={**{name: os.environ[name] for name in _KEPT if name in os.environ}, **_BASE, **env},
            stdin=asyncio.subprocess.PIPE,
            stdout=descriptor,
            stderr=descriptor,
            start_new_session=True,
            pass_fds=keep_open,
        )
    finally:
        os.close(descriptor)
    return Guarded(process)


def _turn_over(log: Path) -> None:
    """Begin a new log where the old one is long; the one before it is kept."""
    if log.exists() and log.stat().st_size > _LOG_BYTES:
        log.replace(log.with_name(f"{log.name}.old"))
