"""How an event looks at a terminal: one line among others, or all of it."""

from contextlib import aclosing
from datetime import datetime
from typing import Final

import click
import msgspec

from fedota.events import CATALOGUE, UnknownEventError, decode_data
from fedota.events.problems import ProblemCreated, ProblemRevised
from fedota.operate.door import PAGE, Body, Door, Names
from fedota.operate.terminal import faint, local, plain, printable, say
from fedota.words import sentence

_NAME: Final = 20  # characters of a problem's name in a line
_TYPE: Final = max(map(len, CATALOGUE))
_COLORS: Final = {"problems": "blue", "storage": "cyan", "orchestrator": "magenta", "rounds": "yellow"}
_GOOD: Final = frozenset({"ProblemCompleted", "ParticipationApproved", "FilesStored", "InfraSpawned", "InfraRecovered"})
_BAD: Final = frozenset(
    {"InfraFailed", "InfraDegraded", "FilesRejected", "ParticipationRefused", "ParticipationRevoked"}
)
_EFFECTS: Final = 1000  # events of the problem behind one that are looked through for what followed from it


class Lines:
    """Events one a line: for people, or for programs."""

    def __init__(self, door: Door, as_json: bool) -> None:
        self._names = Names(door)
        self._as_json = as_json
        self.shown = 0
        self.last = 0

    async def show(self, event: Body) -> None:
        """Print one."""
        say(msgspec.json.encode(event).decode() if self._as_json else await line(event, self._names))
        self.shown += 1
        self.last = event["position"]


async def line(event: Body, names: Names) -> str:
    """Position, local time, type, problem, what happened, who did it."""
    said = what_happened(event, names)
    name = plain(await names.of(_problem_of(event)))
    parts = [
        f"{event['position']:>8}",
        local(datetime.fromisoformat(event["time"])),
        kind(event["type"], pad=_TYPE),
        click.style(_cut(name).ljust(_NAME), bold=True),
        said,
        faint(f"· {plain(event['actor'].removesuffix(f':{_problem_of(event)}'))}"),
    ]
    return "  ".join(parts)


def what_happened(event: Body, names: Names | None = None) -> str:
    """A sentence on it; what this program does not know is said too."""
    try:
        data = decode_data(event["type"], event["schemaversion"], msgspec.json.encode(event["data"]))
    except UnknownEventError:
        return click.style("this fedota does not know such events: install a newer one", fg="red")
    except msgspec.ValidationError as error:
        return click.style(f"cannot be read: {plain(str(error))}", fg="red")
    if names and isinstance(data, ProblemCreated | ProblemRevised):
        names.heard(data.problem_id, data.name)
    return plain(sentence(data))


def kind(type_: str, pad: int = 0) -> str:
    """A type in its colour: what is good and bad stands out, else one colour for each owner."""
    known = CATALOGUE.get(type_)
    color = "green" if type_ in _GOOD else "red" if type_ in _BAD or known is None else _COLORS.get(known.owner)
    return click.style(plain(type_).ljust(pad), fg=color)


async def show_event(door: Door, event: Body) -> None:
    """All of an event, then what it follows from and what followed from it."""
    names = Names(door)
    await _tell(event, names)
    causes, unknown = await _causes(door, event)
    effects = await _effects(door, event)
    say(click.style("What led to it, and what followed from it", bold=True))
    begun_by = plain((causes or [event])[0]["actor"])
    stranger = f"an event or command {unknown}, which is none of this problem's events"
    say(f"  {faint(stranger if unknown else f'a request of {begun_by}')}")
    for depth, cause in enumerate(causes, 1):
        say(_chained(depth, cause))
    say(_chained(len(causes) + 1, event, here=True))
    for depth, effect in effects:
        say(_chained(len(causes) + 1 + depth, effect))
    if not effects:
        say(f"{'  ' * (len(causes) + 2)}{faint('└ nothing')}")


async def _tell(event: Body, names: Names) -> None:
    problem_id = _problem_of(event)
    rows = {
        "position": str(event["position"]),
        "time": f"{local(datetime.fromisoformat(event['time']))}  {faint(event['time'])}",
        "problem": f"{plain(await names.of(problem_id))}  {faint(problem_id)}",
        "actor": plain(event["actor"]),
        "stream": f"{event['subject']}, version {event['streamversion']}",
        "schema": f"version {event['schemaversion']}",
        "id": event["id"],
        "correlation": event["correlationid"],
        "causation": event.get("causationid", ""),
        "trace": event.get("traceparent", ""),
    }
    say(f"{click.style(plain(event['type']), bold=True)}: {what_happened(event, names)}")
    for label, text in rows.items():
        if text:
            say(f"  {faint(label.ljust(11))}  {text}")
    say(f"  {faint('data')}")
    for text in msgspec.json.format(msgspec.json.encode(event["data"]), indent=2).decode().splitlines():
        say(f"    {printable(text)}")
    say()


def _chained(depth: int, event: Body, here: bool = False) -> str:
    mark = click.style("▸", bold=True) if here else "└"
    told = f"{event['position']}  {kind(event['type'])}  {what_happened(event)}"
    return f"{'  ' * depth}{mark} {click.style(told, bold=True) if here else told}"


async def _causes(door: Door, event: Body) -> tuple[list[Body], str]:
    """The events that it follows from, the first one first; and the cause of that one, where it is no event here."""
    causes: list[Body] = []
    current = event
    while wanted := current.get("causationid"):
        found = await _earlier(door, current, wanted)
        if found is None:
            return causes, wanted
        causes.insert(0, found)
        current = found
    return causes, ""


async def _earlier(door: Door, event: Body, wanted: str) -> Body | None:
    """The event with this id, of the same problem; mostly it is close by, so the search begins there."""
    params, until, width = [("problem", _problem_of(event))], event["position"] - 1, PAGE
    while until > 0:
        begin = max(0, until - width)
        async with aclosing(door.pages(params, begin, until)) as pages:
            async for page in pages:
                for one in page:
                    if one["id"] == wanted:
                        return one
        until, width = begin, 10 * width
    return None


async def _effects(door: Door, event: Body) -> list[tuple[int, Body]]:
    """What followed from it, and from that: each with its depth, below what it follows from."""
    page = await door.page([("problem", _problem_of(event))], event["position"], _EFFECTS)
    children: dict[str, list[Body]] = {}
    for one in page.events:
        if cause := one.get("causationid"):
            children.setdefault(cause, []).append(one)

    def below(one: Body, depth: int) -> list[tuple[int, Body]]:
        return [row for child in children.get(one["id"], []) for row in ((depth, child), *below(child, depth + 1))]

    return below(event, 1)


def _problem_of(event: Body) -> str:
    problem_id: str = event["subject"].partition("/")[2]
    return problem_id


def _cut(name: str) -> str:
    return name if len(name) <= _NAME else f"{name[: _NAME - 1]}…"
