"""Whatever is asked in whatever batches: answers and rows are those of a model that is too simple to be wrong."""

import hashlib
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import asyncpg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedota.events import uuid7
from fedota.kernel.database import Connection
from tests.contract.ground import Ground

APPEND = "select * from fedota.append($1,$2,$3,$4,$5,$6,$7,$8,$9,$10,$11,$12,$13,$14)"
STREAMS = [f"problems/{uuid4()}" for _ in range(3)]
KEYS = ["a", "b", "c", "d", "e"]
TEXTS = st.text(st.characters(exclude_characters="\n\0", exclude_categories=["Cs"]), max_size=20)
TYPES = st.sampled_from(["ProblemCreated", "ParticipationRequested", "ProblemStopped"])


class Asked(NamedTuple):
    """A request as the function takes it."""

    key: str
    fingerprint: bytes
    subject: str
    expected: int | None
    result: bytes | None
    actor: str
    causation: UUID | None
    traceparent: str | None
    events: list[tuple[str, int, bytes]]  # type, schema, data


REQUESTS = st.builds(
    Asked,
    key=st.sampled_from(KEYS) | st.uuids(version=4).map(str),
    fingerprint=st.sampled_from([b"", b"one", b"two"]),
    subject=st.sampled_from(STREAMS),
    expected=st.none() | st.integers(0, 4),
    result=st.none() | st.binary(max_size=10),
    actor=TEXTS,
    causation=st.none() | st.uuids(version=4),
    traceparent=st.none() | TEXTS,
    events=st.lists(st.tuples(TYPES, st.integers(1, 3), st.binary(max_size=40)), max_size=4),
)
BATCHES = st.lists(st.lists(REQUESTS, min_size=1, max_size=12), min_size=1, max_size=4)


class Answer(NamedTuple):
    """A row that the function gives back."""

    outcome: str
    position: int
    version: int
    result: bytes | None


class Model:
    """The log as one would write it down on paper: one request after the other, one event after the other."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.requests: dict[str, tuple[bytes, Answer]] = {}

    def append(self, asked: Asked, correlation: UUID, ids: list[UUID]) -> Answer:
        """What must come of a request; its events have no time and no hash yet."""
        if asked.key in self.requests:
            fingerprint, first = self.requests[asked.key]
            return first._replace(outcome="repeated" if fingerprint == asked.fingerprint else "key_reused")
        version = sum(event["subject"] == asked.subject for event in self.events)
        if asked.expected is not None and asked.expected != version:
            return Answer("conflict", len(self.events), version, None)
        for id_, (type_, schema, data) in zip(ids, asked.events, strict=True):
            version += 1
            event = {"position": len(self.events) + 1, "id": id_, "type": type_, "schema": schema, "data": data}
            event |= {"subject": asked.subject, "version": version, "actor": asked.actor, "correlation": correlation}
            self.events.append(event | {"causation": asked.causation, "traceparent": asked.traceparent})
        answer = Answer("accepted", len(self.events), version, asked.result)
        self.requests[asked.key] = asked.fingerprint, answer
        return answer


def chained(rows: list[asyncpg.Record]) -> list[bytes]:
    """The hash that each row must have."""
    hashes = [bytes(32)]
    for row in rows:
        digest = hashlib.sha256(hashes[-1])
        for name in ("position", "id", "type", "schema", "subject", "version"):
            digest.update(f"{row[name]}\n".encode())
        digest.update(f"{row['time']:%Y-%m-%dT%H:%M:%S.%fZ}\n".encode())
        for name in ("actor", "correlation", "causation", "traceparent"):
            digest.update(f"{'' if row[name] is None else row[name]}\n".encode())
        digest.update(row["data"])
        hashes.append(digest.digest())
    return hashes


async def append(connection: Connection, batch: list[Asked], correlation: UUID, ids: list[list[UUID]]) -> list[Answer]:
    """One call for the whole batch."""
    columns = [list(column) for column in zip(*(asked[:8] for asked in batch), strict=True)]
    keys, fingerprints, subjects, expected, results, actors, causations, traceparents = columns
    events = [event for asked in batch for event in asked.events]
    rows = await connection.fetch(
        APPEND,
        *(keys, fingerprints, subjects, expected, results, [len(asked.events) for asked in batch]),
        *(actors, [correlation] * len(batch), causations, traceparents),
        *([id_ for some in ids for id_ in some], *([event[part] for event in events] for part in range(3))),
    )
    return [Answer(*row.values()) for row in rows]


@given(batches=BATCHES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_answers_and_rows_are_those_of_the_model(ground: Ground, batches: list[list[Asked]]) -> None:
    """Same keys and streams within a batch and across them, conflicts, requests of no events and of several."""
    model, correlation = Model(), uuid7()
    async with ground.superuser() as owner, ground.as_role("problems") as connection:
        await _empty(owner)
        for batch in batches:
            ids = [[uuid7() for _ in asked.events] for asked in batch]
            must = [model.append(asked, correlation, some) for asked, some in zip(batch, ids, strict=True)]
            assert await append(connection, batch, correlation, ids) == must
        rows = await owner.fetch("select * from fedota.events order by position")
        assert [{name: row[name] for name in row.keys() if name not in ("time", "hash")} for row in rows] == [  # noqa: SIM118
            {name: event[name] for name in event} for event in model.events
        ]
        requests = await owner.fetch("select * from fedota.requests")
        assert {row["key"]: (row["fingerprint"], Answer("accepted", *list(row.values())[2:])) for row in requests} == (
            model.requests
        )
        hashes = chained(rows)
        assert [row["hash"] for row in rows] == hashes[1:]
        head = await owner.fetchrow("select position, hash from fedota.head")
        assert head is not None and tuple(head) == (len(rows), hashes[-1])
        assert [row["time"] for row in rows] == sorted(row["time"] for row in rows)


async def _empty(owner: Connection) -> None:
    """A log as a migration leaves it; the guard is only a superuser's to lift."""
    for table in ("events", "requests"):
        await owner.execute(f"alter table fedota.{table} disable trigger append_only; truncate fedota.{table}")
    await owner.execute("update fedota.head set position = 0, hash = decode(repeat('00', 32), 'hex')")
