"""Who gave what, from a selector's account to the report of the attempt and its manifest."""

from typing import Any

import msgspec
import pytest

from fedota.contracts.runtime import REPORT_BYTES
from fedota.events import to_json
from fedota.events.problems import Strategy
from fedota.events.rounds import Contribution, Refusal
from fedota.runtime.contributions import Contributions, counted, merged, of_updates, refused
from fedota.runtime.coordinator import lineage, words
from fedota.runtime.coordinator.state import Aggregated, Handed, Result, Tick
from fedota.runtime.protocol import MOST_METRICS, Accepted
from tests.unit.runtime.test_rounds import BASE, CHECKPOINT, NEXT, Runner, plan, reporting, selecting


def accepted(organization: str, examples: int = 1, **more: Any) -> Accepted:
    """An update that is in a sum."""
    return Accepted(ticket="t", organization=organization, examples=examples, metrics={}, **more)


def gave(organization: str, updates: int = 0, examples: int = 0, **refusals: int) -> Contribution:
    """A contribution."""
    return Contribution(organization=organization, updates=updates, examples=examples, refusals=refusals)


def test_an_account_is_kept_by_organization() -> None:
    """Numbers add up, of the time the longest counts, and refusals are counted by code."""
    account = Contributions()
    account.accept(accepted("b", 5, size=10, seconds=1.23456, clipped=True))
    account.refuse("a", "update_not_finite")
    account.accept(accepted("b", 7, size=20, seconds=0.5))
    for code in ("round_over", "update_not_finite", "round_over"):
        account.refuse("b", code)
    assert account.told == [
        gave("a", update_not_finite=1),
        Contribution(
            organization="b",
            updates=2,
            examples=12,
            size=30,
            seconds=1.235,
            clipped=1,
            refusals={"round_over": 2, "update_not_finite": 1},
        ),
    ]


def test_what_was_told_is_not_changed_by_what_comes_later() -> None:
    """A report that is on its way keeps its numbers."""
    account = Contributions()
    account.refuse("a", "round_over")
    before = account.told
    account.refuse("a", "round_over")
    assert before == [gave("a", round_over=1)]


def test_accounts_are_put_together_and_taken_apart() -> None:
    """Of several selectors; and what was accepted apart from what was refused."""
    one, other = [gave("a", 1, 5), gave("b", round_over=1)], [gave("a", 2, 6, round_over=3)]
    both = merged(one, other)
    assert both == [gave("a", 3, 11, round_over=3), gave("b", round_over=1)]
    assert counted(both) == [gave("a", 3, 11)]
    assert refused(both) == [gave("a", round_over=3), gave("b", round_over=1)]
    assert merged(counted(both), refused(both)) == both
    assert of_updates([accepted("a", 2), accepted("a", 3)]) == [gave("a", 2, 5)]


def ended(runner: Runner) -> list[Contribution]:
    """What was told of the attempt that ended last."""
    return next(one for one in reversed(runner.reports) if one.stage in ("completed", "abandoned")).contributions


def test_an_abandoned_attempt_tells_what_was_given() -> None:
    """What is in the sums that are left, and whatever was refused, wherever it was."""
    runner = reporting(plan(attempts=9))
    runner.told("a", selected=2, reported=1, contributions=[gave("org 1", 1, 7), gave("org 2", round_over=1)])
    runner.told("b", selected=1, reported=1, contributions=[gave("org 1", 1, 9), gave("org 2", round_over=2)])
    runner.told("b", life="b2", selected=0)  # its sum is lost
    for _ in range(6):
        runner.told("a", after=9)
        runner.told("b", life="b2")
    runner.told("a", after=7)
    (abandoned,) = (one for one in runner.reports if one.stage == "abandoned")
    assert (abandoned.reported, abandoned.examples, abandoned.participants) == (1, 7, ["org 1"])
    assert abandoned.contributions == [gave("org 1", 1, 7), gave("org 2", round_over=3)]


def test_an_attempt_without_a_cohort_tells_none() -> None:
    """Nobody was asked for anything."""
    runner = selecting()
    runner.then(Tick(), 601)
    assert ended(runner) == []


def test_a_completed_round_tells_what_is_in_its_checkpoint() -> None:
    """Not what selectors said of sums that have grown since, but the refusals that they tell of late."""
    runner = reporting()
    runner.told("a", selected=2, reported=1, contributions=[gave("org 1", 1, 10)])
    runner.told("a", selected=2, reported=2, contributions=[gave("org 1", 2, 20)])
    runner.told("b", selected=1, reported=1, contributions=[gave("org 2", 1, 10)])
    assert runner.state.cohort is not None
    cohort = runner.state.cohort.id
    runner.then(Handed(life="a", cohort=cohort, reported=2, contributions=[gave("org 1", 2, 20)]))
    runner.told("a", selected=2, reported=1, contributions=[gave("org 1", 1, 10), gave("org 3", update_too_large=1)])
    runner.then(Handed(life="b", cohort=cohort, reported=1, contributions=[gave("org 2", 1, 10)]))
    assert runner.phase() == "aggregating"
    result = Result(
        model=NEXT,
        reported=3,
        examples=30,
        participants=["org 1", "org 2"],
        contributions=[gave("org 1", 2, 20), gave("org 2", 1, 10)],
    )
    runner.then(Aggregated(cohort=cohort, lives=["a", "b"], result=result, checkpoint=CHECKPOINT))
    assert ended(runner) == [gave("org 1", 2, 20), gave("org 2", 1, 10), gave("org 3", update_too_large=1)]


