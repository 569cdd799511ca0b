"""How a launched process begins: it reads `settings.json` in its own directory and ends with its launcher."""

import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
from aiohttp import web

from fedota import process
from fedota.contracts.runtime import Listening
from fedota.tls import is_loopback

S = TypeVar("S", bound=Listening)
_MOST_FILES: Final = 65_536


def launch(name: str, kind: type[S], create_app: Callable[[S, Path], web.Application], **server: Any) -> None:
    """Run until SIGTERM, SIGINT or the end of standard input; `server` goes to `fedota.process.run`."""
    directory = Path.cwd()
    try:
        settings = msgspec.json.decode((directory / "settings.json").read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError) as error:
        sys.exit(f"{directory / 'settings.json'} cannot be used: {error}")
    if not settings.certificate and not is_loopback(settings.host):
        sys.exit(
            f"{settings.host} is not of the loopback, and without TLS whoever listens there would read tokens and "
            "models. Give a certificate, or another host."
        )
    _allow_files()
    process.configure_logging(name, "info")
    process.run(
        lambda: create_app(settings, directory),
        settings,
        directory=directory,
        follow_parent=True,
        **server,
    )


def _allow_files() -> None:
    """Each client that waits is an open file, and 1024 are all that most systems allow unless they are asked."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
