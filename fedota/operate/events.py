"""`fedota events …`: the log, read by people and by their scripts."""

from collections.abc import Callable
from contextlib import aclosing
from datetime import datetime
from functools import reduce
from typing import Any, Final, NamedTuple

import click
import msgspec

from fedota.events import CATALOGUE
from fedota.operate.door import Door, Params, at_a_gateway, resolve_problem
from fedota.operate.lines import Lines, show_event
from fedota.operate.replaying import Replay
from fedota.operate.terminal import count, note, plain, say
from fedota.operate.times import moment, rfc3339

Option = Callable[[Callable[..., Any]], Callable[..., Any]]
_FOREVER: Final = 2**62
_NEWEST: Final = 50


def _known_types(_: click.Context, __: click.Parameter, types: tuple[str, ...]) -> tuple[str, ...]:
    known = {name.casefold(): name for name in CATALOGUE}
    for text in types:
        if text.casefold() not in known:
            raise click.BadParameter(f"there is no event type {text!r}. The types: {', '.join(sorted(CATALOGUE))}.")
    return tuple(known[text.casefold()] for text in types)


_problem = click.option("--problem", metavar="NAME|ID", help="Only this problem: its id, its name, or how it begins.")
_types = click.option(
    "--type",
    "types",
    multiple=True,
    callback=_known_types,
    metavar="TYPE",
    help="Only events of this type; may be given more than once.",
)
_actor = click.option("--actor", help="Only what this actor caused, for example setter or service:rounds.")
_json = click.option("--json", "as_json", is_flag=True, help="One CloudEvent a line, in JSON.")
_after = click.option("--after", type=click.IntRange(min=0), metavar="POSITION", help="Only events past this position.")
_until = click.option(
    "--until", type=click.IntRange(min=0), metavar="POSITION", help="Only events up to this position."
)
_since = click.option(
    "--since",
    callback=moment,
    metavar="TIME",
    help="Only events from then on: 2026-11-24, '2026-11-24 10:30', 10:30, or 15m (ago).",
)
_before = click.option("--before", callback=moment, metavar="TIME", help="Only events before then.")


def _together(*options: Option) -> Option:
    """These options, in this order, as one decorator."""
    return lambda command: reduce(lambda made, option: option(made), reversed(options), command)


_which = _together(_problem, _types, _actor)
_where = _together(_after, _until, _since, _before)


class Range(NamedTuple):
    """Between which positions and times."""

    after: int | None = None
    until: int | None = None
    since: datetime | None = None
    before: datetime | None = None

    def check(self) -> None:
        """Raise for what nothing can lie between."""
        if self.until is not None and self.after is not None and self.until < self.after:
            raise click.UsageError(f"--until {self.until} lies before --after {self.after}: no event is between them.")
        if self.since and self.before and self.before <= self.since:
            raise click.UsageError("--before is not later than --since: no event is between them.")

    @property
    def params(self) -> Params:
        """The times as the gateway is asked for them."""
        named = {"since": self.since, "before": self.before}
        return [(name, rfc3339(time)) for name, time in named.items() if time]


async def _filters(door: Door, problem: str | None, types: tuple[str, ...], actor: str | None) -> Params:
    params = [("type", name) for name in types]
    if problem is not None:
        params.append(("problem", await resolve_problem(door, problem)))
    if actor is not None:
        params.append(("actor", actor))
    return params


@click.group()
def events() -> None:
    """Read the log: every fact that the platform knows, in order."""


