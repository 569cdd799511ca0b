"""What becomes of an update that a selector has read."""

import asyncio
from contextlib import ExitStack
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
from fedota.runtime.protocol import EXAMPLES, HEADER_SLACK, OFFSET, WHOLE, ModelRef, Work
from fedota.runtime.selector import reporting as module
from fedota.runtime.selector.cohort import Cohort
from fedota.runtime.selector.headers import AHEAD, Sent, sent_with
from fedota.runtime.selector.reporting import _MOST_AHEAD, Reporting
from fedota.runtime.selector.selecting import Selecting
from fedota.runtime.selector.spool import MOST_UPLOADS, Spool
from fedota.runtime.tensors import layout_of
from fedota.runtime.tickets import Ticket
from fedota.runtime.uploads import Upload

BODY = safetensors.numpy.save({"w": np.array([1.0, 2.0])})
LAYOUT = layout_of(memoryview(BODY))
SETTINGS = SelectorSettings(
    problem_id="p", run=1, name="s", coordinator="http://127.0.0.1:9", token_key="", key="secret"
)
SENT = Sent(offset=0, length=len(BODY), examples=1, metrics={})


def cohort(name: str) -> Cohort:
    """One that takes updates."""
    base = ModelRef(sha256="a", size=1)
    return Cohort(Work(cohort=name, round=1, attempt=1, base=base, share=1, deadline=1.0), LAYOUT)


COHORT = cohort("k")


def reporting_of(selecting: Selecting) -> Reporting:
    """How it takes updates."""
    return Reporting(selecting, Service("selector"))


PATIENT = {"Expect": "100-continue", "Content-Length": str(10**9)}


def ticket(number: int) -> Ticket:
    """Of an organization of its own."""
    name = f"org {number}"
    return Ticket(id=name, organization=name, client="c", round=1, attempt=1, cohort="k", selector="s", life="l")


LATE = ticket(1000), COHORT


async def crowded(directory: Path) -> Reporting:
    """A selector that has no turn to give."""
    reporting = reporting_of(Selecting(SETTINGS, directory))
    for number in range(MOST_UPLOADS):
        await reporting._take_turn(ticket(number), COHORT)
    return reporting


async def test_only_so_much_waits_in_memory_for_a_turn(tmp_path: Path) -> None:
    """Who sends a large body unasked is asked to come again when many do; who holds it back, or has little, waits."""
    reporting = reporting_of(Selecting(SETTINGS, tmp_path))
    large = make_mocked_request("POST", "/", headers={"Content-Length": str(10**9)})
    with ExitStack() as waiting:
        for number in range(_MOST_AHEAD // AHEAD):
            waiting.enter_context(reporting._counted_ahead(large, ticket(number), COHORT))
        waiting.enter_context(reporting._counted_ahead(make_mocked_request("POST", "/", headers=PATIENT), *LATE))
        with pytest.raises(FedotaError, match="Too many updates"), reporting._counted_ahead(large, *LATE):
            pass
    for _ in range(2):
        with reporting._counted_ahead(large, *LATE):
            pass


async def test_of_one_ticket_only_the_latest_request_waits(tmp_path: Path) -> None:
    """Else a single client would be the whole queue."""
    reporting, waits = reporting_of(Selecting(SETTINGS, tmp_path)), asyncio.Event()

    async def wait() -> None:
        async with reporting._only_one_waiting(ticket(1), COHORT):
            await waits.wait()

    requests = []
    for _ in range(4):
        requests.append(asyncio.create_task(wait()))
        await asyncio.sleep(0)
    older = await asyncio.wait_for(asyncio.gather(*requests[:3], return_exceptions=True), 5)
    assert [error.problem.code for error in older if isinstance(error, FedotaError)] == ["already_reported"] * 3
    assert not requests[3].done()
    waits.set()
    await asyncio.wait_for(requests[3], 5)
    assert not reporting._waiting


async def test_two_requests_that_get_their_turns_at_once_do_not_share_a_place(tmp_path: Path) -> None:
    """Each saw that nothing of the update comes: one of them goes on."""
    reporting, there = reporting_of(Selecting(SETTINGS, tmp_path)), cohort("k")
    request = make_mocked_request("POST", "/")
    upload = reporting._begin(request, ticket(1), there, SENT)
    with pytest.raises(FedotaError, match="already_reported"):
        reporting._begin(request, ticket(1), there, SENT)
    assert there.uploads.receiving == {ticket(1).id: upload}


@pytest.mark.parametrize("limit", ["_QUEUE", "_WAIT"])
async def test_who_waits_long_is_told_to_come_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    """A client would take the selector for dead."""
    monkeypatch.setattr(module, limit, 0.01)
    reporting = await crowded(tmp_path)
    with pytest.raises(FedotaError, match="Too many updates") as raised:
        async with reporting._only_one_waiting(*LATE):
            await reporting._take_turn(*LATE)
    assert raised.value.problem.retry_after


SIZE = LAYOUT.size + HEADER_SLACK
MISFITS = {
    "a rest that is more than is left": ({OFFSET: "60", WHOLE: "100", "Content-Length": "41"}, "invalid_field"),
    "a beginning that is more than all": ({OFFSET: "101", WHOLE: "100"}, "invalid_field"),
    "a whole that is too large": ({OFFSET: "0", WHOLE: str(SIZE + 1), "Content-Length": "1"}, "update_too_large"),
    "a rest that is too large": ({OFFSET: str(SIZE), "Content-Length": "1"}, "update_too_large"),
}


@pytest.mark.parametrize(("headers", "code"), MISFITS.values(), ids=MISFITS)
def test_lengths_that_do_not_fit_are_refused_unread(tmp_path: Path, headers: dict[str, str], code: str) -> None:
    """The body is not asked for."""
    request = make_mocked_request("PATCH", "/", headers={EXAMPLES: "1", **headers})
    with pytest.raises(FedotaError) as raised:
        sent_with(request, Spool(LAYOUT.size, tmp_path).size)
    assert raised.value.problem.code == code


def test_a_rest_may_come_in_pieces(tmp_path: Path) -> None:
    """Or whole, or as long as it comes."""
    for length in ({"Content-Length": "20"}, {"Content-Length": "40"}, {}):
        headers = {EXAMPLES: "1", OFFSET: "60", WHOLE: "100", **length}
        sent = sent_with(make_mocked_request("PATCH", "/", headers=headers), Spool(LAYOUT.size, tmp_path).size)
        assert (sent.offset, sent.length) == (60, 100)


@pytest.mark.parametrize("over", [False, True])
async def test_a_sum_that_was_lost_is_begun_again_while_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, over: bool
) -> None:
    """But an update of a cohort that is over costs the present one nothing."""
    selecting, spool, present = Selecting(SETTINGS, tmp_path), Spool(LAYOUT.size, tmp_path), cohort("k")
    reporting, life = reporting_of(selecting), selecting.life
    selecting.cohort, of = present, cohort("before") if over else present
    upload = of.uploads.receiving["t"] = Upload(None)
    upload.place = place = await spool.place()
    put(place, BODY)
    of_it = Ticket(id="t", organization="org", client="c", round=1, attempt=1, cohort=of.id, selector="s", life=life)
    await reporting._turns.take("org")

    def broken(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(WeightedSum, "add", broken)
    with pytest.raises(FedotaError, match="lost its sum"):
        await reporting._count(spool, of_it, of, upload, SENT)
    assert (selecting.cohort is present, selecting.life == life) == (over, over)
