"""The directory of a launched process: what it remembers, and who lives there."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.orchestrator.launchers import files
from services.orchestrator.launchers.component import in_words
from services.orchestrator.launchers.files import Memory


def _mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize(
    ("content", "memory"),
    [
        (None, None),
        (b"", None),
        (b'{"run": 1', None),
        (b'{"run": 1, "key": "k"}', None),
        (b'{"run": "1", "key": "k", "port": 2}', None),
        (b'{"run": 1, "key": "k", "port": 2, "plan": {"rounds": 3}}', Memory(run=1, key="k", port=2)),
    ],
)
def test_settings_are_remembered_when_they_can_be_read(
    tmp_path: Path, content: bytes | None, memory: Memory | None
) -> None:
    """What is broken counts as nothing: it is made anew."""
    if content is not None:
        (tmp_path / files.SETTINGS).write_bytes(content)
    assert files.recall(tmp_path) == memory


async def test_a_lock_lasts_as_long_as_any_process_that_has_it(tmp_path: Path) -> None:
    """It is handed on with its descriptor, and let go by the kernel however the process ends."""
    path = tmp_path / "alive"
    async with files.locked(path, 1) as descriptor:
        argv = (sys.executable, "-c", "input()")
        child = await asyncio.create_subprocess_exec(*argv, stdin=subprocess.PIPE, pass_fds=[descriptor])
    with pytest.raises(OSError, match="Another process still uses this"):
        async with files.locked(path, 0.1):
            raise AssertionError("the child still has it")
    waiting = asyncio.create_task(_take(path))
    child.kill()
    await waiting
    await child.wait()
    assert _mode(path) == 0o600


async def _take(path: Path) -> None:
    async with files.locked(path, 10) as descriptor:
        assert not os.get_inheritable(descriptor), "only who is meant to may inherit it"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0, "ended by itself with exit code 0"),
        (3, "ended by itself with exit code 3"),
        (-9, "was killed by signal 9"),
    ],
)
def test_exit_codes_are_said_in_words(code: int, words: str) -> None:
    """A person reads them."""
    assert in_words(code) == words
