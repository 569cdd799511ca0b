"""The command `fedota` as a person runs it, each in a data directory of the test's own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

PATIENCE = 180.0  # seconds: two cores may be busy with other things


class Command:
    """`fedota …` with all its files below a directory of the test's own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.data_directory = directory / "share" / "fedota"  # where no --data-dir is given

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        return self.run_beside(*self._argv(arguments))

    def run_beside(self, *argv: str, directory: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run another command, for which `fedota` and `python` are these, to its end."""
        return subprocess.run(
            argv, env=self._environment(), cwd=directory, capture_output=True, text=True, timeout=PATIENCE
        )

    @contextmanager
    def started(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """Run it beside the test; killed afterwards if it still runs."""
        with subprocess.Popen(
            self._argv(arguments),
            env=self._environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def processes(self) -> list[psutil.Process]:
        """Every process that has something of this test's directory in its command or stands in it."""
        return [process for process in psutil.process_iter() if process.pid != os.getpid() and self._is_ours(process)]

    def wait_until_nothing_is_left(self) -> None:
        """Return when no process of this command lives any more."""
        deadline = time.monotonic() + PATIENCE
        while left := self.processes():
            if time.monotonic() > deadline:
                raise AssertionError(f"still there: {[process.cmdline() for process in left]}")
            psutil.wait_procs(left, timeout=0.2)

    def _is_ours(self, process: psutil.Process) -> bool:
        place = str(self.directory)
        try:
            return place in " ".join(process.cmdline()) or process.cwd().startswith(place)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            return False

    def _argv(self, arguments: tuple[str, ...]) -> list[str]:
        return [sys.executable, "-m", "fedota", *arguments]

    def _environment(self) -> dict[str, str]:
        places = {"TMPDIR": str(self.directory), "XDG_DATA_HOME": str(self.data_directory.parent)}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return {**os.environ, **places, "PATH": path, "COLUMNS": "100"}


@contextmanager
def commanding(directory: Path) -> Iterator[Command]:
    """The command; whatever a failed test left running is killed."""
    command = Command(directory)
    try:
        yield command
    finally:
        for process in command.processes():
            process.send_signal(signal.SIGKILL)
        command.wait_until_nothing_is_left()


@pytest.fixture
def fedota(tmp_path: Path) -> Iterator[Command]:
    """The command, with nothing that runs."""
    with commanding(tmp_path) as command:
        yield command
