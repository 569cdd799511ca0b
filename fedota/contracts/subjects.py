"""NATS subjects, in one place.

Problem ids are UUIDs in hex with dashes: safe as one token of a subject.
"""

from typing import Final

STREAM: Final = "FEDOTA"
EVENTS: Final = "fedota.events.>"


def event(type_: str, problem_id: str) -> str:
    """Where the stream holds an event; its sequence there is the event's position."""
    return f"fedota.events.{type_}.{problem_id}"


def inlet(secret: str) -> str:
    """Where the stream takes what it holds as `EVENTS`; `*` stands for any secret.

    Whoever may ask the server for something chooses where it replies, and a permission to publish does not cover that:
    a stream that listened on `EVENTS` itself would hold replies that somebody sent there. What nobody can guess, nobody
    can name. Only the relay may read the stream's configuration, which has the secret.
    """
    return f"fedota.relay.{secret}.>"


def into(inlet_: str, event_: str) -> str:
    """Where an event is published, so that the stream holds it as `event_`."""
    return inlet_[:-1] + event_[len(EVENTS) - 1 :]


def command(service: str, name: str) -> str:
    """Where `service` answers the command `name`."""
    return f"fedota.commands.{service}.{name}"


def runtime(problem_id: str, verb: str) -> str:
    """Where a problem's coordinator asks the platform: `report`, `resume`, `revoked` (rounds), `presign` (storage)."""
    return f"fedota.runtime.{problem_id}.{verb}"


def operation(process: str, name: str) -> str:
    """Where `process` answers what an operator asks about its projection (`fedota.contracts.operations`)."""
    return f"fedota.operations.{process}.{name}"
