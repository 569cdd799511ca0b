"""One service under test, between real servers: run in the test's process, or in one of its own to be killed."""

import sys
from asyncio.subprocess import Process, create_subprocess_exec
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Generic, TypeVar

from aiohttp import web

from fedota.kernel.settings import ProcessSettings
from tests.support.services import Platform, Running, running, until

S = TypeVar("S", bound=ProcessSettings)


class ServiceWorld(Generic[S]):
    """A platform with one service that tests start, stop and kill.

    `create_app` and `settings` are the service's; `told` are settings of its own, by the names of their variables.
    """

    def __init__(
        self,
        platform: Platform,
        directory: Path,
        name: str,
        create_app: Callable[[S], web.Application],
        settings: S,
        **told: str,
    ) -> None:
        self.platform = platform
        self.directory = directory
        self.settings = settings
        self.children: list[Process] = []
        self._name = name
        self._create_app = create_app
        self._told = {
            "FEDOTA_DATABASE_URL": settings.database_url.reveal(),
            "FEDOTA_NATS_URL": settings.nats_url,
            "FEDOTA_NATS_CREDENTIALS": str(settings.nats_credentials),
            "FEDOTA_DIRECTORY": str(directory),
            **told,
        }

    def running(self) -> AbstractAsyncContextManager[Running]:
        """The service in this process."""
        return running(self._create_app, self.settings)

    async def process(self) -> Process:
        """The service as a process of its own, ready."""
        ready, log_file = self.directory / "ready.json", self.directory / f"{self._name}.log"
        ready.unlink(missing_ok=True)
        with log_file.open("ab") as log:
            child = await create_subprocess_exec(
                sys.executable, "-m", f"services.{self._name}", env=self._told, stderr=log
            )
        self.children.append(child)

        async def is_ready() -> bool:
            assert child.returncode is None, log_file.read_text()
            return ready.exists()

        await until(is_ready, f"{self._name} is ready")
        return child

    async def end(self) -> None:
        """Leave no process behind."""
        for child in self.children:
            if child.returncode is None:
                child.kill()
                await child.wait()
