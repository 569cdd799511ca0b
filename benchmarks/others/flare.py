"""NVIDIA FLARE in its proof-of-concept deployment: a server, a site for each client, and a job's process of each."""

import asyncio
import os
import shutil
from pathlib import Path
from typing import Final

import psutil

from benchmarks.memory import watched
from benchmarks.others.environments import environment_of
from benchmarks.others.stamps import seconds_of, stamps_of
from benchmarks.problem import MEGABYTE
from benchmarks.rounds import Measured, Shape
from fedota.kernel.files import free_port, last_lines, private_directory
from fedota.kernel.processes import spawn

VERSION: Final = "2.9.0"
NAME: Final = f"NVIDIA FLARE {VERSION}"
_SCRIPTS: Final = Path(__file__).parent / "flare_job"
_PATIENCE: Final = 600.0  # seconds
_GRACE: Final = 30.0  # seconds


async def flare_of(directory: Path, shape: Shape) -> Measured:
    """Rounds of this shape. Raises `NotInstalledError`."""
    programs = await environment_of("nvflare", VERSION)
    place = private_directory(directory / f"flare-{shape}")
    shutil.copytree(_SCRIPTS, place / "job", ignore=shutil.ignore_patterns("__pycache__"))
    workspace, told = place / "workspace", place / "told"
    argv = [str(programs / "python"), "job.py", str(workspace), str(told), str(free_port("127.0.0.1"))]
    argv += [str(shape.clients), str(shape.megabytes * MEGABYTE // 4), str(shape.rounds + 1)]
    env = {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(place),
        "NVFLARE_POC_WORKSPACE": str(workspace),
    }
    async with watched(lambda: _servers(workspace), 0.5) as peaks:
        driver = await spawn(argv, directory=place / "job", env=env, log=place / "log")
        try:
            async with asyncio.timeout(_PATIENCE):
                code = await driver.wait()
        finally:
            await driver.stop(_GRACE)
    if code != 0 or len(stamps := stamps_of(told)) <= shape.rounds:
        said = "\n".join(last_lines(place / "log"))
        raise RuntimeError(f"{NAME} did not come to its end (exit code {code}):\n{said}")
    return Measured(seconds_of(stamps), peaks.whole)


def _servers(workspace: Path) -> list[int]:
    """The server's own process and its job's."""
    commands = ((one.pid, one.info["cmdline"] or []) for one in psutil.process_iter(["cmdline"]))
    return [pid for pid, words in commands if _is_server(words, str(workspace))]


def _is_server(words: list[str], workspace: str) -> bool:
    return any(word.startswith("nvflare.private.fed.app.server.") for word in words) and any(
        word.startswith(workspace) for word in words
    )
