"""Events as the log has them, without a log."""

from datetime import UTC, datetime

from fedota.events import CATALOGUE, Event, EventData, uuid7


def recorded(data: EventData, *, position: int = 1, version: int = 1) -> Event:
    """An event as the log would give it."""
    kind = type(data).__name__
    return Event(
        id=uuid7(),
        type=kind,
        schema=CATALOGUE[kind].schema,
        subject=f"{CATALOGUE[kind].owner}/{data.problem_id}",
        version=version,
        position=position,
        time=datetime.now(UTC),
        actor="test",
        correlation=uuid7(),
        data=data,
    )
