"""The scaffold of every process of the platform: health, metrics, logs, a graceful stop."""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
import prometheus_client
import structlog
import uvloop
from aiohttp import web

from fedota.contracts.runtime import Ready
from fedota.kernel.settings import ProcessSettings, SettingsError, load

Check = Callable[[], Awaitable[object]]
S = TypeVar("S", bound=ProcessSettings)
_CHECK_SECONDS: Final = 2.0
_log = structlog.get_logger(__name__)


class Service:
    """What a process tells about itself, filled by its resources as they come up."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.registry = prometheus_client.CollectorRegistry()
        self._checks: dict[str, Check] = {}

    def add_check(self, name: str, check: Check) -> None:
        """`/readyz` names `name` as failing when `check` raises or takes over two seconds."""
        self._checks[name] = check

    def add_gauge(self, name: str, help_: str, value: Callable[[], float]) -> None:
        """`/metrics` shows `fedota_<name>`, read when asked."""
        prometheus_client.Gauge(f"fedota_{name}", help_, registry=self.registry).set_function(value)

    def add_counter(self, name: str, help_: str, labels: tuple[str, ...] = ()) -> prometheus_client.Counter:
        """`/metrics` shows `fedota_<name>_total`."""
        return prometheus_client.Counter(f"fedota_{name}", help_, labels, registry=self.registry)

    @asynccontextmanager
    async def running(self, name: str, work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
        """Run `work` beside the service. It must not end: when it does, the service is not ready any more."""
        task = asyncio.create_task(work, name=name)

        async def check() -> None:
            if task.done():
                raise RuntimeError(f"{name} has ended")

        def report(done: asyncio.Task[None]) -> None:
            if not done.cancelled() and (error := done.exception()):
                _log.critical("background work failed", work=name, exc_info=error)

        task.add_done_callback(report)
        self.add_check(name, check)
        try:
            yield
        finally:
            # Python 3.11's wait_for drops a cancellation that meets its result: one alone may never end the work
            while not task.done():
                task.cancel()
                await asyncio.wait([task], timeout=0.5)

    async def failures(self) -> dict[str, str]:
        """Each check that fails, and how."""
        results = await asyncio.gather(*(_failure(check) for check in self._checks.values()))
        return {name: reason for name, reason in zip(self._checks, results, strict=True) if reason}


async def _failure(check: Check) -> str | None:
    try:
        await asyncio.wait_for(_awaited(check), _CHECK_SECONDS)
    except Exception as error:  # whatever is wrong, not being ready is the answer
        return str(error) or type(error).__name__
    return None


async def _awaited(check: Check) -> None:
    await check()


SERVICE: Final = web.AppKey("service", Service)


def scaffold(
    name: str, settings: S, resources: Callable[[Service, S], AbstractAsyncContextManager[None]]
) -> web.Application:
    """An aiohttp application that serves `/livez`, `/readyz` and `/metrics` while `resources` are up."""
    app = web.Application()
    attach(app, Service(name), settings, resources)
    return app


def attach(
    app: web.Application,
    service: Service,
    settings: S,
    resources: Callable[[Service, S], AbstractAsyncContextManager[None]],
) -> None:
    """Give an application its health routes and its resources."""
    app[SERVICE] = service
    app.router.add_get("/livez", _livez)
    app.router.add_get("/readyz", _readyz)
    app.router.add_get("/metrics", _metrics)

    async def lifespan(_: web.Application) -> AsyncIterator[None]:
        async with resources(service, settings):
            yield

    app.cleanup_ctx.append(lifespan)


async def _livez(_: web.Request) -> web.Response:
    return web.json_response({"status": "alive"})


async def _readyz(request: web.Request) -> web.Response:
    failures = await request.app[SERVICE].failures()
    body = {"status": "failing" if failures else "ready", "failing": failures}
    return web.json_response(body, status=503 if failures else 200)


async def _metrics(request: web.Request) -> web.Response:
    text = prometheus_client.generate_latest(request.app[SERVICE].registry)
    return web.Response(body=text, headers={"Content-Type": prometheus_client.CONTENT_TYPE_LATEST})


def main(name: str, kind: type[S], create_app: Callable[[S], web.Application]) -> None:
    """Run a process of the platform until SIGTERM or SIGINT. Exits with 2 on wrong settings, 1 on a failed start."""
    try:
        settings = load(kind)
    except SettingsError as error:
        sys.exit(str(error))
    configure_logging(name, settings.log_level)
    try:
        uvloop.run(_serve(settings, create_app))
    except Exception as error:
        _log.critical("could not run", error=str(error) or type(error).__name__, exc_info=error)
        sys.exit(1)


async def _serve(settings: ProcessSettings, create_app: Callable[[Any], web.Application]) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with serving(create_app(settings), settings.host, settings.port) as url:
        _announce(settings.directory, url)
        _log.info("ready", url=url)
        await stop.wait()
        _log.info("stopping")


@asynccontextmanager
async def serving(app: web.Application, host: str, port: int) -> AsyncIterator[str]:
    """The application, listening; gives its URL."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=2)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        yield f"http://{host}:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def _announce(directory: Path | None, url: str) -> None:
    """Write `ready.json`, whole or not at all: whoever waits for it may read at any moment."""
    if directory is None:
        return
    draft = directory / "ready.json.new"
    draft.write_bytes(msgspec.json.encode(Ready(url=url, pid=os.getpid())))
    draft.replace(directory / "ready.json")


def configure_logging(name: str, level: str) -> None:
    """One JSON object a line on standard error."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
    )
    structlog.contextvars.bind_contextvars(service=name)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
