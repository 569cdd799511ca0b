"""A coordinator's total of the selectors' sums."""

import asyncio
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from fedota.errors import FedotaError
from fedota.runtime.coordinator import collector as module
from fedota.runtime.coordinator.collector import Collector
from fedota.runtime.places import Memory, Spooled, put
from fedota.runtime.places import whole as in_memory
from fedota.runtime.protocol import Accepted, Meta
from fedota.runtime.tensors import layout_of
from fedota.runtime.uploads import Upload

LAYOUT = layout_of(memoryview(safetensors.numpy.save({"w": np.zeros(100_000, np.float32)})))


def meta(life: str, examples: int = 2) -> Meta:
    """A sum over one update."""
    one = Accepted(ticket=f"ticket of {life}", organization="org", examples=examples, metrics={})
    return Meta(cohort="c", life=life, collection="1", accepted=[one])


def numbers(value: float) -> bytes:
    """A sum with this value everywhere."""
    return np.full(100_000, value).tobytes()


async def given(to: Collector, life: str, value: float) -> None:
    """A selector hands its sum over."""
    place = to.place()
    put(place, numbers(value))
    await to.take(meta(life), place)


def coming(to: Collector, life: str) -> Memory | Spooled:
    """Where a sum is read to that is on its way from now on."""
    upload = to.parts.receiving[life] = Upload(None)
    upload.place = to.place()
    return upload.place


async def whole(to: Collector, life: str, place: Memory | Spooled) -> None:
    """All of it is there."""
    await to.take(meta(life), place)
    del to.parts.receiving[life]


@pytest.mark.parametrize("large", [0, 10**9])
async def test_sums_are_merged_wherever_they_were_read_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: int
) -> None:
    """The first becomes the total where it lies; of large ones no second is in memory. Each counts once."""
    monkeypatch.setattr(module, "_LARGE", large)
    collector = Collector(LAYOUT, tmp_path)
    places = [coming(collector, life) for life in "abc"]
    assert [type(place) for place in places] == [Memory, *([Memory, Memory] if large else [Spooled, Spooled])]
    for place in places:
        put(place, numbers(1.0))
    for life, place in zip("cba", reversed(places), strict=True):  # not in the order in which they began
        await whole(collector, life, place)
    await given(collector, "a", 100.0)
    again = Meta(cohort="c", life="d", collection="1", accepted=meta("a").accepted)
    with pytest.raises(FedotaError, match="conflict"):
        await collector.take(again, in_memory(memoryview(numbers(1.0))))
    total = await collector.close()
    assert (total.examples, total.count) == (6, 3)
    assert np.frombuffer(total.numbers).tolist() == [3.0] * 100_000
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FedotaError, match="round_over"):
        await given(collector, "late", 1.0)


async def test_a_sum_that_cannot_be_read_again_spoils_the_total(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of it may be in: nothing more is taken, and the coordinator begins anew."""
    monkeypatch.setattr(module, "_LARGE", 0)
    collector = Collector(LAYOUT, tmp_path)
    await given(collector, "a", 1.0)
    place = collector.place()
    put(place, numbers(1.0))
    assert isinstance(place, Spooled)
    place.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        await collector.take(meta("b"), place)
    assert collector.damaged
    with pytest.raises(FedotaError, match="round_over"):
        await given(collector, "c", 1.0)


@pytest.mark.parametrize("error", [OSError, MemoryError])
async def test_a_total_that_holds_half_a_sum_is_never_concluded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """Also not by who waited for its end while that sum was being added."""
    monkeypatch.setattr(module, "_LARGE", 0)
    collector = Collector(LAYOUT, tmp_path)
    await given(collector, "a", 1.0)
    reading, broken = threading.Event(), threading.Event()

    def read(place: Spooled, start: int, stop: int) -> memoryview:
        reading.set()
        broken.wait()
        raise error

    place = collector.place()
    put(place, numbers(1.0))
    monkeypatch.setattr(Spooled, "read", read)
    taking = asyncio.create_task(collector.take(meta("b"), place))
    await asyncio.to_thread(reading.wait)
    closing = asyncio.create_task(collector.close())
    await asyncio.sleep(0)  # it waits for the lock now
    broken.set()
    with pytest.raises(error):
        await taking
    with pytest.raises(RuntimeError, match="as a whole"):
        await closing


@pytest.mark.parametrize("goes_on", [True, False])
async def test_there_is_memory_for_one_large_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, goes_on: bool
) -> None:
    """One that has it and broke off keeps it. Others that are whole meanwhile are taken, and wait for it in files."""
    monkeypatch.setattr(module, "_LARGE", 0)
    collector = Collector(LAYOUT, tmp_path)
    first, second, third = (coming(collector, life) for life in "abc")
    put(first, numbers(1.0)[:1000])
    del collector.parts.receiving["a"]
    await collector.keep("a", first)
    assert isinstance(first, Memory) and collector.parts.received("a") == 1000
    for life, place in (("b", second), ("c", third)):
        put(place, numbers(2.0))
        await whole(collector, life, place)
    assert collector.total is None and set(collector.lives) == {"b", "c"}
    if goes_on:
        upload = collector.parts.receiving["a"] = Upload(None)
        upload.place = collector.parts.taken("a")
        assert upload.place is first
        put(first, numbers(1.0)[1000:])
        await whole(collector, "a", first)
    total = await collector.close()
    assert (total.numbers is first.view) == goes_on
    assert np.frombuffer(total.numbers).tolist() == [5.0 if goes_on else 4.0] * 100_000
    assert (total.count, total.examples) == ((3, 6) if goes_on else (2, 4))
    assert [place._descriptor for place in (second, third) if isinstance(place, Spooled)] == [-1, -1]


async def test_small_sums_that_broke_off_take_no_memory(tmp_path: Path) -> None:
    """There may be many of them."""
    collector = Collector(LAYOUT, tmp_path)
    place = collector.place()
    put(place, numbers(1.0)[:1000])
    await collector.keep("a", place)
    kept = collector.parts.taken("a")
    assert isinstance(kept, Spooled) and bytes(kept.read(0, 1000)) == numbers(1.0)[:1000]
    put(kept, numbers(1.0)[1000:])
    await collector.take(meta("a"), kept)
    assert bytes((await collector.close()).numbers) == numbers(1.0)


async def test_of_a_collection_that_was_given_up_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what broke off, nor what waits, nor what is just being added."""
    monkeypatch.setattr(module, "_LARGE", 0)
    collector = Collector(LAYOUT, tmp_path)
    first, second, third = (coming(collector, life) for life in "abc")
    put(second, numbers(2.0))
    await whole(collector, "b", second)
    await collector.keep("c", third)
    put(first, numbers(1.0))
    adding, go_on = threading.Event(), threading.Event()
    read = Spooled.read

    def slowly(place: Spooled, start: int, stop: int) -> memoryview:
        adding.set()
        go_on.wait()
        return read(place, start, stop)

    monkeypatch.setattr(Spooled, "read", slowly)
    taking = asyncio.create_task(whole(collector, "a", first))
    await asyncio.to_thread(adding.wait)
    collector.give_up()
    go_on.set()
    await taking
    assert not collector.damaged, "what is being read is closed only then"
    late = Spooled.unlinked(tmp_path, 10)
    put(late, b"late")
    await collector.keep("d", late)
    closed = [place for place in (second, third, late) if isinstance(place, Spooled)]
    assert [place._descriptor for place in closed] == [-1, -1, -1]
    with pytest.raises(FedotaError, match="round_over"):
        await given(collector, "e", 1.0)
