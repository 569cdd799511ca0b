"""The envelope that every event travels and rests in: CloudEvents 1.0 in JSON, with Fedota's extensions."""

import os
import time
from datetime import datetime
from typing import Any, ClassVar
from uuid import UUID

import msgspec


class EventData(msgspec.Struct, frozen=True, kw_only=True, gc=False):  # a fact has no cycles to look for
    """What happened, typed. Every kind of event is a subclass, listed in `fedota.events.CATALOGUE`."""

    problem_id: str


class NewEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An event that is about to be appended: the log still has to give it position, version and time."""

    data: EventData
    id: UUID = msgspec.field(default_factory=lambda: uuid7())

    @property
    def type(self) -> str:
        """The event's type: its class's plain name, which `CATALOGUE` lists as an explicit string."""
        return type(self.data).__name__


class Event(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One recorded fact.

    `position` counts all events from 1 without gaps; `version` counts those of one `subject` (stream) from 1.
    `causation` is the event or command that this one follows from, `correlation` the request at the start.
    """

    id: UUID
    type: str
    schema: int
    subject: str
    version: int
    position: int
    time: datetime
    actor: str
    correlation: UUID
    data: EventData
    causation: UUID | None = None
    traceparent: str | None = None

    @property
    def problem_id(self) -> str:
        """The problem that the event is about."""
        return self.data.problem_id


class CloudEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The JSON form: CloudEvents 1.0 attributes (lower case), extensions after them."""

    SPEC: ClassVar[str] = "1.0"

    specversion: str
    id: UUID
    source: str
    type: str
    subject: str
    time: datetime
    datacontenttype: str
    data: msgspec.Raw
    position: int
    streamversion: int
    schemaversion: int
    actor: str
    correlationid: UUID
    causationid: UUID | None = None
    traceparent: str | None = None


def uuid7() -> UUID:
    """A time-ordered UUID (RFC 9562, version 7): 48 bits of Unix milliseconds, 74 random bits."""
    value = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10), "big")
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return UUID(int=value & (1 << 128) - 1)


def to_json(value: Any) -> bytes:
    """JSON bytes of any event data, command or reply."""
    return msgspec.json.encode(value)


def with_defaults(data: dict[str, Any]) -> dict[str, Any]:
    """To a version that only has more fields than the one before: what was not known then has its default."""
    return data
