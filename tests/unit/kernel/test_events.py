"""Every event survives the way into the log and through the stream."""

import time
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from fedota.events import CATALOGUE, Event, EventData, UnknownEventError, decode, encode, to_json, uuid7
from fedota.events.envelope import NewEvent


def example(kind: type) -> Any:
    """A struct with every field given a value of its own, optional ones too."""
    return kind(**{field.name: _value(msgspec.inspect.type_info(field.type)) for field in msgspec.structs.fields(kind)})


def _value(info: msgspec.inspect.Type) -> Any:
    match info:
        case msgspec.inspect.StructType(cls=cls):
            return example(cls)
        case msgspec.inspect.ListType(item_type=item):
            return [_value(item), _value(item)]
        case msgspec.inspect.DictType(value_type=value):
            return {"a": _value(value), "b.c": _value(value)}
        case msgspec.inspect.UnionType(types=types):
            return _value(next(kind for kind in types if not isinstance(kind, msgspec.inspect.NoneType)))
        case msgspec.inspect.LiteralType(values=values):
            return values[-1]
        case msgspec.inspect.FloatType(ge=least):
            return 0.1 + (least or 0)
        case msgspec.inspect.IntType():
            return 7
        case msgspec.inspect.BoolType():
            return True
        case msgspec.inspect.AnyType():
            return {"anything": [1, 2.5, None, "ä"]}
        case msgspec.inspect.StrType():
            return 'ä\n"\\\x00\u2028'
    raise AssertionError(info)


def record(data: EventData, **more: Any) -> dict[str, Any]:
    """A row of the log."""
    kind = type(data).__name__
    return {
        "position": 2**40,
        "id": uuid7(),
        "type": kind,
        "schema": CATALOGUE[kind].schema,
        "subject": f"{CATALOGUE[kind].owner}/00000000-0000-0000-0000-000000000001",
        "version": 3,
        "time": datetime(2026, 1, 2, 3, 4, 5, 678_901, UTC),
        "actor": "setter",
        "correlation": uuid7(),
        "causation": None,
        "traceparent": None,
        "data": to_json(data),
        **more,
    }


@pytest.mark.parametrize("kind", CATALOGUE)
def test_every_event_comes_back_as_it_was(kind: str) -> None:
    """Type, place, time to the microsecond, and each field of its data."""
    data = example(CATALOGUE[kind].data)
    row = record(data, causation=uuid7(), traceparent="00-ab-cd-01")
    assert decode(encode(row)) == Event(**{**row, "data": data})


@pytest.mark.parametrize("kind", CATALOGUE)
def test_what_is_not_said_stays_unsaid(kind: str) -> None:
    """Without a cause and a trace the envelope has no such attributes, as CloudEvents wants it."""
    row = record(example(CATALOGUE[kind].data))
    raw = msgspec.json.decode(encode(row))
    assert {"causationid", "traceparent"}.isdisjoint(raw)
    assert raw["specversion"] == "1.0" and raw["source"] == f"/services/{CATALOGUE[kind].owner}"
    assert all(name.isalnum() and name.islower() for name in raw)
    assert decode(encode(row)).causation is None


@pytest.mark.parametrize("kind", CATALOGUE)
def test_the_table_names_what_the_classes_are(kind: str) -> None:
    """A class that is renamed must not rename what stands in the log."""
    data = example(CATALOGUE[kind].data)
    assert NewEvent(data=data).type == kind
    assert type(data) is CATALOGUE[kind].data


def test_data_travels_byte_for_byte() -> None:
    """The relay passes on what the hash covers, spaces and all, of types it has never heard of too."""
    data = b'{ "problem_id" :"p",  "new": 1 }'
    row = record(example(CATALOGUE["FilesDeleted"].data), type="SomethingNew")
    assert data in encode({**row, "data": data})


def test_the_unknown_is_not_skipped() -> None:
    """Neither a new type nor a new schema version of an old one."""
    data = example(CATALOGUE["FilesDeleted"].data)
    for changed in ({"type": "SomethingNew"}, {"schema": 2}):
        with pytest.raises(UnknownEventError):
            decode(encode(record(data, **changed)))


def test_ids_are_in_order_of_time() -> None:
    """To the millisecond, in each form; never the same twice; version and variant as RFC 9562 says."""
    ids = []
    for _ in range(20):
        now = time.time_ns() // 1_000_000
        while time.time_ns() // 1_000_000 == now:
            pass
        ids.append(uuid7())
    assert ids == sorted(ids)
    assert [str(one) for one in ids] == sorted(str(one) for one in ids)
    assert {(one.version, one.variant) for one in ids} == {(7, "specified in RFC 4122")}
    assert abs((ids[-1].int >> 80) - time.time_ns() // 1_000_000) < 1000
    assert len({uuid7() for _ in range(10_000)}) == 10_000
