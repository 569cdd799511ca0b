"""The log and its checkpoints in one file, for who verifies them without Fedota: docs/audit.md has the format."""

import base64
from collections.abc import Callable, Iterator
from contextlib import aclosing
from typing import Any, Protocol

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedota.audit.chain import Record
from fedota.audit.checkpoints import CheckpointError, raw, verified
from fedota.audit.reading import BEFORE_ALL
from fedota.audit.store import Checkpoints
from fedota.audit.verification import Log

FORMAT = "fedota audit export"
VERSION = 1


class Sink(Protocol):
    """What lines are written to."""

    def write(self, line: bytes, /) -> object:
        """Take one."""


async def export(
    log: Log,
    checkpoints: Checkpoints,
    key: Ed25519PublicKey,
    file: Sink,
    until: int | None,
    progress: Callable[[int, int], None],
) -> int:
    """Write what is stored, be it right or wrong, up to `until`; the last position."""
    newest = await checkpoints.newest()  # before the head: a checkpoint that is made meanwhile may be past that
    head = await log.head()
    end = max(head.position, head.last)
    last = end if until is None else min(until, end)
    header = {
        "format": FORMAT,
        "version": VERSION,
        "public_key": base64.b64encode(raw(key)).decode(),
        "first": 1,
        "last": last,
        "head": {"position": head.position, "hash": head.hash.hex()},
    }
    _write(file, header)
    async with aclosing(log.pages(BEFORE_ALL, last)) as pages:
        async for page in pages:
            for record in page:
                _write(file, {"event": dict(_members(record))})
            progress(page[-1].position, last)
    async for number, content in checkpoints.files(newest):
        if last == end or not _is_later(content, key, last):
            _write(file, {"checkpoint": {"number": number, **_bytes("file", content)}})
    return last


def _members(record: Record) -> Iterator[tuple[str, Any]]:
    for name, value in record._asdict().items():
        match value:
            case bytes() if name == "data":
                yield from _bytes(name, value).items()
            case bytes():
                yield name, value.hex()
            case _:
                yield name, value


def _bytes(name: str, value: bytes) -> dict[str, str]:
    """As text that people can read, where it is text; else in base64."""
    try:
        return {name: value.decode()}
    except UnicodeDecodeError:
        return {f"{name}_base64": base64.b64encode(value).decode()}


def _is_later(content: bytes, key: Ed25519PublicKey, last: int) -> bool:
    """Whether it speaks of events that are not in the file: then it says nothing about it."""
    try:
        return verified(content, key).position > last
    except CheckpointError:
        return False


def _write(file: Sink, line: dict[str, Any]) -> None:
    file.write(msgspec.json.encode(line) + b"\n")
