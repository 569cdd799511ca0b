"""The orchestrator's composition: everything is built here, from settings."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from aiohttp import web

from fedota.kernel.bus import Bus
from fedota.kernel.database import connect_pool
from fedota.kernel.event_log import EventLog
from fedota.kernel.nats_accounts import Operator
from fedota.kernel.projection import Projector
from fedota.kernel.service import Service, scaffold
from services.orchestrator.launchers.accounts import Accounts, ProblemAccounts, SharedCredentials
from services.orchestrator.launchers.component import Pace
from services.orchestrator.launchers.namespace import Modules
from services.orchestrator.launchers.process import ProcessLauncher
from services.orchestrator.projection import PROJECTION
from services.orchestrator.reconciler import Reconciler
from services.orchestrator.settings import Settings


def create_app(settings: Settings, modules: Modules | None = None, pace: Pace | None = None) -> web.Application:
    """The orchestrator, ready to be served; `modules` are the programs that it launches."""
    return scaffold("orchestrator", settings, partial(_resources, modules=modules, pace=pace))


@asynccontextmanager
async def _resources(
    service: Service, settings: Settings, modules: Modules | None, pace: Pace | None
) -> AsyncIterator[None]:
    async with (
        connect_pool(settings.database_url, service.name) as pool,
        Bus.connect(settings.nats_url, service.name, settings.nats_credentials) as bus,
        EventLog.open(pool) as log,
        Projector.open(service, PROJECTION, pool, log, bus) as projector,
        _accounts(settings) as accounts,
        ProcessLauncher.open(
            settings.namespaces_directory,
            accounts,
            nats_url=settings.runtime_nats_url or settings.nats_url,
            token_key=settings.token_public_key_file.read_text(),
            exposure=settings.exposure,
            modules=modules,
            pace=pace,
        ) as launcher,
    ):
        service.add_check("log", log.head)
        service.add_check("nats", bus.check)
        service.add_check("launcher", launcher.check)
        service.add_gauge("namespaces", "Namespaces that are kept running", lambda: launcher.namespaces_running)
        service.add_gauge("components", "Components that answer", lambda: launcher.components_answering)
        deaths = service.add_counter("component_deaths", "Components that had answered and do not any more")
        reconciler = Reconciler(pool, log, projector, launcher, deaths.inc, settings.farewell)
        async with service.running("reconciler", reconciler.run()):
            yield


@asynccontextmanager
async def _accounts(settings: Settings) -> AsyncIterator[Accounts]:
    if settings.runtime_credentials:
        yield SharedCredentials(settings.runtime_credentials)
        return
    assert settings.operator_seed_file
    operator = Operator.read(settings.operator_seed_file)
    async with Bus.connect(settings.nats_url, "system", settings.system_credentials) as system:
        yield ProblemAccounts(operator, system, settings.platform_account)
