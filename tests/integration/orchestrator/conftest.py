"""The orchestrator between real servers; the problems service is played by the tests, the runtime by stand-ins."""

import asyncio
import json
import sys
from asyncio.subprocess import Process
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec
import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedota.contracts.runtime import Ready
from fedota.events import EventData
from fedota.events.orchestrator import InfraSpawned
from fedota.events.problems import ModelFile, Plan, ProblemStarted, ProblemStopped
from services.orchestrator.settings import Settings
from tests.integration.orchestrator.run import STAND_IN, create
from tests.support.services import Platform, Running, new_id, running, until

MODEL: Final = ModelFile(key="k/model.safetensors", sha256="a" * 64, size=10)
COMPONENTS: Final = ("coordinator", "selector-0", "selector-1")


class World:
    """A platform with an orchestrator that tests start, kill and look at."""

    def __init__(self, platform: Platform, directory: Path) -> None:
        self.platform = platform
        self.namespaces = directory / "namespaces"
        self.directory = directory
        self.settings = platform.settings(
            Settings,
            "orchestrator",
            directory=directory,
            token_public_key_file=_public_key(directory / "tokens.pem"),
            operator_seed_file=platform.servers.nats_operator,
            system_credentials=platform.servers.nats_keys["system"],
            platform_account=platform.servers.platform_account,
            farewell=0.0,
        )
        self.children: list[Process] = []

    def running(self) -> AbstractAsyncContextManager[Running]:
        """The orchestrator in this process."""
        return running(create, self.settings)

    async def process(self) -> Process:
        """The orchestrator as a process of its own, ready."""
        (self.directory / "ready.json").unlink(missing_ok=True)
        told = {**msgspec.to_builtins(self.settings, enc_hook=_plain), "log_level": "info"}
        (self.directory / "settings.json").write_text(json.dumps(told))
        with (self.directory / "orchestrator.log").open("ab") as log:
            child = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tests.integration.orchestrator.run"),
                env={"FEDOTA_SETTINGS": str(self.directory / "settings.json"), "PATH": "/usr/bin:/bin"},
                stderr=log,
            )
        self.children.append(child)
        await until(self._is_ready, "the orchestrator is ready")
        return child

    async def _is_ready(self) -> bool:
        assert self.children[-1].returncode is None, (self.directory / "orchestrator.log").read_text()
        return (self.directory / "ready.json").exists()

    async def start(self, problem_id: str, run: int = 1, *, selectors: int = 2, behaviour: str | None = None) -> None:
        """A problem is started."""
        config = {} if behaviour is None else {"behaviour": behaviour}
        plan = Plan(rounds=1, goal_count=1, selectors=selectors, client_config=config)
        await self.platform.record(ProblemStarted(problem_id=problem_id, run=run, plan=plan, model=MODEL))

    async def end(self, problem_id: str, run: int = 1) -> None:
        """A problem is stopped by its setter."""
        await self.platform.record(ProblemStopped(problem_id=problem_id, run=run, reason="made up"))

    async def said(self, problem_id: str) -> list[EventData]:
        """All that the orchestrator has said of a problem."""
        return [event.data for event in await self.platform.events(f"orchestrator/{problem_id}")]

    async def hears(self, problem_id: str, *kinds: type[EventData]) -> list[EventData]:
        """What was said, as soon as it is of these kinds, in this order."""

        async def look() -> list[EventData] | None:
            said = await self.said(problem_id)
            return said if len(said) >= len(kinds) else None

        said = await until(look, f"{len(kinds)} events")
        assert [type(data) for data in said] == list(kinds), said
        return list(said)

    async def spawned(self, problem_id: str) -> InfraSpawned:
        """The problem is started and its infrastructure answers; this was said of it."""
        await self.start(problem_id)
        [spawned] = await self.hears(problem_id, InfraSpawned)
        assert isinstance(spawned, InfraSpawned)
        return spawned

    def component(self, problem_id: str, name: str) -> Path:
        """The directory of a component."""
        return self.namespaces / f"fedota-{problem_id}" / name

    def log_of(self, problem_id: str, name: str) -> list[str]:
        """What a component has written, over all its lives."""
        return (self.component(problem_id, name) / "log").read_text().splitlines()

    def ports(self, problem_id: str) -> list[int]:
        """The ports that are remembered."""
        files = [self.component(problem_id, name) / "settings.json" for name in COMPONENTS]
        return [json.loads(file.read_bytes())["port"] for file in files]

    def secrets(self, problem_id: str) -> tuple[str, str]:
        """What a launch has for itself alone: the key that its components share, and the NATS credentials."""
        coordinator = json.loads((self.component(problem_id, "coordinator") / "settings.json").read_bytes())
        return coordinator["key"], Path(coordinator["nats_credentials"]).read_text()

    async def fetch(self, url: str) -> str:
        """The body that is answered with."""
        async with aiohttp.ClientSession() as http, http.get(url) as reply:
            return await reply.text()

    def pid(self, problem_id: str, name: str) -> int:
        """The process that answers as a component."""
        return msgspec.json.decode((self.component(problem_id, name) / "ready.json").read_bytes(), type=Ready).pid

    def processes(self) -> Counter[str]:
        """How many launched programs run in each `<namespace>/<component>`, whoever started them."""
        return Counter(
            str(cwd.relative_to(self.namespaces))
            for process in psutil.process_iter()
            if (cwd := _stand_in_directory(process)) and cwd.is_relative_to(self.namespaces)
        )

    async def only_run(self, *problem_ids: str) -> None:
        """Exactly one process of each component of these problems runs, and no other."""
        expected = Counter(f"fedota-{problem_id}/{name}" for problem_id in problem_ids for name in COMPONENTS)

        async def look() -> bool:
            return self.processes() == expected

        await until(look, f"only {sorted(expected)} run")

    async def is_gone(self, problem_id: str) -> None:
        """Nothing of the problem's namespace is left."""

        async def look() -> bool:
            return not (self.namespaces / f"fedota-{problem_id}").exists()

        await until(look, "the namespace is removed")

    async def close(self) -> None:
        """Nothing that a test started outlives it."""
        for child in self.children:
            if child.returncode is None:
                child.terminate()
            await child.wait()
        await self.only_run()


def _stand_in_directory(process: psutil.Process) -> Path | None:
    """Where a stand-in lives; None for other processes, such as its guard and the shell that it begins as."""
    try:
        argv, directory = process.cmdline(), process.cwd()
    except psutil.Error:  # it has ended, or is another user's
        return None
    return Path(directory) if argv[1:] == ["-m", STAND_IN] else None


def _public_key(path: Path) -> Path:
    key = Ed25519PrivateKey.generate().public_key()
    path.write_bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return path


def _plain(value: Any) -> str:
    return str(value.reveal() if hasattr(value, "reveal") else value)


async def answers(url: str) -> bool:
    """Whether somebody answers there."""
    async with aiohttp.ClientSession() as http:
        try:
            async with http.get(f"{url}/readyz") as reply:
                return reply.status == 200
        except aiohttp.ClientConnectionError:
            return False


@pytest.fixture
async def world(servers: Any, migrated_url: str, tmp_path: Path) -> AsyncIterator[World]:
    """No orchestrator yet."""
    async with Platform.open(servers, migrated_url) as platform:
        world = World(platform, tmp_path)
        try:
            yield world
        finally:
            await world.close()


@pytest.fixture
def problem_id() -> str:
    """A problem."""
    return new_id()
