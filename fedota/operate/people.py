"""`fedota people …`: whose names can be opened, and how one is forgotten."""

import unicodedata

import click
import msgspec

from fedota.operate.door import Body, Door, at_a_gateway
from fedota.operate.terminal import REFUSED, note, plain, say, table


@click.group()
def people() -> None:
    """See whom events name, and forget a person for good."""


@people.command("list")
@click.option("--json", "as_json", is_flag=True, help="One person a line, in JSON.")
@at_a_gateway
async def list_(door: Door, as_json: bool) -> None:
    """List the people whose names can be opened: those who asked for a change with a token that names them."""
    found = await door.people()
    if as_json:
        for person in found:
            say(msgspec.json.encode(person).decode())
    elif found:
        table(("id", "name"), ((person["id"], plain(person["name"])) for person in found))
    else:
        note("Nobody: no token that names a person has acted yet, or all of them are forgotten.")


@people.command()
@click.argument("person", metavar="NAME|ID")
@click.option("--yes", is_flag=True, help="Do not ask whether that is meant.")
@at_a_gateway
async def forget(door: Door, person: str, yes: bool) -> int:
    """Forget a person: the key is deleted that opens the name in events. That cannot be undone.

    The events stay as they are, and show "a forgotten person". Take the person's token out of the tokens file first.
    Exit status 1 when nobody was forgotten: whoever was before is not known any more, so that looks the same.
    """
    found = await _find(door, person)
    if found is None:
        note(
            "Nobody was forgotten: nobody is known by this name or id, or not any more. `fedota people list` says who."
        )
        return REFUSED
    if not yes:
        click.confirm(f"Nobody will be able to read {plain(found['name'])} in any event again. Go on?", abort=True)
    told = await door.forget(found["id"])  # by id: addresses are what proxies write to their logs
    say(told["remains"])
    return 0 if told["forgotten"] else REFUSED


async def _find(door: Door, who: str) -> Body | None:
    wanted = unicodedata.normalize("NFC", who)
    return next((one for one in await door.people() if wanted in (one["name"], one["id"])), None)
