"""A coordinator's total of the selectors' sums."""

import asyncio
import threading
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from fedota.errors import FedotaError
from fedota.runtime.coordinator import collector as module
from fedota.runtime.coordinator.collector import Collector
from fedota.runtime.places import Memory, Spooled, put
from fedota.runtime.protocol import Accepted, Meta
from fedota.runtime.tensors import layout_of

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
    with to.place() as place:
        put(place, numbers(value))
        await to.take(meta(life), place)


@pytest.mark.parametrize("large", [0, 10**9])
async def test_sums_are_merged_wherever_they_were_read_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: int
) -> None:
    """The first becomes the total where it lies; of large ones no second is in memory. Each counts once."""
    monkeypatch.setattr(module, "_LARGE", large)
    collector = Collector(LAYOUT, tmp_path)
    with ExitStack() as stack:
        places = [stack.enter_context(collector.place()) for _ in range(3)]
        kinds = [type(place) for place in places]
        assert kinds == [Memory, *([Memory, Memory] if large else [Spooled, Spooled])]
        for place in places:
            put(place, numbers(1.0))
        for life, place in zip("bac", reversed(places), strict=True):  # not in the order in which they began
            await collector.take(meta(life), place)
    await given(collector, "a", 100.0)
    with pytest.raises(FedotaError, match="conflict"), collector.place() as place:
        put(place, numbers(1.0))
        await collector.take(Meta(cohort="c", life="d", collection="1", accepted=meta("a").accepted), place)
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
    with collector.place() as place:
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

    with collector.place() as place:
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
