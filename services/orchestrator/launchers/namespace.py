"""The processes of one problem: a coordinator, and selectors that know its address."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

import aiohttp

from fedota.contracts.runtime import CoordinatorSettings, SelectorSettings
from fedota.tls import client_context
from services.orchestrator.domain import COORDINATOR, Death, Infra, Spec, selector_names
from services.orchestrator.launchers import Change, Exposure
from services.orchestrator.launchers.authority import Authority
from services.orchestrator.launchers.component import Component, Pace, Program, probed
from services.orchestrator.launchers.files import CERTIFICATE

BACKEND: Final = "processes"


class Modules(NamedTuple):
    """The programs that are launched."""

    coordinator: str = "fedota.runtime.coordinator"
    selector: str = "fedota.runtime.selector"


class Access(NamedTuple):
    """What the processes of a namespace reach the platform with, and know each other and their clients by.

    Selectors have certificates of `authority`; without one they speak plain HTTP.
    """

    nats_url: str
    nats_credentials: Path
    token_key: str
    key: str
    exposure: Exposure = Exposure()
    authority: Authority | None = None


def coordinator_settings(spec: Spec, access: Access, port: int) -> CoordinatorSettings:
    """What the coordinator is told."""
    return CoordinatorSettings(
        problem_id=spec.problem_id,
        run=spec.run,
        plan=spec.plan,
        model=spec.model,
        nats_url=access.nats_url,
        nats_credentials=str(access.nats_credentials),
        key=access.key,
        port=port,
    )


def selector_settings(
    spec: Spec, access: Access, name: str, coordinator: str, certificate: str, port: int
) -> SelectorSettings:
    """What a selector is told; `certificate` is where it finds its own."""
    return SelectorSettings(
        problem_id=spec.problem_id,
        run=spec.run,
        name=name,
        coordinator=coordinator,
        token_key=access.token_key,
        key=access.key,
        host=access.exposure.host,
        address=access.exposure.address,
        certificate=certificate,
        port=port,
    )


class Namespace:
    """One run's processes, kept alive between `start` and `stop`; `tell` hears of every change."""

    def __init__(
        self,
        spec: Spec,
        directory: Path,
        access: Access,
        modules: Modules,
        tell: Callable[[Change], None],
        http: aiohttp.ClientSession,
        pace: Pace,
    ) -> None:
        self.spec = spec
        self._directory = directory
        self._access = access
        self._tell = tell
        self._moved = asyncio.Event()
        self._coordinator_url = ""
        self._task: asyncio.Task[None] | None = None

        def component(program: Program) -> Component:
            return Component(program, self._changed, http, pace)

        self._coordinator = component(self._coordinator_program(modules.coordinator))
        self._selectors = [
            component(self._selector_program(name, modules.selector)) for name in selector_names(spec.plan)
        ]

    def _coordinator_program(self, module: str) -> Program:
        settings = partial(coordinator_settings, self.spec, self._access)
        return Program(COORDINATOR, module, self._directory / COORDINATOR, self.spec.run, settings)

    def _selector_program(self, name: str, module: str) -> Program:
        program = Program(name, module, self._directory / name, self.spec.run, partial(self._selector_settings, name))
        if (authority := self._access.authority) is None:
            return program
        hosts = (self._access.exposure.address, probed(self._access.exposure.host))
        trusted = client_context(authority.pem)
        return program._replace(certificate=lambda: authority.issue(name, hosts), trusted=trusted)

    def _selector_settings(self, name: str, port: int) -> SelectorSettings:
        certificate = str(self._directory / name / CERTIFICATE) if self._access.authority else ""
        return selector_settings(self.spec, self._access, name, self._coordinator_url, certificate, port)

    @property
    def infra(self) -> Infra:
        """What there is of it now."""
        components = [self._coordinator, *self._selectors]
        return Infra(
            namespace=self.spec.namespace,
            run=self.spec.run,
            backend=BACKEND,
            answering={component.name: component.url for component in components if component.url},
            authority=self._access.authority.pem if self._access.authority else "",
            failure=next((component.failure for component in components if component.failure), None),
        )

    def start(self) -> None:
        """Begin to bring it up."""
        self._task = asyncio.create_task(self._run(), name=self.spec.namespace)

    async def stop(self, grace: float | None = None) -> None:
        """End its processes, each with `grace` seconds to do so by itself: selectors first, they still have to talk."""
        if self._task is None:
            return
        if not self._task.cancelling():  # a second cancellation would cut the grace of the first short
            for component in (self._coordinator, *self._selectors):
                component.grace = component.grace if grace is None else grace
            self._task.cancel()
        await asyncio.wait({self._task})

    def check(self) -> None:
        """Raise when nobody keeps the processes alive any more."""
        if self._task and self._task.done() and not self._task.cancelled():
            raise RuntimeError(f"{self.spec.namespace} is not watched any more: {self._task.exception()!r}")

    async def _run(self) -> None:
        async with _kept_alive([self._coordinator]):
            await self._moved.wait()
            while True:
                self._moved.clear()
                async with _kept_alive(self._selectors):
                    await self._moved.wait()

    def _changed(self, death: Death | None) -> None:
        """Selectors are told their coordinator's address when they start: when it moves, they start again."""
        if self._coordinator.url not in ("", self._coordinator_url):
            self._coordinator_url = self._coordinator.url
            self._moved.set()
        self._tell(Change(namespace=self.spec.namespace, death=death))


@asynccontextmanager
async def _kept_alive(components: list[Component]) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(component.keep_alive()) for component in components]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
