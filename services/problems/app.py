"""The composition of problems: everything is built here, from settings."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from aiohttp import web

from fedota.kernel.bus import Bus
from fedota.kernel.database import connect_pool
from fedota.kernel.event_log import EventLog
from fedota.kernel.projection import Projector
from fedota.kernel.service import Service, scaffold
from fedota.kernel.settings import Secret
from services.problems.handlers import Handlers
from services.problems.projection import projection
from services.problems.settings import Settings, read_token_key


def create_app(settings: Settings) -> web.Application:
    """Problems, ready to be served. Raises `SettingsError` when the token key is not fit for use."""
    return scaffold("problems", settings, partial(_resources, read_token_key(settings.token_key_file)))


@asynccontextmanager
async def _resources(token_key: Secret, service: Service, settings: Settings) -> AsyncIterator[None]:
    async with (
        connect_pool(settings.database_url, service.name) as pool,
        EventLog.open(pool) as log,
        Bus.connect(settings.nats_url, service.name, settings.nats_credentials) as bus,
    ):
        handlers = Handlers(log, token_key, settings.token_days)
        service.add_check("log", log.head)
        service.add_check("nats", bus.check)
        async with Projector.open(service, projection(handlers), pool, log, bus):
            await bus.answer_commands(handlers.commands)
            yield
