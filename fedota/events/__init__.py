"""Every event of Fedota, in one table: its type, who owns it, its schema version and its data."""

from collections.abc import Callable
from functools import cache
from typing import Any, Final, NamedTuple

import msgspec

from fedota.events import orchestrator, problems, rounds, storage
from fedota.events.envelope import CloudEvent, Event, EventData, NewEvent, to_json, uuid7

__all__ = ["CATALOGUE", "Event", "EventData", "EventType", "NewEvent", "decode", "encode", "to_json", "uuid7"]


class EventType(NamedTuple):
    """One row of the catalogue. Only `owner` appends events of this type."""

    owner: str
    data: type[EventData]
    schema: int = 1


CATALOGUE: Final[dict[str, EventType]] = {
    "ProblemCreated": EventType("problems", problems.ProblemCreated),
    "ProblemRevised": EventType("problems", problems.ProblemRevised),
    "ProblemStarted": EventType("problems", problems.ProblemStarted),
    "ProblemStopped": EventType("problems", problems.ProblemStopped),
    "ProblemCompleted": EventType("problems", problems.ProblemCompleted),
    "ParticipationRequested": EventType("problems", problems.ParticipationRequested),
    "ParticipationApproved": EventType("problems", problems.ParticipationApproved),
    "ParticipationRefused": EventType("problems", problems.ParticipationRefused),
    "ParticipationRevoked": EventType("problems", problems.ParticipationRevoked),
    "FilesStored": EventType("storage", storage.FilesStored),
    "FilesRejected": EventType("storage", storage.FilesRejected),
    "FilesDeleted": EventType("storage", storage.FilesDeleted),
    "InfraSpawned": EventType("orchestrator", orchestrator.InfraSpawned),
    "InfraFailed": EventType("orchestrator", orchestrator.InfraFailed),
    "InfraDegraded": EventType("orchestrator", orchestrator.InfraDegraded),
    "InfraRecovered": EventType("orchestrator", orchestrator.InfraRecovered),
    "InfraStopped": EventType("orchestrator", orchestrator.InfraStopped),
    "RoundUpdated": EventType("rounds", rounds.RoundUpdated),
}

_decode_envelope: Final = msgspec.json.Decoder(CloudEvent).decode


class UnknownEventError(Exception):
    """An event of a type or schema version that this program does not know: it must not be skipped."""


@cache
def _data_decoder(type_: str, schema: int) -> Callable[[Any], EventData]:
    known = CATALOGUE.get(type_)
    if known is None or schema != known.schema:
        raise UnknownEventError(f"{type_} schema version {schema}")
    return msgspec.json.Decoder(known.data).decode


def decode_data(type_: str, schema: int, data: bytes) -> EventData:
    """The typed data behind stored JSON bytes. Raises `UnknownEventError`, or `msgspec.ValidationError`."""
    return _data_decoder(type_, schema)(data)


def encode(event: Event) -> bytes:
    """The event as a CloudEvents 1.0 JSON object."""
    return to_json(
        CloudEvent(
            specversion=CloudEvent.SPEC,
            id=event.id,
            source=f"/services/{CATALOGUE[event.type].owner}",
            type=event.type,
            subject=event.subject,
            time=event.time,
            datacontenttype="application/json",
            data=msgspec.Raw(to_json(event.data)),
            position=event.position,
            streamversion=event.version,
            schemaversion=event.schema,
            actor=event.actor,
            correlationid=event.correlation,
            causationid=event.causation,
            traceparent=event.traceparent,
        )
    )


def decode(body: bytes) -> Event:
    """The event behind a CloudEvents JSON object that `encode` made."""
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
