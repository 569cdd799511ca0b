"""What the platform's services add to the scaffold of every process: their settings."""

import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import TypeVar

from aiohttp import web

from fedota import process
from fedota.contracts.runtime import Listening
from fedota.kernel.settings import LogSettings, SettingsError, load
from fedota.process import SERVICE, Check, Service, configure_logging, serving

__all__ = ["SERVICE", "Check", "Service", "attach", "configure_logging", "main", "scaffold", "serving"]

S = TypeVar("S", bound=LogSettings)


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
    process.attach(app, service, resources(service, settings))


def main(name: str, kind: type[S], create_app: Callable[[S], web.Application]) -> None:
    """Run a process of the platform until SIGTERM or SIGINT. Exits with 1 on wrong settings or a failed start."""
    try:
        settings = load(kind)
    except SettingsError as error:
        sys.exit(str(error))
    configure_logging(name, settings.log_level)
    process.run(
        lambda: create_app(settings),
        Listening(host=settings.host, port=settings.port),
        directory=settings.directory,
        mistakes=(SettingsError,),
    )
