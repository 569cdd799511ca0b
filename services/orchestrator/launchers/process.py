"""Coordinators and selectors as child processes of the orchestrator, each in a directory of its own.

`<runtime directory>/<namespace>/<component>/` holds what a process is told and what it writes. It outlives the
orchestrator: after a restart the same run gets the same key and the same ports from it, and the same authority from
`<namespace>/authority/`.
"""

import asyncio
import os
import secrets
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import aiohttp

from fedota.kernel.files import private_directory
from services.orchestrator.domain import COORDINATOR, Infra, Spec, is_namespace
from services.orchestrator.launchers import Change, Exposure
from services.orchestrator.launchers.accounts import Accounts
from services.orchestrator.launchers.authority import Authority
from services.orchestrator.launchers.component import Pace
from services.orchestrator.launchers.files import ALIVE, locked, recall
from services.orchestrator.launchers.namespace import BACKEND, Access, Modules, Namespace

_CLOSING_GRACE: Final = 3.0  # seconds: the orchestrator goes, the training does not end
_LOCK: Final = "orchestrator.lock"
_PATIENCE: Final = 20.0  # seconds for another process to be gone: more than it takes one to end
_NO_RUN: Final = 0  # runs count from 1


class ProcessLauncher:
    """The `Launcher` of one machine; `nats_url` and `token_key` are what launched processes are told.

    Selectors listen as `exposure` says.
    """

    def __init__(
        self,
        directory: Path,
        accounts: Accounts,
        nats_url: str,
        token_key: str,
        exposure: Exposure,
        modules: Modules,
        pace: Pace,
        http: aiohttp.ClientSession,
    ) -> None:
        self._directory = directory
        self._accounts = accounts
        self._nats_url = nats_url
        self._token_key = token_key
        self._exposure = exposure
        self._modules = modules
        self._pace = pace
        self._http = http
        self._running: dict[str, Namespace] = {}
        self._changes: asyncio.Queue[Change] = asyncio.Queue()

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        directory: Path,
        accounts: Accounts,
        *,
        nats_url: str,
        token_key: str,
        exposure: Exposure = Exposure(),  # noqa: B008 - immutable
        modules: Modules | None = None,
        pace: Pace | None = None,
    ) -> AsyncIterator["ProcessLauncher"]:
        """The launcher; what runs ends with it, to be launched again by the next one with this directory.

        Raises `OSError` when another launcher keeps using the directory: two would run the same namespaces.
        """
        private_directory(directory)
        async with locked(directory / _LOCK, _PATIENCE), aiohttp.ClientSession() as http:
            launcher = cls(
                directory, accounts, nats_url, token_key, exposure, modules or Modules(), pace or Pace(), http
            )
            try:
                yield launcher
            finally:
                await asyncio.gather(*(running.stop(_CLOSING_GRACE) for running in launcher._running.values()))

    @property
    def namespaces_running(self) -> int:
        """How many namespaces are kept running."""
        return len(self._running)

    @property
    def components_answering(self) -> int:
        """How many components answer now."""
        return sum(len(running.infra.answering) for running in self._running.values())

    async def launch(self, spec: Spec) -> Infra:
        """Begin to bring this up; a component starts when what is left of an earlier life of it has gone."""
        directory = private_directory(self._directory / spec.namespace)
        memory = recall(directory / COORDINATOR)
        key = memory.key if memory and memory.run == spec.run else secrets.token_urlsafe(32)
        credentials = await self._accounts.grant(spec.problem_id, directory)
        authority = Authority.of(directory) if self._exposure.tls else None
        access = Access(self._nats_url, credentials, self._token_key, key, self._exposure, authority)
        namespace = Namespace(spec, directory, access, self._modules, self._changes.put_nowait, self._http, self._pace)
        self._running[spec.namespace] = namespace
        namespace.start()
        return namespace.infra

    async def stop(self, namespace: str) -> None:
        """End everything in the namespace, then take its account away, then remove its directory."""
        directory = self._directory / namespace
        if running := self._running.get(namespace):
            await running.stop()
        if directory.is_dir():
            await _deserted(directory)
            await self._accounts.revoke(directory)
            await asyncio.to_thread(shutil.rmtree, directory)
        self._running.pop(namespace, None)

    async def namespaces(self) -> list[str]:
        """Those that have a directory."""
        return [path.name for path in self._directory.iterdir() if is_namespace(path.name)]

    async def find(self, namespace: str) -> Infra | None:
        """What runs, or what the directory remembers."""
        if running := self._running.get(namespace):
            return running.infra
        directory = self._directory / namespace
        if not directory.is_dir():
            return None
        memory = recall(directory / COORDINATOR)
        return Infra(namespace=namespace, run=memory.run if memory else _NO_RUN, backend=BACKEND, launched=False)

    async def watch(self) -> AsyncIterator[Change]:
        """Each change as it comes."""
        while True:
            yield await self._changes.get()

    async def check(self) -> None:
        """Credentials can be granted, the directory written, and what runs is looked after."""
        await self._accounts.check()
        if not os.access(self._directory, os.W_OK | os.X_OK):
            raise PermissionError(f"{self._directory} cannot be written")
        for running in self._running.values():
            running.check()


async def _deserted(directory: Path) -> None:
    """Return when no process lives there: what was orphaned may still be ending."""
    for path in directory.iterdir():
        if path.is_dir():
            async with locked(path / ALIVE, _PATIENCE):
                pass
