"""Storage's composition: everything is built here, from settings."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from fedota.contracts import subjects
from fedota.contracts.commands import PrepareUpload, PresignDownload, StoreFiles
from fedota.kernel.bus import Bus
from fedota.kernel.database import connect_pool
from fedota.kernel.event_log import EventLog
from fedota.kernel.projection import Projector
from fedota.kernel.service import Service, scaffold
from services.storage.blobs import Blobs
from services.storage.handlers import Handlers
from services.storage.projection import projection
from services.storage.settings import Settings
from services.storage.sweeper import Sweeper
from services.storage.turns import SIZE, Turns


def create_app(settings: Settings) -> web.Application:
    """Storage, ready to be served."""
    return scaffold("storage", settings, _resources)


@asynccontextmanager
async def _resources(service: Service, settings: Settings) -> AsyncIterator[None]:
    async with (
        connect_pool(settings.database_url, service.name) as pool,
        connect_pool(settings.database_url, service.name, size=SIZE) as turn_pool,
        EventLog.open(pool) as log,
        Blobs.open(settings, service) as blobs,
        Bus.connect(settings.nats_url, service.name, settings.nats_credentials) as bus,
    ):
        turns = Turns(turn_pool)
        handlers = Handlers(log, blobs, turns, settings.link_seconds)
        sweeper = Sweeper(log, blobs, turns, unclaimed=settings.unclaimed_seconds, every=settings.sweep_seconds)
        service.add_check("log", log.head)
        service.add_check("nats", bus.check)
        async with (
            service.running("sweeper", sweeper.run()),
            Projector.open(service, projection(handlers), pool, log, bus),
        ):
            await bus.answer_commands(
                {
                    PrepareUpload: handlers.prepare_upload,
                    StoreFiles: handlers.store_files,
                    PresignDownload: handlers.presign_download,
                }
            )
            await bus.answer({subjects.runtime("*", "presign"): handlers.presign})
            yield
