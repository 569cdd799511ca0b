"""`fedota projections …`: the read models that processes derive from the log."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Final

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fedota.contracts.operations import Difference, ProjectionStatus, Work, WorkKind
from fedota.errors import FedotaError
from fedota.operate.door import Door, at_a_gateway
from fedota.operate.terminal import REFUSED, count, faint, note, plain, say, table

_POLL: Final = 0.3  # seconds
_SILENCE: Final = 60.0  # seconds that a process may be silent while it works, as when it is started again
_DONE: Final = {"rebuild": "rebuilt", "verify": "verified"}
_DOING: Final = {"rebuild": "rebuilding", "verify": "verifying"}
_process = click.argument("process", required=False)
_all = click.option("--all", "all_", is_flag=True, help="Each process that has one, one after the other.")


class FailedError(click.ClickException):
    """Work on one projection did not come to its end."""


@click.group()
def projections() -> None:
    """Look at, rebuild and verify what processes derive from the log."""


@projections.command("list")
@click.option("--json", "as_json", is_flag=True, help="One projection a line, in JSON.")
@at_a_gateway
async def list_(door: Door, as_json: bool) -> int:
    """Show how far each projection is; exit status 1 when one is stopped, has dead letters or does not answer."""
    told, silent = await door.projections()
    if as_json:
        for status in told:
            say(msgspec.json.encode(status).decode())
        for process in silent:
            note(f"{process} does not answer, so how far it is is not known.")
    else:
        _show(told, silent)
    return REFUSED if silent or any(status.stopped or status.parked for status in told) else 0


def _show(told: list[ProjectionStatus], silent: list[str]) -> None:
    rows = [_row(status) for status in told]
    rows += [[process, "", "", "", click.style("does not answer", fg="red"), ""] for process in silent]
    table(("process", "position", "behind", "parked", "state", "work"), rows)
    for status in told:
        if status.parked:
            note(f"{status.process}: fedota deadletters list {status.process}")


@projections.command()
@_process
@_all
@at_a_gateway
async def rebuild(door: Door, process: str | None, all_: bool) -> int:
    """Build the read model of PROCESS anew from the log, beside the live one, which it then takes the place of.

    Reads go on meanwhile, and no reaction to an event runs again. Interrupting this command does not interrupt the
    rebuild.
    """
    return await _each(door, "rebuild", process, all_)


@projections.command()
@_process
@_all
@at_a_gateway
async def verify(door: Door, process: str | None, all_: bool) -> int:
    """Compare the read model of PROCESS with a fresh rebuild, row by row; exit status 1 when they differ."""
    return await _each(door, "verify", process, all_)


async def _each(door: Door, kind: WorkKind, process: str | None, all_: bool) -> int:
    if all_ == (process is not None):
        raise click.UsageError("Name one process, or say --all. `fedota projections list` names them.")
    if process is not None:
        return 0 if _tell(process, await _done(door, kind, process)) else REFUSED
    told, silent = await door.projections()
    if not told:
        raise FailedError(
            "No process with a projection answers, so there is nothing to do it with. See that they run, and that NATS "
            "does, and run this again."
        )
    failed = [not _tell(status.process, await _done(door, kind, status.process)) for status in told]
    for name in silent:
        note(f"{name} does not answer, so it was left out.")
    return REFUSED if silent or any(failed) else 0


async def _done(door: Door, kind: WorkKind, process: str) -> Work:
    """The work, begun and finished; shown while it goes on."""
    work = (await door.begin(process, kind)).work
    with _bar(f"{_DOING[kind]} {process}") as bar:
        while work is None or work.kind != kind or work.finished is None:
            if work is None or work.kind != kind:
                raise FailedError(
                    f"{process} does not know of it any more: it was started again meanwhile. Nothing was changed; "
                    f"run `fedota projections {kind} {process}` again."
                )
            bar.update(bar.task_ids[0], completed=work.position, total=work.target or None)
            await asyncio.sleep(_POLL)
            work = await _look(door, process)
        bar.update(bar.task_ids[0], completed=work.target, total=work.target or None)
    return work


async def _look(door: Door, process: str) -> Work | None:
    """The work now. A process that is silent for a while may be starting again."""
    end = asyncio.get_running_loop().time() + _SILENCE
    while True:
        try:
            return (await door.projection(process)).work
        except FedotaError as error:
            if error.problem.status < 500 or asyncio.get_running_loop().time() > end:
                raise
        await asyncio.sleep(_POLL)


@contextmanager
def _bar(what: str) -> Iterator[Progress]:
    """A progress bar where somebody looks at one."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        bar.add_task(what, total=None)
        yield bar


def _tell(process: str, work: Work) -> bool:
    """Say what came of it; whether all is well."""
    assert work.finished is not None
    seconds = (work.finished - work.started).total_seconds()
    if work.error:
        say(f"{click.style(process, bold=True)}: {click.style('failed', fg='red')}. {plain(work.error)}")
        return False
    if work.differences:
        say(f"{click.style(process, bold=True)}: {click.style('differs from the log', fg='red')} ({_extent(work)})")
        for difference in work.differences:
            _tell_difference(difference)
        note(f"`fedota projections rebuild {process}` puts it right. docs/operations.md says how it can come to this.")
        return False
    same = ", every row is the same" if work.kind == "verify" else ""
    say(f"{click.style(process, bold=True)}: {_DONE[work.kind]}{same} ({_extent(work)} in {seconds:.1f} s)")
    return True


def _extent(work: Work) -> str:
    return f"{count(work.rows, 'row')} from {count(work.target, 'event')}"


def _tell_difference(difference: Difference) -> None:
    only = (
        f"{count(difference.live, 'row')} only in the live one, {count(difference.rebuilt, 'row')} only in the rebuilt"
    )
    say(f"  {click.style(difference.table, bold=True)}: {only}")
    for example in difference.examples:
        say(f"    {plain(example)}")


def _row(status: ProjectionStatus) -> list[str]:
    behind = status.head - status.position
    parked = click.style(f"{status.parked:,}", fg="red") if status.parked else "0"
    state = click.style(plain(status.stopped), fg="red") if status.stopped else click.style("runs", fg="green")
    return [status.process, f"{status.position:,}", f"{behind:,}", parked, state, _working(status.work)]


def _working(work: Work | None) -> str:
    if work is None:
        return ""
    if work.finished is None:
        share = f" {100 * work.position // work.target} %" if work.target else ""
        return f"{_DOING[work.kind]}{share}"
    ago = _ago((datetime.now(UTC) - work.finished).total_seconds())
    if work.error:
        return click.style(f"{work.kind} failed {ago} ago", fg="red")
    if work.differences:
        return click.style(f"found different {ago} ago", fg="red")
    return faint(f"{_DONE[work.kind]} {ago} ago")


def _ago(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return f"{max(0, int(seconds))} s"
