"""How a launched process begins: it reads `settings.json` in its own directory and ends with its launcher."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec
from aiohttp import web

from fedota import process


class _Settings(Protocol):
    @property
    def host(self) -> str: ...
    @property
    def port(self) -> int: ...


S = TypeVar("S", bound=_Settings)


def launch(name: str, kind: type[S], create_app: Callable[[S, Path], web.Application], **server: Any) -> None:
    """Run until SIGTERM, SIGINT or the end of standard input; `server` goes to `fedota.process.serving`."""
    directory = Path.cwd()
    try:
        settings = msgspec.json.decode((directory / "settings.json").read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError) as error:
        sys.exit(f"{directory / 'settings.json'} cannot be used: {error}")
    process.configure_logging(name, "info")
    process.run(
        lambda: create_app(settings, directory),
        host=settings.host,
        port=settings.port,
        directory=directory,
        follow_parent=True,
        **server,
    )
