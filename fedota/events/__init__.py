"""Every event of Fedota, in one table: its type, who owns it, its schema version and its data."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, Final, NamedTuple

import msgspec

from fedota.events import orchestrator, problems, rounds, storage
from fedota.events.envelope import CloudEvent, Event, EventData, NewEvent, to_json, uuid7, with_defaults

__all__ = [
    "CATALOGUE",
    "Event",
    "EventData",
    "EventType",
    "NewEvent",
    "UnknownEventError",
    "decode",
    "decode_data",
    "decoder",
    "encode",
    "to_json",
    "uuid7",
]

Upcast = Callable[[dict[str, Any]], dict[str, Any]]


class EventType(NamedTuple):
    """One row of the catalogue. Only `owner` appends events of this type.

    `data` is the newest version. What was recorded before it stays as it is, and is brought to it when it is read:
    the first of `upcasts` makes version 2 of the data of version 1, and so on. They are pure functions.
    """

    owner: str
    data: type[EventData]
    upcasts: tuple[Upcast, ...] = ()

    @property
    def schema(self) -> int:
        """The newest version's number."""
        return len(self.upcasts) + 1


CATALOGUE: Final[dict[str, EventType]] = {
    "ProblemCreated": EventType("problems", problems.ProblemCreated, (problems.without_setter, with_defaults)),
    "ProblemRevised": EventType("problems", problems.ProblemRevised, (with_defaults,)),
    "ProblemStarted": EventType("problems", problems.ProblemStarted, (with_defaults,)),
    "ProblemStopped": EventType("problems", problems.ProblemStopped),
    "ProblemCompleted": EventType("problems", problems.ProblemCompleted),
    "ParticipationRequested": EventType("problems", problems.ParticipationRequested),
    "ParticipationApproved": EventType("problems", problems.ParticipationApproved),
    "ParticipationRefused": EventType("problems", problems.ParticipationRefused),
    "ParticipationRevoked": EventType("problems", problems.ParticipationRevoked),
    "FilesStored": EventType("storage", storage.FilesStored),
    "FilesRejected": EventType("storage", storage.FilesRejected),
    "FilesDeleted": EventType("storage", storage.FilesDeleted),
    "InfraSpawned": EventType("orchestrator", orchestrator.InfraSpawned, (with_defaults,)),
    "InfraFailed": EventType("orchestrator", orchestrator.InfraFailed),
    "InfraDegraded": EventType("orchestrator", orchestrator.InfraDegraded),
    "InfraRecovered": EventType("orchestrator", orchestrator.InfraRecovered),
    "InfraStopped": EventType("orchestrator", orchestrator.InfraStopped),
    "RoundUpdated": EventType("rounds", rounds.RoundUpdated, (with_defaults,)),
}

_decode_envelope: Final = msgspec.json.Decoder(CloudEvent).decode
_decode_object: Final = msgspec.json.Decoder(dict[str, Any]).decode


class UnknownEventError(Exception):
    """An event of a type or schema version that this program does not know: it must not be skipped."""


@cache
def decoder(type_: str, schema: int) -> Callable[[bytes], EventData]:
    """What makes typed data, always of the newest version, of the stored bytes of this version of a type.

    Raises `UnknownEventError`; what it gives raises `msgspec.ValidationError` for bytes that are not such data.
    """
    known = CATALOGUE.get(type_)
    if known is None or not 1 <= schema <= known.schema:
        raise UnknownEventError(f"{type_} schema version {schema}")
    if schema == known.schema:
        return msgspec.json.Decoder(known.data).decode
    return partial(_upcast, known.upcasts[schema - 1 :], known.data)


def _upcast(steps: Sequence[Upcast], kind: type[EventData], data: bytes) -> EventData:
    fields = _decode_object(data)
    for step in steps:
        fields = step(fields)
    return msgspec.convert(fields, kind)


def decode_data(type_: str, schema: int, data: bytes) -> EventData:
    """The typed data behind stored JSON bytes. Raises `UnknownEventError`, or `msgspec.ValidationError`."""
    return decoder(type_, schema)(data)


def encode(record: Mapping[str, Any]) -> bytes:
    """A recorded event as a CloudEvents 1.0 JSON object; `record` has the log's columns, `data` as stored bytes.

    The data is passed on as it was written: who relays an event need not know its type.
    """
    return to_json(
        CloudEvent(
            specversion=CloudEvent.SPEC,
            id=record["id"],
            source=f"/services/{record['subject'].partition('/')[0]}",
            type=record["type"],
            subject=record["subject"],
            time=record["time"],
            datacontenttype="application/json",
            data=msgspec.Raw(record["data"]),
            position=record["position"],
            streamversion=record["version"],
            schemaversion=record["schema"],
            actor=record["actor"],
            correlationid=record["correlation"],
            causationid=record["causation"],
            traceparent=record["traceparent"],
        )
    )


def decode(body: bytes) -> Event:
    """The event behind a CloudEvents JSON object that `encode` made. Raises `UnknownEventError`."""
    raw = _decode_envelope(body)
    return Event(
        id=raw.id,
        type=raw.type,
        schema=raw.schemaversion,
        subject=raw.subject,
        version=raw.streamversion,
        position=raw.position,
        time=raw.time,
        actor=raw.actor,
        correlation=raw.correlationid,
        causation=raw.causationid,
        traceparent=raw.traceparent,
        data=decode_data(raw.type, raw.schemaversion, bytes(raw.data)),
    )
