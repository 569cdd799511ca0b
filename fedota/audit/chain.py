"""The hash chain: what `fedota.append` computes (fedota/kernel/migrations/0001_log.sql), computed again.

Pure, and of the standard library alone. docs/audit.md states the formula for who writes a verifier elsewhere.
"""

import hashlib
from collections.abc import Iterable
from typing import Final, NamedTuple

GENESIS: Final = bytes(32)  # the hash before the first event
_LINES: Final = 11  # fields before the data, each on a line of its own


class Record(NamedTuple):
    """An event as it is stored, in the order of the formula. Ids and time are the text that is hashed."""

    position: int
    id: str
    type: str
    schema: int
    subject: str
    version: int
    time: str  # UTC with six digits of a second: 2026-01-31T12:00:00.000000Z
    actor: str
    correlation: str
    causation: str | None
    traceparent: str | None
    data: bytes
    hash: bytes


def fields(record: Record, position: int | None = None) -> str:
    """What is hashed of a record before its data; `position` in place of its own."""
    own, id_, type_, schema, subject, version, time, actor, correlation, causation, traceparent, _, _ = record
    return (
        f"{own if position is None else position}\n{id_}\n{type_}\n{schema}\n{subject}\n{version}\n{time}\n{actor}\n"
        f"{correlation}\n{causation or ''}\n{traceparent or ''}\n"
    )


def digest(record: Record, before: bytes, position: int | None = None) -> bytes:
    """The hash that the record has behind an event with the hash `before`; `position` in place of its own."""
    return hashlib.sha256(before + fields(record, position).encode() + record.data).digest()


def is_whole(record: Record) -> bool:
    """Whether each field is one line: else bytes could move from one field to the next under the same hash."""
    return fields(record).count("\n") == _LINES


def fits(record: Record, before: bytes) -> bool:
    """Whether the record is what was hashed behind an event with the hash `before`."""
    head = fields(record)
    return head.count("\n") == _LINES and hashlib.sha256(before + head.encode() + record.data).digest() == record.hash


class Chain:
    """Follows events one by one, and stands at the last one that fits."""

    def __init__(self, position: int = 0, hash_: bytes = GENESIS) -> None:
        self.position = position
        self.hash = hash_
        self.before: bytes | None = None  # the hash before that one, if it was seen

    def follow(self, records: Iterable[Record]) -> Record | None:
        """Go on over these; the first one that does not fit, before which it stops."""
        for record in records:
            if record[0] != self.position + 1 or not fits(record, self.hash):
                return record
            self.position, self.before, self.hash = record[0], self.hash, record[12]
        return None
