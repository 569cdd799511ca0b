"""Children end with their parent, however that ends, and whatever they do themselves."""

import os
import signal
import sys
from asyncio.subprocess import create_subprocess_exec
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedota.kernel.processes import Guarded, spawn
from tests.support.services import until

Start = Callable[..., Awaitable[Guarded]]
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
SLEEP = "import time; time.sleep(600)\n"
TELL = "import os, pathlib; pathlib.Path(f'pid.{os.getpid()}').touch()\n"
GRANDCHILD = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', {code!r}])\n"


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Starts Python code as a guarded child in the test's directory; none is left behind."""
    children: list[Guarded] = []

    async def starting(code: str, **more: Any) -> Guarded:
        child = await spawn([sys.executable, "-c", code], directory=tmp_path, env={}, log=tmp_path / "log", **more)
        children.append(child)
        return child

    yield starting
    for child in children:
        await child.stop(0)


async def told(directory: Path, count: int) -> list[int]:
    """The pids of `count` programs that have begun and said so."""

    async def begun() -> Sequence[Path]:
        found = list(directory.glob("pid.*"))
        return found if len(found) == count else []

    paths: Sequence[Path] = await until(begun, f"{count} programs have begun")
    return [int(path.suffix[1:]) for path in paths]


async def gone(pids: Sequence[int]) -> None:
    """Return when none of them runs."""

    async def none_runs() -> bool:
        return not any(_runs(pid) for pid in pids)

    await until(none_runs, f"{pids} have ended")


def _runs(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.parametrize("deaf", ["", DEAF], ids=["willing", "deaf"])
async def test_children_and_grandchildren_end_with_a_killed_parent(tmp_path: Path, deaf: str) -> None:
    """The parent is killed with -9: nothing below it goes on, though it ignores SIGTERM."""
    code = deaf + GRANDCHILD.format(code=deaf + TELL + SLEEP) + TELL + SLEEP
    parent_code = f"""
import asyncio, pathlib, sys
from fedota.kernel.processes import spawn
async def main():
    here = pathlib.Path.cwd()
    await spawn([sys.executable, "-c", {code!r}], directory=here, env={{}}, log=here / "log")
    await asyncio.sleep(600)
asyncio.run(main())
"""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    parent = await create_subprocess_exec(sys.executable, "-c", parent_code, cwd=tmp_path, env=env)
    try:
        pids = await told(tmp_path, 2)
    finally:
        parent.kill()
        await parent.wait()
    await gone(pids)


async def test_a_grandchild_that_is_left_behind_ends(start: Start, tmp_path: Path) -> None:
    """Its own parent ended well: the group goes with it."""
    child = await start(
        GRANDCHILD.format(code=TELL + SLEEP) + "import pathlib, time\n"
        "while not list(pathlib.Path().glob('pid.*')): time.sleep(0.01)\n"
    )
    pids = await told(tmp_path, 1)
    assert await child.wait() == 0
    await gone(pids)


async def test_a_child_whose_guard_is_killed_ends(start: Start, tmp_path: Path) -> None:
    """Linux kills it; the guard's end shows as what it was."""
    child = await start(TELL + SLEEP)
    pids = await told(tmp_path, 1)
    os.kill(child.pid, signal.SIGKILL)
    assert await child.wait() == -signal.SIGKILL
    await gone(pids)


async def test_a_child_is_asked_before_it_is_killed(start: Start, tmp_path: Path) -> None:
    """By its own stop signal; then it ends as it likes, within the grace."""
    code = "import signal, sys; signal.signal(signal.SIGINT, lambda *_: sys.exit(7))\n" + TELL + SLEEP
    child = await start(code, stop_signal=signal.SIGINT)
    await told(tmp_path, 1)
    await child.stop(20)
    assert child.ended and await child.wait() == 7
    await child.stop(20)  # harmless when it is over


async def test_a_deaf_child_is_killed_after_the_grace(start: Start, tmp_path: Path) -> None:
    """With its children."""
    child = await start(DEAF + GRANDCHILD.format(code=DEAF + TELL + SLEEP) + TELL + SLEEP)
    pids = await told(tmp_path, 2)
    await child.stop(0.1)
    assert child.ended and await child.wait() == -signal.SIGKILL
    await gone(pids)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("", 0),
        ("raise SystemExit(3)", 3),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", -signal.SIGSEGV),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    ],
)
async def test_the_exit_code_is_the_childs(start: Start, code: str, expected: int) -> None:
    """Numbers and signals come through the guard as they were."""
    child = await start(f"import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n{code}")
    assert await child.wait() == expected
    assert child.ended


async def test_a_program_that_does_not_exist(tmp_path: Path) -> None:
    """Code 127, as shells have it, and its log says which."""
    child = await spawn(["/no/such/program"], directory=tmp_path, env={}, log=tmp_path / "log")
    assert await child.wait() == 127
    assert (tmp_path / "log").read_text() == "/no/such/program cannot be run: No such file or directory\n"


async def test_a_directory_that_does_not_exist(tmp_path: Path) -> None:
    """Is told at once."""
    with pytest.raises(FileNotFoundError):
        await spawn(["true"], directory=tmp_path / "none", env={}, log=tmp_path / "log")


async def test_a_child_knows_only_what_it_is_told(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of our environment but the way to programs, no descriptor of ours, a log for its owner alone."""
    monkeypatch.setenv("FEDOTA_DATABASE_URL", "hunter2")
    inherited, other = os.pipe()
    try:
        os.set_inheritable(inherited, True)
        code = (
            "import os; print(sorted(os.environ.items()))\n"
            f"try: os.fstat({inherited})\nexcept OSError: print('closed')\n"
        )
        child = await start(code)
        assert await child.wait() == 0
    finally:
        os.close(inherited)
        os.close(other)
    log = tmp_path / "log"
    assert "hunter2" not in log.read_text() and "FEDOTA" not in log.read_text()
    assert "closed" in log.read_text()
    assert log.stat().st_mode & 0o777 == 0o600


async def test_what_is_kept_open_is_open_in_the_child(start: Start, tmp_path: Path) -> None:
    """That is how a child holds a lock for as long as it lives."""
    read, write = os.pipe()
    try:
        child = await start(f"import os; os.write({write}, b'held')", keep_open=[write])
        assert await child.wait() == 0
        assert os.read(read, 10) == b"held"
    finally:
        os.close(read)
        os.close(write)


async def test_a_stop_before_the_guard_has_begun(start: Start) -> None:
    """However early it comes, it is a stop."""
    child = await start(SLEEP)
    await child.stop(20)
    assert child.ended and await child.wait() < 0
