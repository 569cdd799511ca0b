"""Recorded events played again, and what follows from them."""

import asyncio
from collections import Counter
from collections.abc import Callable
from contextlib import aclosing
from datetime import datetime
from time import monotonic
from typing import Final

import click
import msgspec

from fedota.events import CATALOGUE, UnknownEventError, decode_data
from fedota.operate.door import Body, Door, Params
from fedota.operate.lines import Lines, kind
from fedota.operate.terminal import count, faint, local, note, plain

Tell = Callable[[str], None]
_MOST: Final = 200  # problems whose state is told at the end
_PAGE: Final = 20  # problems in one look into the past


class Replay:
    """Plays events and remembers what they were."""

    def __init__(self, door: Door, lines: Lines | None, speed: float | None) -> None:
        self._door = door
        self._lines = lines
        self._speed = speed
        self._counts: Counter[str] = Counter()
        self._problems: set[str] = set()
        self._last: Body | None = None
        self._began = monotonic()
        self._first_time: datetime | None = None

    async def play(self, params: Params, after: int, until: int) -> None:
        """All events past `after` up to `until`; the first one that cannot be read ends it in words."""
        async with aclosing(self._door.pages(params, after, until)) as pages:
            async for page in pages:
                for event in page:
                    await self._play(event)

    async def _play(self, event: Body) -> None:
        await self._keep_pace(datetime.fromisoformat(event["time"]))
        _decode(event)
        if self._lines:
            await self._lines.show(event)
        self._counts[event["type"]] += 1
        self._problems.add(event["subject"].partition("/")[2])
        self._last = event

    async def _keep_pace(self, time: datetime) -> None:
        if self._speed is None:
            return
        if self._first_time is None:
            self._first_time, self._began = time, monotonic()
        due = self._began + (time - self._first_time).total_seconds() / self._speed
        await asyncio.sleep(max(0.0, due - monotonic()))

    async def sum_up(self, tell: Tell) -> None:
        """The counts by type, and each problem's state as of the last event."""
        if self._last is None:
            note("No event fits: nothing was played.")
            return
        position, total = self._last["position"], sum(self._counts.values())
        when = local(datetime.fromisoformat(self._last["time"]))
        tell("")
        played = f"Played {count(total, 'event')} up to position {position} ({when})"
        tell(click.style(f"{played}; each of them can be read by this fedota.", bold=True))
        for name in sorted(self._counts, key=list(CATALOGUE).index):
            tell(f"  {self._counts[name]:>9,}  {kind(name)}")
        tell("")
        tell(click.style(f"What the log makes of them, as of position {position}:", bold=True))
        told = await self._tell_problems(position, tell)
        if left := len(self._problems) - told:
            tell(faint(f"  and {count(left, 'more problem')}; --problem NAME plays one alone"))

    async def _tell_problems(self, position: int, tell: Tell) -> int:
        told = 0
        async with aclosing(self._door.problems([("at", str(position))], _PAGE)) as pages:
            async for page in pages:
                for row in page:
                    if row["problem_id"] in self._problems:
                        tell(f"  {_state(row)}")
                        told += 1
                if told in (len(self._problems), _MOST):
                    break
        return told


def _decode(event: Body) -> None:
    """Raise in words what this program cannot read."""
    try:
        decode_data(event["type"], event["schemaversion"], msgspec.json.encode(event["data"]))
    except (UnknownEventError, msgspec.ValidationError) as error:
        raise click.ClickException(
            f"The event at position {event['position']} cannot be read by this fedota: {plain(str(error))}. "
            "Install the version that the platform runs."
        ) from None


def _state(problem: Body) -> str:
    """What has become of a problem, in a line."""
    latest, rounds = problem["latest_round"], problem["plan"]["rounds"]
    told = [click.style(plain(problem["name"]), bold=True), problem["state"]]
    if latest and latest["run"] == problem["run"]:
        told.append(f"round {latest['round']} of {rounds} {latest['stage']}")
    elif problem["run"]:
        told.append("no round yet")
    told.append(f"{problem['participations']['approved']} taking part")
    if problem["run"] > 1:
        told.append(f"run {problem['run']}")
    if problem["reason"]:
        told.append(plain(problem["reason"]))
    if problem["model"]:
        told.append(f"result {problem['model']['sha256'][:12]}")
    return f"{told[0]}: {', '.join(told[1:])}  {faint(problem['problem_id'])}"
