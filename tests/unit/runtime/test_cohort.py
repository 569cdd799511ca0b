"""A selector's part in one cohort."""

import asyncio

import numpy as np
import pytest
import safetensors.numpy

from fedota.errors import FedotaError
from fedota.runtime.protocol import ModelRef, Work
from fedota.runtime.selector.cohort import MOST_REFUSALS, Cohort
from fedota.runtime.selector.pool import Waiting
from fedota.runtime.tensors import layout_of
from fedota.runtime.tickets import Ticket

UPDATE = {"w": np.array([1.0, 2.0])}


def cohort(collect: str = "") -> Cohort:
    """An open one, or one whose sums are collected."""
    work = Work(
        cohort="k",
        round=1,
        attempt=1,
        base=ModelRef(sha256="a", size=1),
        share=2,
        deadline=1.0,
        collect=collect,
    )
    return Cohort(work, layout_of(memoryview(safetensors.numpy.save(UPDATE))))


def ticket(id_: str = "t", organization: str = "org") -> Ticket:
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
    assert (held.reported, held.examples, held.organizations) == (1, 3, ["org"])


async def test_what_comes_after_the_end_does_not_count() -> None:
    """The sum may be on its way already."""
    one = cohort()
    await one.count(ticket("a", "org a"), UPDATE, 1, {"loss": 1.0})
    one.closed = True
    await refused("round_over", one, ticket("b"))
    meta = one.meta("life")
    assert [(each.ticket, each.organization, each.metrics) for each in meta.accepted] == [("a", "org a", {"loss": 1.0})]
    assert cohort("1").closed


def test_only_so_many_refusals_are_kept() -> None:
    """A hostile client makes no report too large."""
    one = cohort()
    for _ in range(MOST_REFUSALS + 10):
        one.refuse("org", FedotaError("update_malformed", "no"))
    assert len(one.held().refusals) == MOST_REFUSALS


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