@events.command("list")
@_which
@_where
@click.option(
    "--limit",
    type=click.IntRange(min=0),
    default=_NEWEST,
    show_default=True,
    help="How many at most; 0 for all.",
)
@_json
@at_a_gateway
async def list_(
    door: Door,
    problem: str | None,
    types: tuple[str, ...],
    actor: str | None,
    limit: int,
    as_json: bool,
    **where: Any,
) -> None:
    """List events: the newest ones, or with --after or --since the first ones from there; oldest first."""
    wanted = Range(**where)
    wanted.check()
    params = [*await _filters(door, problem, types, actor), *wanted.params]
    lines = Lines(door, as_json)
    head = await door.head()
    end = head if wanted.until is None else min(head, wanted.until)
    if wanted.after is None and wanted.since is None and limit:
        found = await door.newest(params, end, limit)
        for event in found:
            await lines.show(event)
        if lines.shown == limit and found[0]["position"] > 1:
            note(f"These are the newest {limit}. Earlier ones: --limit, or --until {found[0]['position'] - 1}.")
    else:
        last = await _first(door, params, wanted.after or 0, end, limit or _FOREVER, lines)
        if limit and lines.shown == limit and last < end:
            note(f"There may be more: --after {last} goes on here.")
    if not lines.shown:
        note("The log is empty." if not head else f"No event fits; the log has {count(head, 'event')}.")


async def _first(door: Door, params: Params, after: int, end: int, limit: int, lines: Lines) -> int:
    async with aclosing(door.pages(params, after, end)) as pages:
        async for page in pages:
            for event in page:
                await lines.show(event)
                if lines.shown == limit:
                    return lines.last
    return lines.last


@events.command()
@click.argument("position", type=click.IntRange(min=1))
@_json
@at_a_gateway
async def show(door: Door, position: int, as_json: bool) -> None:
    """Show all of the event at POSITION, what it follows from, and what followed from it."""
    event = await door.event(position)
    if as_json:
        say(msgspec.json.encode(event).decode())
    else:
        await show_event(door, event)


@events.command()
@_which
@_after
@_since
@click.option(
    "-n",
    "--lines",
    "lines_before",
    type=click.IntRange(min=0),
    default=10,
    show_default=True,
    help="How many of the events before to begin with, unless --after or --since says where.",
)
@_json
@at_a_gateway
async def tail(
    door: Door,
    problem: str | None,
    types: tuple[str, ...],
    actor: str | None,
    lines_before: int,
    as_json: bool,
    **where: Any,
) -> None:
    """Follow the log live, until Ctrl-C; after a break it goes on where it was, with nothing lost or twice."""
    wanted = Range(**where)
    params = [*await _filters(door, problem, types, actor), *wanted.params]
    lines = Lines(door, as_json)
    after = wanted.after
    if after is None and wanted.since is None:
        after = await door.head()
        for event in await door.newest(params, after, lines_before) if lines_before else []:
            await lines.show(event)
    try:
        async with aclosing(door.tail(params, after or 0, lambda words: note(plain(words)))) as stream:
            async for body in stream:
                await lines.show(msgspec.json.decode(body))
    finally:
        if lines.last and not as_json:
            note(f"Stopped behind position {lines.last}; --after {lines.last} goes on there.")


@events.command()
@_which
@_where
@click.option(
    "--speed",
    type=click.FloatRange(min=0, min_open=True),
    help="Keep the pace at which they happened, so many times faster: 1 is as it was. Default: as fast as possible.",
)
@click.option("--quiet", is_flag=True, help="Say only what follows from them.")
@_json
@at_a_gateway
async def replay(
    door: Door,
    problem: str | None,
    types: tuple[str, ...],
    actor: str | None,
    speed: float | None,
    quiet: bool,
    as_json: bool,
    **where: Any,
) -> None:
    """Play recorded events again in order, and tell the state that follows from them.

    Each event is decoded and checked by this program's own catalogue of events. With --json the events are on standard
    output and the rest is on standard error.
    """
    wanted = Range(**where)
    wanted.check()
    params = [*await _filters(door, problem, types, actor), *wanted.params]
    tell: Callable[[str], None] = note if as_json else say
    played = Replay(door, None if quiet else Lines(door, as_json), speed)
    head = await door.head()
    end = head if wanted.until is None else min(head, wanted.until)
    await played.play(params, wanted.after or 0, end)
    await played.sum_up(tell)
