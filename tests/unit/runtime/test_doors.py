"""What becomes of an update that a selector has read."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from aiohttp.test_utils import make_mocked_request

from fedota.contracts.runtime import SelectorSettings
from fedota.errors import FedotaError
from fedota.process import Service
from fedota.runtime.aggregation import WeightedSum
from fedota.runtime.places import put
from fedota.runtime.protocol import ModelRef, Work
from fedota.runtime.selector.app import Doors, _Sent
from fedota.runtime.selector.cohort import Cohort
from fedota.runtime.selector.selecting import Selecting
from fedota.runtime.selector.spool import MOST_UPLOADS, Spool
from fedota.runtime.selector.uploads import Upload
from fedota.runtime.tensors import layout_of
from fedota.runtime.tickets import Ticket

BODY = safetensors.numpy.save({"w": np.array([1.0, 2.0])})
LAYOUT = layout_of(memoryview(BODY))
SETTINGS = SelectorSettings(
    problem_id="p", run=1, name="s", coordinator="http://127.0.0.1:9", token_key="", key="secret"
)
SENT = _Sent(offset=0, length=len(BODY), examples=1, metrics={})


def cohort(name: str) -> Cohort:
    """One that takes updates."""
    base = ModelRef(sha256="a", size=1)
    return Cohort(Work(cohort=name, round=1, attempt=1, base=base, share=1, deadline=1.0), LAYOUT)


def doors_of(selecting: Selecting) -> Doors:
    """What clients find there."""
    return Doors(SETTINGS, selecting, Service("selector"))


async def test_who_holds_its_body_back_waits_for_its_turn(tmp_path: Path) -> None:
    """Whoever sends it anyhow is asked to come again: it would wait in memory."""
    doors = doors_of(Selecting(SETTINGS, tmp_path))
    for _ in range(MOST_UPLOADS):
        await doors._take_turn(make_mocked_request("POST", "/"), cohort("k"))
    with pytest.raises(FedotaError, match="Too many updates"):
        await doors._take_turn(make_mocked_request("POST", "/"), cohort("k"))
    patient = make_mocked_request("POST", "/", headers={"Expect": "100-continue"})
    waiting = asyncio.create_task(doors._take_turn(patient, cohort("k")))
    await asyncio.sleep(0)
    assert not waiting.done()
    doors._turns.release()
    await asyncio.wait_for(waiting, 1)


@pytest.mark.parametrize("over", [False, True])
async def test_a_sum_that_was_lost_is_begun_again_while_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, over: bool
) -> None:
    """But an update of a cohort that is over costs the present one nothing."""
    selecting, spool, present = Selecting(SETTINGS, tmp_path), Spool(LAYOUT.size, tmp_path), cohort("k")
    doors, life = doors_of(selecting), selecting.life
    selecting.cohort, of = present, cohort("before") if over else present
    upload = of.uploads.receiving["t"] = Upload(None)
    upload.place = place = await spool.place()
    put(place, BODY)
    ticket = Ticket(id="t", organization="org", client="c", round=1, attempt=1, cohort=of.id, selector="s", life=life)

    def broken(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(WeightedSum, "add", broken)
    with pytest.raises(FedotaError, match="lost its sum"):
        await doors._count(spool, ticket, of, upload, SENT)
    assert (selecting.cohort is present, selecting.life == life) == (over, over)
