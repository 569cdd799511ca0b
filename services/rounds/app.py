"""The composition of rounds: everything is built here, from settings."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from fedota.kernel.bus import Bus
from fedota.kernel.database import connect_pool
from fedota.kernel.event_log import EventLog
from fedota.kernel.projection import Projector
from fedota.kernel.service import Service, scaffold
from services.rounds.handlers import Handlers
from services.rounds.projection import PROJECTION
from services.rounds.settings import Settings


def create_app(settings: Settings) -> web.Application:
    """Rounds, ready to be served."""
    return scaffold("rounds", settings, _resources)


@asynccontextmanager
async def _resources(service: Service, settings: Settings) -> AsyncIterator[None]:
    async with (
        connect_pool(settings.database_url, service.name) as pool,
        EventLog.open(pool) as log,
        Bus.connect(settings.nats_url, service.name, settings.nats_credentials) as bus,
        Projector.open(service, PROJECTION, pool, log, bus) as projector,
    ):
        service.add_check("log", log.head)
        service.add_check("nats", bus.check)
        await bus.answer(Handlers(pool, log, projector).answers)
        yield
