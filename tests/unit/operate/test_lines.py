"""An event as one line: for people, whatever others have written into it."""

from datetime import datetime
from typing import Any

import click
import msgspec
import pytest

from fedota.events import encode, to_json
from fedota.events.orchestrator import InfraFailed
from fedota.events.problems import ParticipationRefused, Plan, ProblemCreated
from fedota.operate.lines import line, what_happened
from fedota.operate.terminal import count, plain, printable
from tests.support.events import recorded


def body(data: Any, **changes: Any) -> dict[str, Any]:
    """An event as the gateway gives it."""
    event = recorded(data, position=7)
    names = ("id", "type", "schema", "subject", "version", "position", "time", "actor", "correlation")
    record = {name: getattr(event, name) for name in names}
    record |= {"data": to_json(data), "causation": None, "traceparent": None}
    found: dict[str, Any] = msgspec.json.decode(encode(record))
    return {**found, **changes}


class Known:
    """Names without a gateway."""

    def __init__(self) -> None:
        self.names = {"p": "A problem with a very long name"}

    async def of(self, problem_id: str) -> str:
        """A problem's name."""
        return self.names[problem_id]

    def heard(self, problem_id: str, name: str) -> None:
        """An event told it."""
        self.names[problem_id] = name


async def test_a_line_says_what_when_where_and_who() -> None:
    """Position, time of the clocks here, type, the problem's short name, a sentence, the actor."""
    event = body(ParticipationRefused(problem_id="p", organization="Clinic A", reason="no data"))
    words = click.unstyle(await line(event, Known()))  # type: ignore[arg-type]
    when = datetime.fromisoformat(event["time"]).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    assert "  A problem with a ve…  " in words
    assert words.strip().startswith(f"7  {when}  ParticipationRefused")
    assert words.endswith("Clinic A was refused: no data.  · test")


async def test_a_problem_is_called_by_the_name_that_its_event_tells() -> None:
    """Even when the gateway does not know it any more, or not yet."""
    about = {"name": "New", "description": "d", "data_format": "f", "client_image": "i"}
    created = ProblemCreated(problem_id="q", plan=Plan(rounds=1, goal_count=1), **about)
    assert "New" in await line(body(created), Known())  # type: ignore[arg-type]


async def test_the_actor_that_is_a_problems_coordinator_is_short() -> None:
    """The problem's id stands in front of it already, as its name."""
    event = body(InfraFailed(problem_id="p", run=1, namespace="n", reason="r", log=[]), actor="coordinator:p")
    assert (await line(event, Known())).endswith(click.style("· coordinator", dim=True))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"type": "ProblemVanished"}, "install a newer one"),
        ({"schemaversion": 99}, "install a newer one"),
        ({"data": {"problem_id": "p"}}, "cannot be read"),
    ],
)
def test_what_this_program_cannot_read_is_said(changes: dict[str, Any], words: str) -> None:
    """A list goes on: one event that is too new must not hide the others."""
    event = body(InfraFailed(problem_id="p", run=1, namespace="n", reason="r", log=[]))
    assert words in what_happened({**event, **changes})


def test_nothing_that_others_wrote_steers_the_terminal() -> None:
    """Escape sequences, carriage returns and turned text come from organizations and processes."""
    evil = "a\x1b[2Jb\rc\x9b1md\u202ee\nf\0"
    event = body(InfraFailed(problem_id="p", run=1, namespace="n", reason=evil, log=[]))
    for text in (what_happened(event), plain(evil), printable(evil)):
        assert not {"\x1b", "\x9b", "\r", "\u202e", "\0"} & set(text)
    assert "\n" not in plain(evil) and plain(evil).startswith("a\N{REPLACEMENT CHARACTER}[2Jb c")


def test_counts_read_well() -> None:
    """One event, two events, and thousands with a comma."""
    assert [count(number, "event") for number in (0, 1, 2, 1200)] == ["0 events", "1 event", "2 events", "1,200 events"]
