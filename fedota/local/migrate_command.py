"""`fedota migrate`: brings a database to the newest shape. `fedota up` does so by itself."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import asyncpg
import click
import msgspec

from fedota.kernel.event_log import OUTAGES
from fedota.kernel.migrations import PROCESSES, MigrationError, migrate, pending
from fedota.local.platform import passwords
from fedota.local.postgres import is_initialized, postgres, remembered_url
from fedota.local.programs import kept_alive
from fedota.local.state import DataDirectory, LocalError, held, is_held
from fedota.options import database_elsewhere

_URL = "FEDOTA_DATABASE_URL"
T = TypeVar("T")


class _Database(NamedTuple):
    """A database for who may change its shape, and the password of each process."""

    url: str
    passwords: dict[str, str]


def run_migrate(path: Path, roles: Path | None) -> None:
    """Migrate the database that FEDOTA_DATABASE_URL names, else that of the platform in a data directory."""
    url = database_elsewhere()

    async def work() -> list[str]:
        async with _elsewhere(url, roles) if url else _local(path) as database:
            return await migrate(*database)

    if roles and not url:
        raise LocalError(f"--roles is for a database elsewhere: name it with {_URL}, without --data-dir.")
    names = _run(work(), "The database was not migrated, it is as it was")
    click.echo(f"Applied: {', '.join(names)}." if names else "Nothing to apply: the database has the newest shape.")


def nothing_pending(path: Path) -> bool:
    """Say what would be applied to that database; whether that is nothing."""
    url = database_elsewhere()

    async def work() -> list[str]:
        if url:
            return await pending(url)
        async with _local(path) as database:
            return await pending(database.url)

    names = _run(work(), "What is to be applied to the database could not be found out")
    click.echo(
        f"To be applied: {', '.join(names)}." if names else "Nothing to apply: the database has the newest shape."
    )
    return not names


def _run(work: Awaitable[T], failed: str) -> T:
    async def in_words() -> T:
        try:
            return await work
        except MigrationError as error:
            raise LocalError(str(error)) from None
        except (asyncpg.PostgresError, *OUTAGES) as error:
            why = str(error) or type(error).__name__
            raise LocalError(f"{failed}: {why}.") from None

    return asyncio.run(in_words())


@asynccontextmanager
async def _elsewhere(url: str, roles: Path | None) -> AsyncIterator[_Database]:
    if roles is None:
        raise LocalError(f"The database that {_URL} names needs --roles FILE: a password for each process, as JSON.")
    yield _Database(url, read_roles(roles))


def read_roles(path: Path) -> dict[str, str]:
    """The password of each process, from a file for its owner alone. Raises `LocalError`."""
    if path.stat().st_mode & 0o077:
        raise LocalError(f"Others may read the passwords in {path}. Run: chmod 600 {path}")
    try:
        found = msgspec.json.decode(path.read_bytes(), type=dict[str, str])
    except msgspec.DecodeError as error:
        raise LocalError(f"{path} is not a JSON object with a password for each process: {error}.") from None
    if set(found) != set(PROCESSES) or not all(found.values()):
        raise LocalError(f"{path} must have a password for each of these, and no others: {', '.join(PROCESSES)}.")
    return found


@asynccontextmanager
async def _local(path: Path) -> AsyncIterator[_Database]:
    """The embedded database, be the platform up or down; it is started for as long as this takes if it is down."""
    if not is_initialized(path):
        raise LocalError(f"There is no embedded database in {path}. Say where with --data-dir, or set {_URL}.")
    if is_held(path):
        data = DataDirectory(path)
        if missing := [process for process in PROCESSES if not data.remembers(f"database-{process}")]:
            raise LocalError(
                f"The platform in {path} was started by an older Fedota, which knows no role {missing[0]}. Stop it "
                "with `fedota down`; `fedota up` migrates by itself."
            )
        yield _Database(remembered_url(data), passwords(data))
        return
    with held(path):
        data = DataDirectory(path)
        program, url = await postgres(data)
        async with kept_alive(program):
            yield _Database(url, passwords(data))
