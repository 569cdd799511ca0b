"""What `fedota up` and `fedota status` tell: where to go, with which token, and what is ready."""

import asyncio
import shlex
from pathlib import Path
from typing import NamedTuple

import aiohttp
import click
import msgspec
from rich.console import Console
from rich.table import Table

from fedota.local.background import read_progress
from fedota.local.platform import MODULES, announced, read_tokens
from fedota.local.state import is_held

_TIMEOUT = aiohttp.ClientTimeout(total=5)


class Health(NamedTuple):
    """A process: where it answers, and what is wrong with it."""

    name: str
    url: str
    wrong: str


class _Readiness(msgspec.Struct):
    failing: dict[str, str]


def tell_access(path: Path, url: str, *, to_stderr: bool = False) -> None:
    """How to look at the platform and how to stop it."""
    lines = [f"\nFedota is up at {url}. Sign in there with a token, or send it as a bearer token:"]
    lines += [f"  {role:<13} {token}" for role, token in read_tokens(path).items()]
    lines += ["", f"Stop it with: fedota down --data-dir {shlex.quote(str(path))}"]
    click.echo("\n".join(lines), err=to_stderr)


def show_status(path: Path) -> bool:
    """Print what runs in a data directory; whether all of it is ready."""
    if not is_held(path):
        click.echo(f"Nothing runs in {path}. Start it with: fedota up")
        return False
    progress = read_progress(path)
    if progress is None or not progress.gateway_url:
        up = ", ".join(progress.up) if progress else ""
        click.echo(f"The platform in {path} is starting or stopping. Up: {up or 'nothing yet'}")
        return False
    found = asyncio.run(_look(path))
    table = Table("process", "address", "state")
    for health in found:
        table.add_row(health.name, health.url, health.wrong or "ready", style="red" if health.wrong else "")
    Console(highlight=False).print(table)
    click.echo(f"People go to {progress.gateway_url}; tokens are in {path / 'tokens'}.")
    return not any(health.wrong for health in found)


async def _look(path: Path) -> list[Health]:
    async with aiohttp.ClientSession(timeout=_TIMEOUT) as http:
        return list(await asyncio.gather(*(_health(http, path, name) for name in MODULES)))


async def _health(http: aiohttp.ClientSession, path: Path, name: str) -> Health:
    """The servers show in this too: each process says which of them it does not reach."""
    url = announced(path, name)
    if url is None:
        return Health(name, "", "not running")
    try:
        async with http.get(f"{url}/readyz") as reply:
            failing = msgspec.json.decode(await reply.read(), type=_Readiness).failing
    except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError):  # it, or another program at its address
        return Health(name, url, "does not answer")
    return Health(name, url, "; ".join(f"{check}: {reason}" for check, reason in failing.items()))
