"""Where updates are read to, and what becomes of those that break off."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from fedota.runtime import uploads
from fedota.runtime.places import Memory, Spooled, put, room
from fedota.runtime.protocol import HEADER_SLACK
from fedota.runtime.selector import spool
from fedota.runtime.selector.spool import MOST_UPLOADS, Spool
from fedota.runtime.uploads import Upload, Uploads


@pytest.mark.parametrize(("model", "count"), [(1, MOST_UPLOADS), (4_000_000, 8), (40_000_000, 1), (10**12, 1)])
def test_memory_is_bounded(model: int, count: int, tmp_path: Path) -> None:
    """By 32 MB, or by one update where that is larger."""
    made = Spool(model, tmp_path)
    assert made.count == count
    assert made.count * made.size <= max(32 * 1024**2, made.size)


async def test_who_finds_no_memory_gets_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a moment in which some may become free."""
    made = Spool(40_000_000, tmp_path)
    first = await made.place()
    waiting = asyncio.create_task(made.place())
    await asyncio.sleep(0)
    made.release(first)
    second = await waiting
    assert isinstance(first, Memory) and isinstance(second, Memory) and second.view is first.view
    monkeypatch.setattr(spool, "_PATIENCE", 0.01)
    third = await made.place()
    assert isinstance(third, Spooled) and third.size == 40_000_000 + HEADER_SLACK
    made.release(third)
    made.release(second)
    assert isinstance(await made.place(), Memory)


async def test_who_goes_away_while_it_waits_takes_no_memory(tmp_path: Path) -> None:
    """Else there would be none left some day."""
    made = Spool(40_000_000, tmp_path)
    first = await made.place()
    waiting = asyncio.create_task(made.place())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait({waiting})
    made.release(first)
    assert isinstance(await made.place(), Memory)


async def test_without_memory_an_update_goes_to_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And later ones find it again, once the machine has some."""
    made = Spool(40_000_000, tmp_path)

    def none_left(size: int) -> memoryview:
        if size == made.size:
            raise MemoryError
        return room(size)

    with monkeypatch.context() as patched:
        patched.setattr(spool, "room", none_left)
        file = await made.place()
    assert isinstance(file, Spooled)
    made.release(file)
    assert isinstance(await made.place(), Memory)


async def test_what_broke_off_is_kept_in_a_file(tmp_path: Path) -> None:
    """And its memory is free for another."""
    made = Spool(40_000_000, tmp_path)
    place = await made.place()
    put(place, b"half of it")
    kept = await made.kept(place)
    assert bytes(kept.read(0, 100)) == b"half of it" and await made.kept(kept) is kept
    assert isinstance(await made.place(), Memory)
    put(kept, b", and the rest")
    assert bytes(kept.read(0, 100)) == b"half of it, and the rest"
    kept.close()


def _file(directory: Path, content: bytes) -> Spooled:
    file = Spooled.unlinked(directory, 100)
    put(file, content)
    return file


def test_updates_that_broke_off_are_bounded_and_go_with_their_cohort(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of too many the oldest is dropped."""
    monkeypatch.setattr(uploads, "_MOST_KEPT", 2)
    all_ = Uploads()
    files = {name: _file(tmp_path, name.encode()) for name in ("a", "bb", "ccc")}
    for name, file in files.items():
        all_.keep(name, file)
    assert [all_.received(name) for name in ("a", "bb", "ccc", "d")] == [0, 2, 3, 0]
    assert all_.taken("bb") is files["bb"] and all_.received("bb") == 0
    all_.keep("ccc", _file(tmp_path, b"newer"))
    assert all_.received("ccc") == 5
    all_.keep("empty", Spooled.unlinked(tmp_path, 1))
    assert all_.taken("empty") is None
    all_.close()
    assert all_.received("ccc") == 0
    all_.keep("late", _file(tmp_path, b"too late"))
    assert all_.received("late") == 0


class _Line:
    """A connection that ends when it is told to."""

    def __init__(self) -> None:
        self.upload: Upload | None = None

    def abort(self) -> None:
        """Break off."""
        assert self.upload is not None
        self.upload.ended.set()


def _upload(place: Any = None) -> tuple[Upload, _Line]:
    line = _Line()
    line.upload = upload = Upload(line)
    upload.place = place
    return upload, line


async def test_only_an_upload_that_stalls_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that lives does not, and one that is whole ends by itself."""
    monkeypatch.setattr(uploads, "_MOMENT", 0.05)
    place = Memory(memoryview(bytearray(1000)))
    living, _ = _upload(place)
    asking = asyncio.create_task(living.gives_way())
    await asyncio.sleep(0)
    place.took(1)
    assert not await asking and not living.ended.is_set()
    assert await living.gives_way() and living.ended.is_set(), "nothing came meanwhile"
    whole, _ = _upload(place)
    whole.whole = True
    asking = asyncio.create_task(whole.gives_way())
    await asyncio.sleep(0.1)
    assert not asking.done(), "it is being added: nobody breaks it off"
    whole.ended.set()
    assert await asking


async def test_what_still_comes_for_a_cohort_that_is_over_is_broken_off() -> None:
    """Slow clients of it would take the places of the next one's for hours; what is whole goes its way."""
    all_ = Uploads()
    (slow, _), (whole, _) = _upload(), _upload()
    all_.receiving = {"slow": slow, "whole": whole}
    whole.whole = True
    all_.close()
    assert slow.ended.is_set() and not whole.ended.is_set()
