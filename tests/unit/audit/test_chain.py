"""The chain alone: each change of each field breaks it, and what happened is told from what is stored."""

from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedota.audit.chain import GENESIS, Chain, Record, digest, fits, is_whole
from fedota.audit.diagnosis import Finding, Read, diagnose

LINE: Final = st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), max_size=20)
FIELDS: Final[st.SearchStrategy[dict[str, Any]]] = st.builds(
    dict,
    id=st.uuids().map(str),
    type=st.sampled_from(["ProblemCreated", "RoundUpdated"]),
    schema=st.integers(1, 3),
    subject=st.uuids().map(lambda id_: f"problems/{id_}"),
    version=st.integers(1, 9),
    time=st.datetimes().map(lambda time: f"{time.isoformat(timespec='microseconds')}Z"),
    actor=LINE,
    correlation=st.uuids().map(str),
    causation=st.none() | st.uuids().map(str),
    traceparent=st.none() | LINE,
    data=st.binary(max_size=40),
)
LOGS: Final = st.lists(FIELDS, min_size=3, max_size=7, unique_by=lambda fields: fields["id"]).map(
    lambda events: chained(events)
)


def chained(events: Sequence[dict[str, Any]]) -> list[Record]:
    """A log of these events."""
    records, before = [], GENESIS
    for position, fields in enumerate(events, start=1):
        record = Record(position=position, **fields, hash=b"")
        before = digest(record, before)
        records.append(record._replace(hash=before))
    return records


def reading(records: Sequence[Record]) -> Read:
    """Pages of a log, two events each."""

    async def pages(after: int) -> AsyncGenerator[list[Record], None]:
        rest = [record for record in records if record.position > after]
        for start in range(0, len(rest), 2):
            yield rest[start : start + 2]

    return pages


async def found(records: Sequence[Record]) -> Finding | None:
    """What does not fit."""
    chain = Chain()
    broken = chain.follow(records)
    return await diagnose(chain, broken, reading(records)) if broken else None


def test_the_formula_is_that_of_the_database() -> None:
    """A hash that PostgreSQL made: select sha256(...) with the expression of 0001_log.sql."""
    record = Record(
        position=2,
        id="0193a5c0-0000-7000-8000-000000000001",
        type="ProblemCreated",
        schema=1,
        subject="problems/0193a5c0-0000-7000-8000-000000000002",
        version=1,
        time="2026-01-31T12:00:00.000001Z",
        actor="ä: setter",
        correlation="0193a5c0-0000-7000-8000-000000000003",
        causation=None,
        traceparent=None,
        data=b'{"a":1}',
        hash=b"",
    )
    assert digest(record, GENESIS).hex() == "e606d2fc51bee9fa05dba640604bd2b7233e88bed501c981252e4ae1601b765a"


@settings(max_examples=25)
@given(LOGS)
def test_a_log_fits(records: list[Record]) -> None:
    """From the first to the last, in whatever portions."""
    chain = Chain()
    for record in records:
        assert chain.follow([record]) is None
    assert (chain.position, chain.hash) == (len(records), records[-1].hash)


CHANGES: Final[dict[str, Callable[[Record], Any]]] = {
    "id": lambda record: record.id[::-1],
    "type": lambda record: record.type + "s",
    "schema": lambda record: record.schema + 1,
    "subject": lambda record: record.subject + "0",
    "version": lambda record: record.version + 1,
    "time": lambda record: record.time.replace("Z", "0Z"),
    "actor": lambda record: record.actor + " ",
    "correlation": lambda record: record.correlation[::-1] + "0",
    "causation": lambda record: None if record.causation else record.id,
    "traceparent": lambda record: (record.traceparent or "") + "x",
    "data": lambda record: record.data + b" ",
    "hash": lambda record: digest(record, record.hash),
}


