"""How a round's clients are spread over selectors, and what caps an organization."""

from collections import Counter
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from fedota.events.problems import Plan
from fedota.runtime.coordinator import rounds, words
from fedota.runtime.coordinator.shares import available, share_out, shares
from fedota.runtime.coordinator.state import Presence, State
from fedota.runtime.protocol import ModelRef, Told
from tests.unit.runtime.test_rounds import NOW, Runner, plan

Waiters = dict[str, dict[str, int]]
WAITERS = st.dictionaries(
    st.sampled_from("abcd"), st.dictionaries(st.sampled_from("wxyz"), st.integers(1, 9), max_size=4), min_size=1
)


def waiting(waiters: Waiters) -> State:
    """Selectors by name, and who waits there, by organization."""
    presences = {
        name: Presence(life=name, heard=NOW, waiting=sum(there.values()), organizations=there)
        for name, there in waiters.items()
    }
    base = ModelRef(sha256="b", size=1)
    return State(round=1, attempt=1, base=base, phase="selection", began=NOW, until=NOW, presences=presences)


@pytest.mark.parametrize(
    ("wanted", "waiting", "shares"),
    [
        (3, {"a": 2, "b": 1}, {"a": 2, "b": 1}),
        (4, {"a": 10, "b": 10}, {"a": 2, "b": 2}),
        (1, {"a": 1, "b": 1}, {"a": 1, "b": 0}),
        (3, {"a": 3, "b": 0}, {"a": 3, "b": 0}),
        (4, {"a": 1, "b": 9}, {"a": 0, "b": 4}),
        (0, {"a": 0}, {"a": 0}),
    ],
)
def test_shares(wanted: int, waiting: dict[str, int], shares: dict[str, int]) -> None:
    """By each selector's part of those that wait."""
    assert share_out(wanted, waiting) == shares


@given(WAITERS, st.integers(1, 5), st.integers(1, 40))
def test_no_organization_is_more_than_its_cap(waiters: Waiters, cap: int, goal: int) -> None:
    """Over all selectors; and as many are selected as the caps leave, up to those that are wanted."""
    state, capped = waiting(waiters), Plan(rounds=1, goal_count=goal, clients_per_organization=cap)
    parts = shares(capped, state)
    total: Counter[str] = Counter()
    for name, (count, quotas) in parts.items():
        total.update(quotas)
        assert count <= sum(quotas.values())
        assert all(0 < quota <= waiters[name][organization] for organization, quota in quotas.items())
    everybody: Counter[str] = Counter()
    for there in waiters.values():
        everybody.update(there)
    assert total == {name: min(cap, count) for name, count in everybody.items()}
    assert available(capped, state) == sum(total.values())
    assert sum(count for count, _ in parts.values()) == min(goal, available(capped, state))


@given(WAITERS, st.integers(1, 40))
def test_without_a_cap_all_who_wait_may_be_selected(waiters: Waiters, goal: int) -> None:
    """And selectors hear of no quota."""
    state, free = waiting(waiters), Plan(rounds=1, goal_count=goal)
    parts = shares(free, state)
    assert available(free, state) == state.waiting
    assert sum(count for count, _ in parts.values()) == min(goal, state.waiting)
    assert not any(quotas for _, quotas in parts.values())


def capped(**changes: Any) -> Runner:
    """A coordinator that takes two clients of an organization; both selectors are here."""
    runner = Runner(plan(clients_per_organization=2, examples_per_update=10, clip_norm=0.5, **changes))
    come(runner, "a")
    come(runner, "b")
    return runner


def come(runner: Runner, name: str, **organizations: int) -> State:
    """So many clients of each organization wait at a selector."""
    waiting = sum(organizations.values())
    return runner.then(Told(name=name, life=name, waiting=waiting, organizations=organizations))


def test_clients_beyond_their_cap_do_not_make_a_round() -> None:
    """It says so, and goes on when somebody else comes."""
    runner = capped()
    assert come(runner, "a", x=4).phase == "selection"
    assert come(runner, "b", x=3).phase == "selection"
    assert words.reason(runner.rules, runner.state) == (
        "2 of 3 clients are here, and 5 more of organizations that may send only 2; waits for 1 more until 08:10:00 UTC"
    )
    assert words.report(runner.rules, runner.state, NOW).waiting == 2
    assert come(runner, "b", x=3, y=1).phase == "configuration"
    work = {name: rounds.orders(runner.rules, runner.state, name, name).work for name in ("a", "b")}
    assert work["a"] is not None and work["b"] is not None
    assert (work["a"].share, work["a"].quotas) == (1, {"x": 1})
    assert (work["b"].share, work["b"].quotas) == (2, {"x": 1, "y": 1})
    assert (work["a"].examples_per_update, work["a"].clip_norm) == (10, 0.5)


def test_an_attempt_for_which_caps_left_too_few() -> None:
    """The reason names those who came for nothing."""
    runner = capped()
    come(runner, "a", x=9)
    for _ in range(60):
        runner.now += 10
        come(runner, "a", x=9)
        come(runner, "b")
    assert runner.reports[-2].reason == (
        "abandoned: 2 of 3 clients came within 600 seconds, and 7 more of organizations that may send only 2,"
        " at least 3 were needed"
    )