@pytest.mark.parametrize(("count", "name"), [(2001, "{:04}"), (1990, "{:0100}"), (20_000, "{:0100}")])
def test_a_report_of_very_many_organizations_can_be_recorded(count: int, name: str) -> None:
    """It tells of those with the most examples, and how many it leaves out."""
    runner = reporting()
    all_ = [gave(name.format(number), 1, number + 1) for number in range(count)]
    update = msgspec.structs.replace(
        words.report(runner.rules, runner.state, runner.now),
        participants=[one.organization for one in all_],
        refusals=[Refusal(organization="o" * 100, code="update_mismatch", detail="d" * 500)] * words.MOST_REFUSALS,
        metrics={"m" * 90 + str(number): 0.1 for number in range(MOST_METRICS)},
    )
    told = words.telling(update, all_)
    kept, named = len(told.contributions), len(told.participants)
    assert 1000 < kept <= words.MOST_CONTRIBUTIONS and told.contributions == all_[count - kept :]
    assert kept <= named <= count and told.participants == update.participants[count - named :]
    assert f"; contributions of {count - kept} more organizations are not told here" in told.reason
    assert (f"; {count - named} more organizations that gave updates are not named here" in told.reason) == (
        named < count
    )
    assert len(to_json(told)) <= REPORT_BYTES - 15 * 1024
    few = msgspec.structs.replace(update, participants=update.participants[:1000])
    assert words.telling(few, all_[:1000]) == msgspec.structs.replace(few, contributions=all_[:1000])


def test_a_round_of_more_organizations_than_can_be_named_is_recorded() -> None:
    """From its first counts to its end: the rounds service takes every report."""
    count = 4000
    names = [f"{number:0100}" for number in range(count)]
    runner = selecting(plan(goal_count=count))
    runner.recorded = msgspec.structs.replace(runner.recorded, members=dict.fromkeys(names, True))
    runner.told("a", count - 1)
    runner.told("b", 1)
    runner.told("b", selected=1)
    of_a, of_b = [gave(name, 1, 10) for name in names[:-1]], [gave(names[-1], 1, 20)]
    runner.told("a", selected=count - 1, reported=count - 1, contributions=of_a)
    assert runner.phase() == "reporting"
    assert "more organizations that gave updates are not named here" in runner.reports[-1].reason
    runner.told("b", selected=1, reported=1, contributions=of_b)
    assert runner.state.cohort is not None
    cohort = runner.state.cohort.id
    runner.then(Handed(life="a", cohort=cohort, reported=count - 1, contributions=of_a))
    runner.then(Handed(life="b", cohort=cohort, reported=1, contributions=of_b))
    result = Result(
        model=NEXT, reported=count, examples=10 * count + 10, participants=names, contributions=[*of_a, *of_b]
    )
    runner.then(Aggregated(cohort=cohort, lives=["a", "b"], result=result, checkpoint=CHECKPOINT))
    (completed,) = (one for one in runner.reports if one.stage == "completed")
    assert names[-1] in completed.participants and completed.contributions[-1] == of_b[0]
    assert 1000 < len(completed.contributions) < len(completed.participants) < count == completed.reported


def test_a_manifest_says_what_its_checkpoint_was_made_of() -> None:
    """By whom, with which caps, and from which weights."""
    strategy = Strategy(name="fedavgm", parameters={"momentum": 0.9})
    rules = selecting(plan(clients_per_organization=2, strategy=strategy)).rules
    result = Result(model=NEXT, reported=3, examples=30, participants=["org 1"], metrics={"loss": 0.5})
    contributions = [gave("org 1", 3, 30), gave("org 2", round_over=1)]
    written = lineage.manifest(rules, 4, 2, BASE, result, contributions)
    assert msgspec.json.decode(written) == {
        "problem_id": "p",
        "run": 1,
        "round": 4,
        "attempt": 2,
        "sha256": NEXT.sha256,
        "size": NEXT.size,
        "base": {"sha256": BASE.sha256, "size": BASE.size},
        "strategy": {"name": "fedavgm", "parameters": {"momentum": 0.9}},
        "caps": {"clients_per_organization": 2, "examples_per_update": None, "clip_norm": None},
        "updates": 3,
        "examples": 30,
        "participants": ["org 1"],
        "contributions": msgspec.to_builtins(contributions),
        "metrics": {"loss": 0.5},
    }
