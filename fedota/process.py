"""The scaffold of every Fedota process: health, metrics, logs, `ready.json`, a graceful stop."""

import asyncio
import gc
import logging
import os
import signal
import stat
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
import prometheus_client
import structlog
import uvloop
from aiohttp import web

from fedota.contracts.runtime import Listening, Ready
from fedota.tls import origin, renewed, server_context

Check = Callable[[], Awaitable[object]]
_CHECK_SECONDS: Final = 2.0
# Seconds that a connection may stand without a whole request, from its beginning or its last answer on. Each holds a
# descriptor, and aiohttp would hold a stranger's for an hour. Proxies use theirs again for a minute: it is longer.
_IDLE: Final = 75.0
_BACKLOG: Final = 4096  # connections: after a restart everybody comes at once, and who finds no place waits a second
_log = structlog.get_logger(__name__)


class Service:
    """What a process tells about itself, filled by its resources as they come up."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.registry = prometheus_client.CollectorRegistry()
        self.broken = asyncio.Event()
        self.failure: BaseException | None = None  # which it is broken by
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
    async def running(self, name: str, work: Coroutine[Any, Any, None], *, vital: bool = False) -> AsyncIterator[None]:
        """Run `work` beside the service. It must not end: when it does, the service is not ready any more.

        When `vital` work fails the process ends, for whoever launched it to start it again.
        """
        task = asyncio.create_task(work, name=name)

        async def check() -> None:
            if task.done():
                raise RuntimeError(f"{name} has ended")

        def report(done: asyncio.Task[None]) -> None:
            if not done.cancelled() and (error := done.exception()):
                _log.critical("background work failed", work=name, exc_info=error)
                if vital:
                    self.failure = self.failure or error
                    self.broken.set()

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


def attach(app: web.Application, service: Service, resources: AbstractAsyncContextManager[None]) -> None:
    """Give an application its health routes, and `resources` that are up while it is served."""
    app[SERVICE] = service
    app.router.add_get("/livez", _livez)
    app.router.add_get("/readyz", _readyz)
    app.router.add_get("/metrics", _metrics)

    async def lifespan(_: web.Application) -> AsyncIterator[None]:
        async with resources:
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


class _BrokenError(Exception):
    """Vital work failed. Where in the program that was, was logged then."""


def run(
    create_app: Callable[[], web.Application],
    listening: Listening,
    *,
    directory: Path | None,
    follow_parent: bool = False,
    mistakes: tuple[type[Exception], ...] = (),
    **server: Any,
) -> None:
    """Serve until SIGTERM or SIGINT; exits with 1 when it cannot. `server` goes to `aiohttp.web.AppRunner`.

    The words of `mistakes` say what to do, to whoever runs it: where in the program they were noticed is not logged.

    Once it answers, `ready.json` is in `directory`; whether it is ready, and else why not, `/readyz` says: resources
    that take long come up behind it, the others before. With `follow_parent` it also ends when standard input does: a
    launcher that was killed with -9 leaves nobody behind.
    """
    try:
        uvloop.run(_serve(create_app, listening, directory, follow_parent, server))
    except asyncio.CancelledError:
        _log.info("stopped before it was ready")
    except Exception as error:
        trace = None if isinstance(error, (*mistakes, _BrokenError)) else error
        _log.critical("could not run", error=str(error) or type(error).__name__, exc_info=trace)
        sys.exit(1)


async def _serve(
    create_app: Callable[[], web.Application],
    listening: Listening,
    directory: Path | None,
    follow_parent: bool,
    server: dict[str, Any],
) -> None:
    stop, starting = asyncio.Event(), asyncio.current_task()

    def end() -> None:
        stop.set()
        if starting is not None:  # what takes long to come up need not come up any more
            starting.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, end)
    if follow_parent:
        _at_end_of_input(end)
    app = create_app()
    async with serving_at(listening, app, **server) as url:
        starting = None
        gc.collect()
        gc.freeze()  # what is here now stays: each look through all of it would stop everything for 50 ms
        _announce(directory, url)
        _log.info("listening", url=url)
        await _first(stop, app[SERVICE].broken)
        _log.info("stopping")
    if not stop.is_set():
        raise _BrokenError(f"work that this process cannot do without has failed: {app[SERVICE].failure}")


async def _first(*events: asyncio.Event) -> None:
    """Return when one of them is set."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


def _at_end_of_input(stop: Callable[[], None]) -> None:
    """Only a pipe tells of its other end: in a container standard input is `/dev/null`, which ends at once."""
    descriptor = sys.stdin.fileno() if sys.stdin else -1
    if descriptor < 0 or not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        return
    loop = asyncio.get_running_loop()

    def readable() -> None:
        if not os.read(descriptor, 4096):
            loop.remove_reader(descriptor)
            stop()

    loop.add_reader(descriptor, readable)


@asynccontextmanager
async def serving(app: web.Application, host: str, port: int, **server: Any) -> AsyncIterator[str]:
    """The application, listening, by plain HTTP; gives its URL. `server` goes to `aiohttp.web.AppRunner`."""
    async with serving_at(Listening(host=host, port=port), app, **server) as url:
        yield url


@asynccontextmanager
async def serving_at(listening: Listening, app: web.Application, **server: Any) -> AsyncIterator[str]:
    """The same, by TLS where there is a certificate for it."""
    async with AsyncExitStack() as stack:
        context = None
        if listening.certificate:
            path = Path(listening.certificate)
            context = server_context(path)
            await stack.enter_async_context(renewed(context, path))
        # A body that says it is packed stays as it is: aiohttp would unpack it on the event loop, 300 MB from a
        # stranger's 300 KB, also where nobody wants it. Whoever reads bodies refuses such ones.
        usual: dict[str, Any] = {"keepalive_timeout": _IDLE, "auto_decompress": False}
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=2, **{**usual, **server})
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, listening.host, listening.port, ssl_context=context, backlog=_BACKLOG).start()
        scheme = "https" if context else "http"
        yield origin(scheme, listening.address or listening.host, runner.addresses[0][1])


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