@pytest.mark.parametrize("field", [field for field in CHANGES if field != "id"])
@settings(max_examples=25)
@given(records=LOGS, place=st.integers(0, 100))
async def test_each_change_of_each_field_is_an_edit_where_it_was_made(
    field: str, records: list[Record], place: int
) -> None:
    """Nothing else of the log is blamed for it."""
    index = place % len(records)
    records[index] = records[index]._replace(**{field: CHANGES[field](records[index])})
    finding = await found(records)
    assert finding and (finding.kind, finding.position) == ("edited", index + 1)


@settings(max_examples=25)
@given(records=LOGS, place=st.integers(0, 100), count=st.integers(1, 3))
async def test_what_is_deleted_is_missed(records: list[Record], place: int, count: int) -> None:
    """The first position of those that are missing."""
    index = place % (len(records) - 1)
    rest = records[:index] + records[index + count :]
    finding = await found(rest)
    if index + count >= len(records):
        assert finding is None  # the end: only the head row and a checkpoint tell
    else:
        assert finding and (finding.kind, finding.position) == ("deleted", index + 1)


@settings(max_examples=25)
@given(records=LOGS, places=st.tuples(st.integers(0, 100), st.integers(0, 100)), stay=st.booleans())
async def test_events_that_change_places_are_told_from_edits(
    records: list[Record], places: tuple[int, int], stay: bool
) -> None:
    """With their hashes, or under those that were there."""
    one, other = sorted(place % len(records) for place in places)
    if one == other:
        return
    first, second = records[one], records[other]
    records[one] = second._replace(position=first.position, hash=first.hash if stay else second.hash)
    records[other] = first._replace(position=second.position, hash=second.hash if stay else first.hash)
    finding = await found(records)
    assert finding and (finding.kind, finding.position) == ("reordered", one + 1)
    assert finding.words == f"events {one + 1} and {other + 1} have changed places"


@settings(max_examples=25)
@given(records=LOGS, place=st.integers(0, 100), count=st.integers(1, 3))
async def test_what_is_put_in_is_told_from_edits(records: list[Record], place: int, count: int) -> None:
    """Also before the last event."""
    index = place % len(records)
    made_up = [records[0]._replace(position=index + 1 + one, actor=f"nobody {one}") for one in range(count)]
    later = [record._replace(position=record.position + count) for record in records[index:]]
    finding = await found([*records[:index], *made_up, *later])
    assert finding and (finding.kind, finding.position) == ("inserted", index + 1)


@settings(max_examples=25)
@given(records=LOGS, place=st.integers(0, 100), count=st.integers(1, 2))
async def test_a_deletion_that_is_hidden_by_new_numbers_is_told(records: list[Record], place: int, count: int) -> None:
    """As long as two events are left behind it."""
    index = place % len(records)
    if index + count + 2 > len(records):
        return
    later = [record._replace(position=record.position - count) for record in records[index + count :]]
    finding = await found([*records[:index], *later])
    assert finding and (finding.kind, finding.position) == ("deleted", index + 1)


async def test_a_position_that_is_there_twice_is_said() -> None:
    """Where somebody has dropped the primary key."""
    fields = {"id": "i", "type": "t", "schema": 1, "subject": "s", "version": 1, "time": "z", "actor": "a"}
    more = {"correlation": "c", "causation": None, "traceparent": None, "data": b""}
    records = chained([{**fields, **more}] * 3)
    finding = await found([*records[:2], records[1], records[2]])
    assert finding and (finding.kind, finding.position) == ("inserted", 2)


def test_bytes_cannot_move_from_one_field_to_the_next() -> None:
    """The hash alone would not show it: the same bytes are hashed."""
    fields = {"id": "i", "type": "t", "schema": 1, "subject": "s", "version": 1, "time": "z", "actor": "a"}
    more = {"correlation": "c", "causation": None, "traceparent": "x", "data": b"1\n2"}
    (record,) = chained([{**fields, **more}])
    moved = record._replace(traceparent="x\n1", data=b"2")
    assert digest(moved, GENESIS) == record.hash
    assert fits(record, GENESIS) and not fits(moved, GENESIS) and not is_whole(moved)
