"""A selector's part in one cohort."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from fedota.errors import FedotaError
from fedota.events.rounds import Contribution
from fedota.runtime.aggregation import Weights
from fedota.runtime.places import whole
from fedota.runtime.protocol import ModelRef, Work
from fedota.runtime.selector.cohort import MOST_REFUSALS, MOST_WORDS, Cohort, SumLostError
from fedota.runtime.selector.pool import Waiting
from fedota.runtime.tensors import Array, Tensor, layout_of
from fedota.runtime.tickets import Ticket

LAYOUT = layout_of(memoryview(safetensors.numpy.save({"w": np.array([1.0, 2.0])})))


def update(*values: float) -> Weights:
    """An update that was checked."""
    return Weights(LAYOUT, whole(memoryview(safetensors.numpy.save({"w": np.array(values)}))))


UPDATE = update(1.0, 2.0)


def cohort(collect: str = "", base: Path | None = None, **plan: Any) -> Cohort:
    """An open one, or one whose sums are collected."""
    work = Work(
        cohort="k",
        round=1,
        attempt=1,
        base=ModelRef(sha256="a", size=1),
        share=2,
        deadline=1.0,
        collect=collect,
        **plan,
    )
    return Cohort(work, LAYOUT, base)


def ticket(id_: str = "t", organization: str = "org", issued: float = 0.0) -> Ticket:
    """A ticket for it."""
    return Ticket(
        id=id_,
        organization=organization,
        client="c",
        round=1,
        attempt=1,
        cohort="k",
        selector="s",
        life="l",
        issued=issued,
    )


async def refused(code: str, one: Cohort, of: Ticket) -> None:
    """The update does not count."""
    before = bytes(one.numbers)
    with pytest.raises(FedotaError) as raised:
        await one.count(of, UPDATE, 1, {})
    assert raised.value.problem.code == code
    assert bytes(one.numbers) == before


async def test_a_ticket_counts_once_whoever_waits_for_the_answer() -> None:
    """Two uploads of the same update may both have been read when the first is added."""
    one = cohort()
    results = await asyncio.gather(*(one.count(ticket(), UPDATE, 3, {}) for _ in range(5)), return_exceptions=True)
    assert [result is None for result in results] == [True, False, False, False, False]
    assert np.frombuffer(one.numbers).tolist() == [3.0, 6.0]
    await refused("already_reported", one, ticket())
    held = one.held()
    (given,) = held.contributions
    assert (held.reported, given.organization, given.updates, given.examples) == (1, "org", 1, 3)


async def test_what_comes_after_the_end_does_not_count() -> None:
    """The sum may be on its way already."""
    one = cohort()
    await one.count(ticket("a", "org a"), UPDATE, 1, {"loss": 1.0})
    one.closed = True
    await refused("round_over", one, ticket("b"))
    meta = one.meta("life", "c-1")
    assert [(each.ticket, each.organization, each.metrics) for each in meta.accepted] == [("a", "org a", {"loss": 1.0})]
    assert cohort("1").closed


def test_only_so_many_refusals_are_kept() -> None:
    """A hostile client makes no report too large."""
    one = cohort()
    for _ in range(MOST_REFUSALS + 10):
        one.refuse("org", FedotaError("update_malformed", "no"))
    held = one.held()
    assert len(held.refusals) == MOST_REFUSALS
    assert held.contributions == [Contribution(organization="org", refusals={"update_malformed": MOST_REFUSALS + 10})]


def test_what_is_told_of_a_refusal_has_bounds() -> None:
    """It may quote what a client sent, and a report that became too large by it would end the training."""
    one = cohort()
    one.refuse("org", FedotaError("update_mismatch", "w" * 90_000))
    assert len(one.held().refusals[0].detail) == MOST_WORDS


async def test_an_unused_ticket_is_given_again() -> None:
    """Until its update has come, or the cohort is closed."""
    one, who = cohort(), Waiting("org", "c")
    one.issued[who] = "signed"
    assert one.unused_ticket(who) == "signed"
    await one.count(ticket(), UPDATE, 1, {})
    assert one.unused_ticket(who) is None
    one.issued[who] = "signed"
    one.closed = True
    assert one.unused_ticket(who) is None


async def test_an_update_weighs_no_more_than_the_plan_allows() -> None:
    """Whatever number of examples its client tells."""
    one = cohort(examples_per_update=5)
    await one.count(ticket("a"), update(1.0, 2.0), 10**9, {})
    await one.count(ticket("b"), update(10.0, 20.0), 3, {})
    assert np.frombuffer(one.numbers).tolist() == [35.0, 70.0]
    assert [accepted.examples for accepted in one.meta("life", "c").accepted] == [5, 3]


async def test_a_step_is_clipped_to_the_plans_norm(tmp_path: Path) -> None:
    """Around the weights that the round begins with; a shorter one is added bit for bit as it is."""
    base = tmp_path / "base"
    base.write_bytes(safetensors.numpy.save({"w": np.array([1.0, 1.0])}))
    one = cohort(base=base, clip_norm=5.0)
    await one.count(ticket("a"), update(1.0 + 30.0, 1.0 + 40.0), 2, {})
    assert np.frombuffer(one.numbers).tolist() == pytest.approx([2 * 4.0, 2 * 5.0], rel=1e-15)
    await one.count(ticket("b"), update(1.1, 1.3), 1, {})
    assert [accepted.clipped for accepted in one.meta("life", "c").accepted] == [True, False]
    plain = cohort()
    await plain.count(ticket("b"), update(1.1, 1.3), 1, {})
    short = cohort(base=base, clip_norm=5.0)
    await short.count(ticket("b"), update(1.1, 1.3), 1, {})
    assert bytes(short.numbers) == bytes(plain.numbers)


async def test_what_is_told_of_an_accepted_update() -> None:
    """Its bytes, and the seconds since its client was selected, as far as that is known."""
    one = cohort()
    await one.count(ticket("a", issued=time.time() - 100), UPDATE, 1, {})
    await one.count(ticket("b", issued=time.time() + 100), UPDATE, 1, {})
    await one.count(ticket("c"), UPDATE, 1, {})
    first, ahead, unknown = one.meta("life", "c").accepted
    assert first.size == LAYOUT.size and 100 <= first.seconds < 110
    assert (ahead.seconds, unknown.seconds) == (0.0, 0.0), "another clock may be ahead of ours"


class _Breaks(Weights):
    """An update whose second half cannot be read again."""

    error: Exception = OSError("Input/output error")

    def pieces(self, tensor: Tensor) -> Iterator[tuple[slice, Array]]:
        """Half of it."""
        ((_, values),) = super().pieces(tensor)
        yield slice(0, 1), values[:1]
        raise self.error


@pytest.mark.parametrize("error", [OSError("Input/output error"), MemoryError()])
async def test_half_an_update_is_in_no_sum(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever broke it off: what is left of such a sum is nothing, also for who waits to hand it over."""
    monkeypatch.setattr(_Breaks, "error", error)
    one = cohort()
    await one.count(ticket("a"), UPDATE, 1, {})
    with pytest.raises(SumLostError):
        await one.count(ticket("b"), _Breaks(LAYOUT, UPDATE.body), 1, {})
    assert (one.accepted, bytes(one.numbers), one.closed) == ({}, b"", True)
    await refused("round_over", one, ticket("c"))


async def test_weights_that_cannot_be_opened_cost_no_sum(tmp_path: Path) -> None:
    """Too many files may be open, say: nothing was added, and it may be sent again."""
    base = tmp_path / "base"
    one = cohort(base=base, clip_norm=5.0)
    base.write_bytes(safetensors.numpy.save({"w": np.array([1.0, 1.0])}))
    await one.count(ticket("a"), UPDATE, 1, {})
    base.rename(tmp_path / "away")
    await refused("unavailable", one, ticket("b"))
    assert list(one.accepted) == ["a"] and not one.closed


async def test_who_was_revoked_while_its_update_waited_does_not_count() -> None:
    """Its turn may come minutes after it was sent."""
    revoked: list[str] = []

    def require(organization: str) -> None:
        if organization in revoked:
            raise FedotaError("token_refused", "Revoked.")

    one = cohort()
    async with one.lock:
        waiting = asyncio.create_task(one.count(ticket(), UPDATE, 1, {}, require))
        await asyncio.sleep(0)
        revoked.append("org")
    with pytest.raises(FedotaError, match="Revoked"):
        await waiting
    assert not one.accepted
