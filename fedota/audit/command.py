"""What `fedota audit` does and says."""

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import asyncpg
import click
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fedota.audit import export as exporting
from fedota.audit import verification
from fedota.audit.output import Output
from fedota.audit.reading import StoredLog
from fedota.audit.settings import AuditorSettings, read_public_key
from fedota.audit.store import Bucket, Checkpoints, Directory
from fedota.audit.verification import Report
from fedota.kernel.database import connect_pool
from fedota.kernel.event_log import OUTAGES
from fedota.kernel.settings import SettingsError, load
from fedota.local.platform import process_directory
from fedota.local.state import LocalError
from fedota.options import database_elsewhere

T = TypeVar("T")


class _Ground(NamedTuple):
    """What an audit stands on."""

    log: StoredLog
    checkpoints: Checkpoints
    key: Ed25519PublicKey


def verify_log(path: Path, public_key: Path | None, copies: Path | None) -> bool:
    """Audit the log of a data directory, and say what was found; whether all of it fits."""

    async def work(ground: _Ground) -> Report:
        with _progress("events verified") as progress:
            return await verification.verify(ground.log, ground.checkpoints, ground.key, progress)

    report = asyncio.run(_on_ground(path, public_key, copies, work))
    for line in _words(report):
        click.echo(line)
    return not report.findings


def export_log(path: Path, public_key: Path | None, copies: Path | None, output: Output, until: int | None) -> None:
    """Write the log of a data directory and its checkpoints into a file for its owner alone."""
    output.require_free()

    async def work(ground: _Ground) -> int:
        with _progress("events written") as progress, output.open() as file:
            return await exporting.export(*ground, file, until, progress)

    last = asyncio.run(_on_ground(path, public_key, copies, work))
    apart = output.is_device  # that may be stdout
    click.echo(f"Events 1 to {last} and their checkpoints are in {output}.", err=apart)
    click.echo("Verify it: python verify_audit.py FILE --public-key notary.public.pem (see docs/audit.md).", err=apart)


async def _on_ground(
    path: Path, public_key: Path | None, copies: Path | None, work: Callable[[_Ground], Awaitable[T]]
) -> T:
    settings = _settings(path)
    key = read_public_key(_key_file(settings, public_key))
    try:
        async with connect_pool(settings.database_url, "auditor", size=2) as pool:
            with _checkpoints(settings, copies) as checkpoints:
                return await work(_Ground(StoredLog(pool), checkpoints, key))
    except asyncpg.UndefinedTableError:
        raise LocalError("This database holds no event log. Name another with FEDOTA_DATABASE_URL.") from None
    except (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InsufficientPrivilegeError) as error:
        raise LocalError(f"The database does not let the auditor read the log: {error}.") from None
    except asyncpg.ClientConfigurationError as error:
        raise LocalError(f"The database's address is not valid: {error}. Correct FEDOTA_DATABASE_URL.") from None
    except OUTAGES as error:
        why = str(error) or type(error).__name__
        raise LocalError(f"The database does not answer: {why}. Is the platform up? Look with fedota status.") from None
    except asyncpg.PostgresError as error:
        raise LocalError(f"The database refuses to be read: {error}. Is it the one that you mean?") from None


def _settings(path: Path) -> AuditorSettings:
    """Those of one platform: the environment's where it names a database, else the auditor's in the data directory.

    Never some of each: the bucket and the public key of one platform say nothing about the log of another.
    """
    if database_elsewhere():
        return load(AuditorSettings, {name: value for name, value in os.environ.items() if value})
    file = process_directory(path, "auditor") / "settings.json"
    if not file.exists():
        raise LocalError(f"There is no platform in {path}. Say where it is with --data-dir or FEDOTA_DATABASE_URL.")
    return load(AuditorSettings, {"FEDOTA_SETTINGS": str(file)})


def _key_file(settings: AuditorSettings, given: Path | None) -> Path:
    path = given or settings.public_key_file
    if path is None:
        raise SettingsError("The notary's public key is not known. Name its file with --public-key.")
    return path


@contextmanager
def _checkpoints(settings: AuditorSettings, copies: Path | None) -> Iterator[Checkpoints]:
    if copies is None:
        with Bucket.open(settings.place) as bucket:
            yield bucket
    elif copies.is_dir():
        yield Directory(copies)
    else:
        raise LocalError(f"There is no directory {copies} with copies of checkpoints.")


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A line on a terminal that moves; nothing elsewhere."""
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn(what), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _words(report: Report) -> Iterator[str]:
    for finding in report.findings:
        where = "" if finding.position is None else f" at position {finding.position}"
        yield f"DOES NOT FIT{where} ({finding.kind}): {finding.words}."
    if report.findings:
        yield f"Up to position {report.verified} the chain fits; {_covered(report)}."
        return
    yield f"All fits (events: {report.head}, checkpoints: {report.checkpoints}); {_covered(report)}."
    if tail := report.head - report.covered:
        yield f"Not covered by a checkpoint yet: {tail}, from position {report.covered + 1} on."


def _covered(report: Report) -> str:
    if not report.checkpoint:
        return "no checkpoint covers any of it"
    return f"checkpoint {report.checkpoint} covers it up to position {report.covered}"
