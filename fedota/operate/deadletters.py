"""`fedota deadletters …`: events that have no effect in a projection, and what to do about them."""

import click
import msgspec

from fedota.contracts.operations import Retried
from fedota.operate.door import Door, Letter, at_a_gateway
from fedota.operate.lines import kind, what_happened
from fedota.operate.terminal import REFUSED, count, faint, local, note, plain, printable, say, table

_process = click.argument("process")
_position = click.argument("position", type=click.IntRange(min=1))
_json = click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")


@click.group()
def deadletters() -> None:
    """Look at events that a projection could not handle; have them handled, or give them up."""


@deadletters.command("list")
@click.argument("process", required=False)
@_json
@at_a_gateway
async def list_(door: Door, process: str | None, as_json: bool) -> int:
    """List the dead letters of every process, or of PROCESS."""
    letters, silent = await door.dead_letters(process)
    if as_json:
        for letter in letters:
            say(msgspec.json.encode(letter).decode())
    elif letters:
        headings = ("process", "position", "type", "problem", "state", "since", "error")
        table(headings, [_row(letter) for letter in letters])
        if any(letter.state == "parked" for letter in letters):
            note("Look at one with: fedota deadletters show PROCESS POSITION")
    elif not silent:
        note("There are none: every event has had its effect everywhere.")
    for name in silent:
        note(f"{name} does not answer, so its dead letters are not known.")
    return REFUSED if silent else 0


@deadletters.command()
@_process
@_position
@_json
@at_a_gateway
async def show(door: Door, process: str, position: int, as_json: bool) -> None:
    """Show a dead letter: why it is one, its event, and those that are parked behind it."""
    letter = await door.dead_letter(process, position)
    if as_json:
        say(msgspec.json.encode(letter).decode())
        return
    said = what_happened(letter.event) if letter.event else ""
    say(f"{click.style(letter.type, bold=True)} at position {position}: {said}")
    state = "parked" if letter.state == "parked" else f"dropped by {plain(letter.dropped_by)}"
    for label, text in {
        "process": process,
        "state": f"{state}, {local(letter.parked)}",
        "stream": letter.subject,
        "error": click.style(plain(letter.error), fg="red"),
    }.items():
        say(f"  {faint(label.ljust(8))}  {text}")
    if letter.event:
        say(f"  {faint('data')}")
        for line in msgspec.json.format(msgspec.json.encode(letter.event["data"]), indent=2).decode().splitlines():
            say(f"    {printable(line)}")
    if letter.behind:
        say(
            f"\nParked behind it, because events of a stream are handled in order: {count(len(letter.behind), 'event')}"
        )
        for one in letter.behind:
            say(f"  {one.position:>8}  {kind(one.type)}")
    if letter.state == "parked":
        command = f"{process} {position}"
        say("\nWhen its cause is mended, have it handled:  fedota deadletters retry " + command)
        say("To go on without it:                        fedota deadletters drop " + command)


@deadletters.command()
@_process
@_position
@at_a_gateway
async def retry(door: Door, process: str, position: int) -> int:
    """Have the parked events of that one's stream handled again, in order. Doing it twice has one effect."""
    retried = await door.retry(process, position)
    say(_outcome(retried, process, position))
    if retried.error:
        note(f"Error: {plain(retried.error)}")
    return REFUSED if retried.left else 0


def _outcome(retried: Retried, process: str, position: int) -> str:
    if not retried.handled and not retried.left:
        return f"The event at position {position} is no dead letter of {plain(process)} (any more)."
    handled = f"{count(retried.handled, 'event')} handled"
    return (
        f"{handled}, {count(retried.left, 'event')} still parked." if retried.left else f"{handled}, none left parked."
    )


@deadletters.command()
@_process
@_position
@click.option("--yes", is_flag=True, help="Do not ask whether that is meant.")
@at_a_gateway
async def drop(door: Door, process: str, position: int, yes: bool) -> None:
    """Give a dead letter up: it never has an effect in that projection, not even after a rebuild."""
    letter = await door.dead_letter(process, position)
    if letter.state == "dropped":
        note(f"It was dropped already, by {plain(letter.dropped_by)}. Nothing was changed.")
        return
    if not yes:
        note(_loss(letter))
        click.confirm("Drop it?", abort=True, err=True)
    dropped = await door.drop(process, position)
    say(f"Dropped: {dropped.type} at position {position} has no effect in the projection of {process}.")
    if letter.behind:
        note(
            f"{count(len(letter.behind), 'event')} of its stream are parked behind it; have them handled with: "
            f"fedota deadletters retry {process} {letter.behind[0].position}"
        )


def _loss(letter: Letter) -> str:
    said = what_happened(letter.event) if letter.event else letter.type
    return (
        f"This gives up for good, in the projection of {letter.process}: {said}\n"
        f"  ({letter.type} at position {letter.position}, parked {local(letter.parked)}: {plain(letter.error)})\n"
        "The event stays in the log. What the projection shows will go on without it, and events after it may not "
        "fit what is there."
    )


def _row(letter: Letter) -> list[str]:
    state = click.style("parked", fg="red") if letter.state == "parked" else f"dropped by {plain(letter.dropped_by)}"
    problem = letter.subject.partition("/")[2]
    error = plain(letter.error)
    return [
        letter.process,
        str(letter.position),
        kind(letter.type),
        f"…{problem[-8:]}",
        state,
        local(letter.parked),
        error if len(error) <= 100 else f"{error[:99]}…",
    ]
