"""Where large bodies lie."""

import errno
import os
from pathlib import Path

import pytest

from fedota.errors import FedotaError
from fedota.runtime.places import PIECE, Memory, Spooled, opened, put, whole

CONTENT = bytes(range(256)) * (3 * PIECE // 256) + b"and a rest"


def test_what_is_put_in_is_read_again(tmp_path: Path) -> None:
    """In memory or in a file, whatever the pieces."""
    scratch = memoryview(bytearray(1000))
    for place in (
        Memory(memoryview(bytearray(len(CONTENT) + 5))),
        Spooled.unlinked(tmp_path, len(CONTENT) + 5, scratch),
        Spooled.at(tmp_path / "file", len(CONTENT) + 5),
    ):
        put(place, CONTENT[:10])
        put(place, CONTENT[10:])
        assert place.received == len(CONTENT) and len(place.room()) == 5
        assert place.read(0, len(CONTENT)) == CONTENT
        assert place.read(PIECE - 1, PIECE + 2) == CONTENT[PIECE - 1 : PIECE + 2]
        assert bytes(place.read(len(CONTENT) - 4, len(CONTENT) + 5)) == b"rest", "no more than was received"


def test_a_file_that_was_begun_is_gone_on_with(tmp_path: Path) -> None:
    """What is in it counts as received."""
    path = tmp_path / "file"
    path.write_bytes(CONTENT[:100])
    place = Spooled.at(path, len(CONTENT))
    assert place.received == 100
    place.copy(memoryview(CONTENT)[100:])
    place.close()
    place.close()
    with opened(path) as again:
        assert (again.received, bytes(again.read(0, again.size))) == (len(CONTENT), CONTENT)


def test_an_unlinked_file_leaves_nothing_behind(tmp_path: Path) -> None:
    """Not even while it is used."""
    place = Spooled.unlinked(tmp_path, 10)
    put(place, b"0123456789")
    assert list(tmp_path.iterdir()) == []
    assert bytes(place.read(3, 5)) == b"34"
    place.close()


def test_a_full_disk_is_an_outage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client is asked to come again; any other error is one."""
    place, error = Spooled.unlinked(tmp_path, 10), errno.ENOSPC

    def full(*_: object) -> int:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(FedotaError) as raised:
        put(place, b"123")
    assert raised.value.problem.code == "unavailable" and raised.value.problem.retry_after
    error = errno.EIO
    with pytest.raises(OSError, match="Input/output error"):
        put(place, b"123")
    assert place.received == 0
    place.close()


def test_a_body_in_memory_is_not_copied() -> None:
    """What is read are the bytes themselves."""
    body = bytearray(b"abc")
    place = whole(memoryview(body))
    read = place.read(0, 3)
    body[0] = ord("x")
    assert bytes(read) == b"xbc" and not place.room()
