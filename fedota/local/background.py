"""The platform in the background: started and waited for, looked at, stopped, from other processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from fedota.kernel.files import last_lines, write_private
from fedota.local.state import LocalError, command, held, is_held, is_ours, own_directory

_FILE: Final = "platform.json"
LOG: Final = "platform.log"
_POLL: Final = 0.05  # seconds
_STOP: Final = 60.0  # seconds


class Progress(msgspec.Struct, kw_only=True):
    """What a supervisor says of itself: what has come up, then where people go, or why it could not start.

    `moved_from` is the gateway's port before this start where another program has that now, else 0.
    """

    pid: int
    up: list[str] = []
    gateway_url: str = ""
    moved_from: int = 0
    failure: str = ""


def write_progress(path: Path, progress: Progress) -> None:
    """Say it to whoever waits."""
    write_private(path / _FILE, msgspec.json.encode(progress))


def read_progress(path: Path) -> Progress | None:
    """What the supervisor of this data directory said last, if one runs or could not start."""
    with suppress(FileNotFoundError):
        return msgspec.json.decode((path / _FILE).read_bytes(), type=Progress)
    return None


def forget_progress(path: Path) -> None:
    """Nothing runs here any more; only for who holds the directory."""
    (path / _FILE).unlink(missing_ok=True)


def forget_stale_progress(path: Path) -> None:
    """Remove what a supervisor said that was killed. Raises `LocalError` when one runs."""
    with held(path):
        forget_progress(path)


def supervisor_argv(path: Path) -> list[str]:
    """The command that runs the platform in a data directory until it is stopped."""
    return [sys.executable, "-m", "fedota.local", str(path)]


def start(path: Path, tell: Callable[[str], None]) -> Progress:
    """Start the platform; it goes on when this process ends. `tell` hears what has come up. Raises `LocalError`."""
    own_directory(path)
    if is_held(path):
        progress = read_progress(path)
        if progress and progress.gateway_url:
            return progress
        raise LocalError(f"A platform is just starting or stopping in {path}. Look again: {command('status', path)}")
    forget_stale_progress(path)
    supervisor = Detached(path)
    try:
        return wait_for_start(path, tell, lambda: supervisor.ended)
    except BaseException:
        supervisor.stop()
        raise


class Detached:
    """A supervisor that goes on when this process ends; `env` is its environment (None: that of this process)."""

    def __init__(self, path: Path, env: Mapping[str, str] | None = None) -> None:
        with os.fdopen(os.open(path / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as log:
            self._process = subprocess.Popen(
                supervisor_argv(path),
                cwd=path,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def ended(self) -> bool:
        """Whether it is over."""
        return self._process.poll() is not None

    def stop(self) -> None:
        """Stop it and wait until it has."""
        self._process.terminate()
        self._process.wait(_STOP)


def wait_for_start(path: Path, tell: Callable[[str], None], ended: Callable[[], bool]) -> Progress:
    """Return when the platform answers. Raises `LocalError` when its supervisor has `ended`."""
    told = 0
    while True:
        over = ended()  # before the last look: what it said at its end counts
        progress = read_progress(path)
        for name in progress.up[told:] if progress else ():
            tell(name)
            told += 1
        if progress and progress.gateway_url:
            return progress
        if progress and progress.failure:
            raise LocalError(progress.failure)
        if over and not is_held(path):  # else another one was quicker, and it is that one that comes up
            lines = "\n".join(f"    {line}" for line in last_lines(path / LOG))
            raise LocalError(f"The platform ended while it was starting. The end of {path / LOG}:\n{lines}")
        time.sleep(_POLL)


def stop(path: Path) -> bool:
    """Stop the platform and wait until nothing of it is left; False when none was running. Raises `LocalError`."""
    if not is_ours(path):
        raise LocalError(f"There is no platform in {path}. Say with --data-dir where it is.")
    if not is_held(path):
        return False
    progress = read_progress(path)
    if progress is None:
        raise LocalError(f"A platform is just starting or stopping in {path}. Try again in a moment.")
    with suppress(ProcessLookupError):
        os.kill(progress.pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOP
    while is_held(path):
        if time.monotonic() > deadline:
            raise LocalError(f"The platform (process {progress.pid}) has not stopped after {_STOP:g} seconds.")
        time.sleep(_POLL)
    return True
