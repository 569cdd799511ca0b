"""NATS subjects, in one place.

Problem ids are UUIDs in hex with dashes: safe as one token of a subject.
"""

from typing import Final

STREAM: Final = "FEDOTA"
EVENTS: Final = "fedota.events.>"


def event(type_: str, problem_id: str) -> str:
    """Where the relay publishes an event; the stream's sequence there is the event's position."""
    return f"fedota.events.{type_}.{problem_id}"


def command(service: str, name: str) -> str:
    """Where `service` answers the command `name`."""
    return f"fedota.commands.{service}.{name}"


def runtime(problem_id: str, verb: str) -> str:
    """Where a problem's coordinator asks the platform: `report` and `resume` (rounds), `presign` (storage)."""
    return f"fedota.runtime.{problem_id}.{verb}"


def operation(process: str, name: str) -> str:
    """Where `process` answers what an operator asks about its projection (`fedota.contracts.operations`)."""
    return f"fedota.operations.{process}.{name}"
