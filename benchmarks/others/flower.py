"""Flower as its documentation deploys it: a SuperLink, a SuperNode for each client, and a process for each app."""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final, NamedTuple

import psutil

from benchmarks.memory import family, watched
from benchmarks.others.environments import environment_of
from benchmarks.others.stamps import seconds_of, stamps_of
from benchmarks.problem import MEGABYTE
from benchmarks.rounds import Measured, Shape
from benchmarks.until import until
from fedota.kernel.files import free_port, last_lines, private_directory
from fedota.kernel.processes import Guarded, spawn

VERSION: Final = "1.42.0"
NAME: Final = f"Flower {VERSION}"
_HOST: Final = "127.0.0.1"
_APP: Final = Path(__file__).parent / "flower_app"
_PATIENCE: Final = 600.0  # seconds
_GRACE: Final = 10.0  # seconds


async def flower_of(directory: Path, shape: Shape) -> Measured:
    """Rounds of this shape. Raises `NotInstalledError`."""
    programs = await environment_of("flwr", VERSION)
    place = private_directory(directory / f"flower-{shape}")
    shutil.copytree(_APP, place / "app", ignore=shutil.ignore_patterns("__pycache__"))
    told = place / "told"

    async def over() -> bool:
        return len(stamps_of(told)) > shape.rounds

    flower = _Flower(programs, place)
    async with flower.deployed(shape.clients) as link:
        server = psutil.Process(link.pid)
        async with watched(lambda: family(server)[1:], 0.25) as peaks:  # the first is our guard
            await flower.submit(shape, told)
            await _patient(over, place)
    return Measured(seconds_of(stamps_of(told)), peaks.whole)


class _Flower(NamedTuple):
    """Its programs, and a directory for what they write."""

    programs: Path
    place: Path

    @property
    def env(self) -> dict[str, str]:
        """Nothing is told to anybody, and no newer release is looked for."""
        return {
            "PATH": f"{self.programs}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(self.place),
            "FLWR_HOME": str(self.place),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
        }

    @asynccontextmanager
    async def deployed(self, clients: int) -> AsyncIterator[Guarded]:
        """The SuperLink, with a SuperNode for each client on its way."""
        port, *others = _ports(1 + clients)
        address = f"{_HOST}:{port}"
        (self.place / "config.toml").write_text(
            f'[superlink]\ndefault = "bench"\n[superlink.bench]\naddress = "{address}"\ninsecure = true\n'
        )
        link = ("--insecure", "--disable-runtime-dependency-installation", "--port", str(port))
        node = ("--insecure", "--superlink", address, "--port")
        async with AsyncExitStack() as stack:
            started = await stack.enter_async_context(self._started("superlink", "flower-superlink", *link))
            await until(lambda: _listens(port), _PATIENCE)
            for number, other in enumerate(others):
                nodes = self._started(f"supernode-{number}", "flower-supernode", *node, str(other))
                await stack.enter_async_context(nodes)
            yield started

    @asynccontextmanager
    async def _started(self, name: str, program: str, *arguments: str) -> AsyncIterator[Guarded]:
        argv = [str(self.programs / program), *arguments]
        guard = await spawn(argv, directory=self.place, env=self.env, log=self.place / f"{name}.log")
        try:
            yield guard
        finally:
            await guard.stop(_GRACE)

    async def submit(self, shape: Shape, told: Path) -> None:
        """Hand the app over. Raises `RuntimeError` with what Flower says when it does not take it."""
        floats = shape.megabytes * MEGABYTE // 4
        config = f'clients={shape.clients} floats={floats} rounds={shape.rounds} told="{told}"'
        process = await asyncio.create_subprocess_exec(
            *(str(self.programs / "flwr"), "run", "app", "bench", "--run-config", config),
            cwd=self.place,
            env=self.env,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said, _ = await process.communicate()
        if process.returncode != 0:
            raise RuntimeError(f"Flower did not take the app:\n{said.decode()}")


async def _patient(over: Callable[[], Awaitable[bool]], place: Path) -> None:
    """Wait for the last round. Raises `RuntimeError` with the last words of the SuperLink."""
    try:
        await until(over, _PATIENCE)
    except TimeoutError:
        said = "\n".join(last_lines(place / "superlink.log"))
        raise RuntimeError(f"{NAME} did not come to its end in {_PATIENCE:.0f} seconds:\n{said}") from None


def _ports(count: int) -> list[int]:
    taken: list[int] = []
    for _ in range(count):
        taken.append(free_port(_HOST, 0, taken))
    return taken


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection(_HOST, port)
    except OSError:
        return False
    writer.close()
    return True
