"""What a selector does with clients and orders, without its network."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from fedota.contracts.runtime import SelectorSettings
from fedota.runtime.protocol import ComeBack, ModelRef, Orders, Selected, Work
from fedota.runtime.selector import selecting as module
from fedota.runtime.selector.pool import Waiting
from fedota.runtime.selector.selecting import Selecting
from fedota.runtime.tensors import Layout, layout_of

BASE = ModelRef(sha256="b" * 64, size=10)
BODY = safetensors.numpy.save({"w": np.array([1.0, 2.0], np.float32)})
A = Waiting("org", "a")


@pytest.fixture
def selecting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Selecting:
    """It has every model that it is asked for."""
    settings = SelectorSettings(
        problem_id="p", run=1, name="selector-0", coordinator="http://127.0.0.1:9", token_key="", key="secret"
    )
    made = Selecting(settings, tmp_path)

    async def have(_: ModelRef) -> Layout:
        return layout_of(memoryview(BODY))

    monkeypatch.setattr(made, "_have", have)
    monkeypatch.setattr(module, "_GATHERING", 0.0)
    (tmp_path / "models").mkdir()
    return made


def orders(one: Selecting, **work: Any) -> Orders:
    """What the coordinator wants of it; nothing when there is no work."""
    usual: dict[str, Any] = {"cohort": "k", "round": 1, "attempt": 1, "base": BASE, "share": 1, "deadline": 2e9}
    return Orders(life=one.life, model=BASE, config={}, work=Work(**{**usual, **work}) if work else None)


async def obeys(one: Selecting, wanted: Orders) -> None:
    """It hears of this, and does it."""
    one._orders = wanted
    await one._obey(wanted)


def selected(one: Selecting) -> int | None:
    """How many clients of its cohort it selected, if it has one."""
    return one.cohort.selected if one.cohort else None


async def waiting(one: Selecting, who: Waiting) -> "asyncio.Task[Any]":
    """Somebody has checked in."""
    before = len(one.pool)
    task = asyncio.create_task(one.check_in(who, None))
    await _until(lambda: len(one.pool) > before)
    return task


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - one turn of the loop
            await asyncio.sleep(0)


async def test_those_for_whom_there_is_no_room_come_back_one_by_one(
    selecting: Selecting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each at a moment of its own."""
    monkeypatch.setattr(module, "MOST_WAITING", 1)
    there = await waiting(selecting, A)
    answers = [await selecting.check_in(Waiting("org", str(number)), None) for number in range(50)]
    seconds = [answer.seconds for answer in answers if isinstance(answer, ComeBack)]
    assert len(seconds) == 50 and min(seconds) >= 1
    assert seconds == sorted(set(seconds))
    selecting.close()
    await there


async def test_a_selector_that_ends_sends_its_clients_away_one_by_one(selecting: Selecting) -> None:
    """All of them would come to the other selectors at the same moment."""
    tasks = [await waiting(selecting, Waiting("org", str(number))) for number in range(20)]
    selecting.close()
    seconds = [answer.seconds for answer in await asyncio.gather(*tasks)]
    assert len(set(seconds)) == 20 and min(seconds) >= 1


async def test_no_cohort_is_selected_for_twice(selecting: Selecting) -> None:
    """A coordinator that forgot it, and takes it up from another selector, asks for what was done already."""
    first = await waiting(selecting, A)
    await obeys(selecting, orders(selecting, share=1))
    assert isinstance(await first, Selected)
    assert selected(selecting) == 1
    await obeys(selecting, orders(selecting))
    assert selected(selecting) is None
    second = await waiting(selecting, A)
    await obeys(selecting, orders(selecting, share=1))
    assert selected(selecting) == 0
    assert not second.done()
    await obeys(selecting, orders(selecting, cohort="another"))
    assert isinstance(await second, Selected)


async def test_a_selector_tells_all_shares_back(selecting: Selecting) -> None:
    """For a coordinator that does not remember them."""
    shares = {selecting.life: 0, "another": 3}
    await obeys(selecting, orders(selecting, share=0, shares=shares))
    assert selecting.cohort is not None
    held = selecting.cohort.held()
    assert (held.shares, held.share, held.selected) == (shares, 0, 0)
