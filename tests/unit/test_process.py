"""The scaffold of every process, as a process of its own."""

import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

_PROGRAM = """
import asyncio
import sys
from contextlib import asynccontextmanager
from pathlib import Path

from aiohttp import web

from fedota import process
from fedota.contracts.runtime import Listening

async def work(kind):
    if kind in ("vital", "other"):
        while not Path("break").exists():
            await asyncio.sleep(0.01)
        raise ValueError("it broke")
    await asyncio.Event().wait()

@asynccontextmanager
async def resources(service, kind):
    if kind == "slow":
        Path("starting").touch()
        await asyncio.sleep(60)
    if kind == "failing":
        raise OSError("no disk")
    if kind == "mistaken":
        raise LookupError("Set the disk.")
    async with service.running("work", work(kind), vital=kind == "vital"):
        yield

def create_app():
    app, service = web.Application(), process.Service("test")
    process.attach(app, service, resources(service, sys.argv[1]))
    return app

process.configure_logging("test", "info")
process.run(create_app, Listening(), directory=Path.cwd(), follow_parent=True, mistakes=(LookupError,))
"""


class Child:
    """The program above, in its own directory."""

    def __init__(self, directory: Path, kind: str, stdin: int = subprocess.PIPE) -> None:
        self.directory = directory
        with (directory / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, kind], cwd=directory, stdin=stdin, stderr=log
            )

    def wait_for(self, name: str) -> Path:
        """Return when the file is there."""
        path = self.directory / name
        while not path.exists():
            assert self.process.poll() is None, self.log
        return path

    def ready(self) -> tuple[int, bytes]:
        """What `/readyz` says."""
        url = msgspec.json.decode(self.wait_for("ready.json").read_bytes())["url"]
        try:
            with urllib.request.urlopen(f"{url}/readyz") as reply:
                return reply.status, reply.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    def ended(self) -> tuple[int, str]:
        """Exit code and log."""
        return self.process.wait(timeout=15), self.log

    @property
    def log(self) -> str:
        """What it wrote."""
        return (self.directory / "log").read_text()


@pytest.fixture
def children() -> Iterator[list[Child]]:
    """Those that a test started; none is left behind."""
    started: list[Child] = []
    yield started
    for child in started:
        child.process.kill()
        child.process.wait()
        if child.process.stdin is not None:
            child.process.stdin.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_stops_when_asked(tmp_path: Path, children: list[Child], number: signal.Signals) -> None:
    """With 0."""
    children.append(child := Child(tmp_path, "fine"))
    assert child.ready()[0] == 200
    child.process.send_signal(number)
    code, log = child.ended()
    assert code == 0 and '"stopping"' in log


def test_it_ends_with_its_launcher(tmp_path: Path, children: list[Child]) -> None:
    """When the pipe that it reads from is closed."""
    children.append(child := Child(tmp_path, "fine"))
    assert child.ready()[0] == 200
    assert child.process.stdin is not None
    child.process.stdin.close()
    assert child.ended()[0] == 0


def test_without_a_launcher_it_stays(tmp_path: Path, children: list[Child]) -> None:
    """In a container standard input ends at once, and means nothing."""
    children.append(child := Child(tmp_path, "fine", subprocess.DEVNULL))
    assert child.ready()[0] == 200
    assert child.ready()[0] == 200
    child.process.terminate()
    assert child.ended()[0] == 0


def test_it_stops_while_it_comes_up(tmp_path: Path, children: list[Child]) -> None:
    """Nobody has to wait for what is not wanted any more."""
    children.append(child := Child(tmp_path, "slow"))
    child.wait_for("starting")
    child.process.terminate()
    code, log = child.ended()
    assert code == 0 and "stopped before it was ready" in log


def test_a_failed_start_is_told(tmp_path: Path, children: list[Child]) -> None:
    """In the log and by the exit code."""
    children.append(child := Child(tmp_path, "failing"))
    code, log = child.ended()
    assert code == 1 and '"error": "no disk"' in log and "Traceback" in log
    assert not (tmp_path / "ready.json").exists()


def test_a_mistake_of_who_runs_it_is_a_sentence(tmp_path: Path, children: list[Child]) -> None:
    """What to do about it, and not where in the program it was noticed."""
    children.append(child := Child(tmp_path, "mistaken"))
    code, log = child.ended()
    assert code == 1 and '"error": "Set the disk."' in log and "Traceback" not in log


def test_without_vital_work_it_ends(tmp_path: Path, children: list[Child]) -> None:
    """So that it is started again."""
    children.append(child := Child(tmp_path, "vital"))
    assert child.ready()[0] == 200
    (tmp_path / "break").touch()
    code, log = child.ended()
    assert code == 1 and "it broke" in log


def test_without_other_work_it_is_not_ready(tmp_path: Path, children: list[Child]) -> None:
    """And says which work that was."""
    children.append(child := Child(tmp_path, "other"))
    child.wait_for("ready.json")
    (tmp_path / "break").touch()
    while (answer := child.ready())[0] == 200:
        pass
    assert answer[0] == 503 and b"work has ended" in answer[1]
    os.kill(child.process.pid, signal.SIGTERM)
    assert child.ended()[0] == 0
