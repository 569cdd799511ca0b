"""What `fedota up` and `fedota status` tell: where to go, with which token, and what is ready."""

import asyncio
from pathlib import Path
from typing import NamedTuple

import aiohttp
import click
import msgspec
from rich.console import Console
from rich.table import Table

from fedota.local.background import Progress, read_progress
from fedota.local.platform import MODULES, announced, read_tokens, token_files
from fedota.local.state import command, is_held, is_ours

_TIMEOUT = aiohttp.ClientTimeout(total=5)


class Health(NamedTuple):
    """A process: where it answers, and what is wrong with it; empty when it is ready."""

    name: str
    url: str
    wrong: str

    @property
    def state(self) -> str:
        """In words."""
        return self.wrong or "ready"


class _Readiness(msgspec.Struct):
    failing: dict[str, str]


def tell_access(path: Path, url: str, *, moved_from: int = 0, to_stderr: bool = False) -> None:
    """How to look at the platform and how to stop it. What people copy stands at the end of a line, by itself."""
    lines = ["", "Fedota is up:", ""]
    lines += [f"  {'address':<13} {url}", *(f"  {role:<13} {token}" for role, token in read_tokens(path).items()), ""]
    if moved_from:
        lines.append(f"The address is a new one: another program has port {moved_from} now.")
    lines += [
        "In a browser, sign in with a role's token; scripts send it as `Authorization: Bearer <token>`.",
        f"Tokens are kept in:  {path / 'tokens'}",
        f"What runs, and how:  {command('status', path)}",
        f"Stop it:             {command('down', path)}",
    ]
    click.echo("\n".join(lines), err=to_stderr)


def show_status(path: Path, *, as_json: bool = False) -> bool:
    """Print what runs in a data directory; whether all of it is ready."""
    progress = read_progress(path) if is_ours(path) else None
    if not is_held(path) or progress is None or not progress.gateway_url:
        click.echo(_why_nothing_answers(path, progress), err=as_json)
        return False
    found = asyncio.run(_look(path))
    (_print_json if as_json else _print_table)(path, progress.gateway_url, found)
    return not any(health.wrong for health in found)


def _why_nothing_answers(path: Path, progress: Progress | None) -> str:
    if is_held(path):
        up = f" Up: {', '.join(progress.up)}" if progress and progress.up else ""
        return f"The platform in {path} is starting or stopping.{up}"
    if not is_ours(path):
        return f"There is no platform in {path}. Start one here with: {command('up', path)}"
    failed = f"\nIts last start failed: {progress.failure}" if progress and progress.failure else ""
    return f"The platform in {path} does not run. Start it with: {command('up', path)}{failed}"


def _print_table(path: Path, url: str, found: list[Health]) -> None:
    table = Table("process", "address", "state")
    for health in found:
        table.add_row(health.name, health.url, health.state, style="red" if health.wrong else "")
    Console(highlight=False).print(table)
    click.echo(f"People go to:  {url}\nTokens are in: {path / 'tokens'}")


def _print_json(path: Path, url: str, found: list[Health]) -> None:
    told = {
        "gateway_url": url,
        "token_files": {role: str(file) for role, file in token_files(path).items()},
        "processes": [{"name": health.name, "url": health.url, "state": health.state} for health in found],
    }
    click.echo(msgspec.json.format(msgspec.json.encode(told)))


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
