"""What a process derives from the log, said as data: `Projection`."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec

from fedota.events import CATALOGUE, Event, EventData
from fedota.kernel.database import Connection
from fedota.kernel.tables import BatchHandler

Reaction = Callable[[Event, Any], Awaitable[None]]


class Projection(msgspec.Struct, frozen=True, kw_only=True):
    """What to do with events: rows to write, and reactions.

    `tables` is SQL that makes the tables of the process's own schema, if they are not there; `names` are their names.
    `write` gets a batch of events that follow on each other, only those of `kinds` where it names any, and writes
    their rows in the transaction that moves the checkpoint, nothing else; the same events in any other batches, or
    one by one, give the same rows.
    A reaction `(event, data)` acts outside before that transaction commits, so it may run again after a crash: what it
    does is keyed by the event's id. A rebuild repeats none.
    """

    tables: str = ""
    names: tuple[str, ...] = ()
    write: BatchHandler | None = None
    kinds: frozenset[type[EventData]] | None = None
    reactions: Mapping[type[EventData], Reaction] = {}

    @property
    def types(self) -> list[str] | None:
        """The types of event that `write` is given; None for all."""
        kinds = self.kinds
        return None if kinds is None else [name for name, entry in CATALOGUE.items() if entry.data in kinds]

    async def write_rows(self, connection: Connection, events: Sequence[Event]) -> None:
        """The rows of these events."""
        if self.kinds is not None:
            events = [event for event in events if type(event.data) in self.kinds]
        if events and self.write:
            await self.write(connection, events)

    async def react(self, event: Event) -> None:
        """What is done outside because of an event."""
        if reaction := self.reactions.get(type(event.data)):
            await reaction(event, event.data)
