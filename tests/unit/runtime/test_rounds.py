"""The round's state machine."""

from collections.abc import Callable
from typing import Any
from uuid import UUID

import msgspec
import pytest

from fedota.events.problems import Plan
from fedota.events.rounds import Checkpoint, Contribution, Refusal, RoundUpdated
from fedota.runtime.coordinator import rounds, words
from fedota.runtime.coordinator.state import (
    Aggregated,
    Awoken,
    Ended,
    Event,
    Handed,
    Recorded,
    Result,
    Revoked,
    Rules,
    Spoiled,
    State,
    Tick,
)
from fedota.runtime.protocol import Claim, Concluded, Held, ModelRef, Told
from services.rounds import domain

BASE = ModelRef(sha256="b" * 64, size=10)
NEXT = ModelRef(sha256="c" * 64, size=10)
CHECKPOINT = Checkpoint(key="problems/p/checkpoints/1/1-c.safetensors", sha256="c" * 64, size=10)
NOW = 1_800_000_000.0  # 08:00:00 UTC


def plan(**changes: Any) -> Plan:
    """Three clients a round, all of them needed."""
    usual: dict[str, Any] = {
        "rounds": 2,
        "goal_count": 3,
        "minimum_fraction": 1.0,
        "selection_timeout": 600.0,
        "report_timeout": 60.0,
        "attempts": 2,
        "selectors": 2,
    }
    return Plan(**{**usual, **changes})


class Runner:
    """A coordinator without its surroundings. Each report is held against the rounds service's own rules."""

    def __init__(self, plan_: Plan, **where: Any) -> None:
        self.rules = Rules(problem_id="p", run=1, plan=plan_, life="c1")
        self.now = NOW
        self.reports: list[RoundUpdated] = []
        run = domain.Run(number=1, plan=plan_, cause=UUID(int=0), correlation=UUID(int=0))
        members = {f"org {number}": True for number in range(1, 4)}
        self.recorded = domain.State(run=run, members=members)
        self.state, reports = rounds.start(self.rules, **{"round": 1, "attempt": 1, "base": BASE, "now": NOW, **where})
        self._record(reports)

    def _record(self, reports: list[RoundUpdated]) -> None:
        for one in reports:
            update = msgspec.structs.replace(one, report=len(self.reports) + 1)
            self.reports += domain.decide(self.recorded, self.reports[-1] if self.reports else None, update)

    def then(self, event: Event, after: float = 0.0) -> State:
        """Something happens, so many seconds later."""
        self.now += after
        self.state, reports = rounds.step(self.rules, self.state, event, self.now)
        self._record(reports)
        return self.state

    def told(
        self, name: str, waiting: int = 0, *, life: str = "", after: float = 0.0, number: int = 0, **held: Any
    ) -> State:
        """A selector says how things stand; with `held`, of its part in the present cohort."""
        part = self.part(**held) if held else None
        return self.then(Told(name=name, life=life or name, number=number, waiting=waiting, held=part), after)

    def part(self, **held: Any) -> Held:
        """A selector's part in the present cohort."""
        cohort = self.state.cohort
        assert cohort is not None
        usual = {
            "cohort": cohort.id,
            "round": self.state.round,
            "attempt": self.state.attempt,
            "deadline": cohort.deadline,
            "shares": cohort.shares,
        }
        return Held(**{**usual, "base": self.state.base.sha256, "share": held.get("selected") or 0, **held})

    def handed(self, life: str, reported: int) -> State:
        """A selector's sum is taken in."""
        assert self.state.cohort is not None
        return self.then(Handed(life=life, cohort=self.state.cohort.id, reported=reported))

    def claim(self, ticket: str, issuer: str, life: str, name: str = "a") -> str:
        """A selector asks for another one's ticket."""
        assert self.state.cohort is not None
        wanted = Claim(life=life, cohort=self.state.cohort.id, ticket=ticket, name=name, issuer=issuer)
        answer = rounds.claim(self.state, wanted, self.now).answer
        self.then(wanted)
        return answer

    def aggregated(self, reported: int = 3) -> State:
        """The sums come to a checkpoint."""
        participants = [f"org {number}" for number in range(reported)]
        members = dict.fromkeys(participants, True)
        self.recorded = msgspec.structs.replace(self.recorded, members=members)
        result = Result(model=NEXT, reported=reported, examples=30, participants=participants, metrics={"loss": 0.5})
        assert self.state.cohort is not None
        cohort = self.state.cohort
        lives = [life for life, member in cohort.members.items() if member.handed]
        return self.then(Aggregated(cohort=cohort.id, lives=lives, result=result, checkpoint=CHECKPOINT))

    def phase(self) -> str:
        """Where the round is."""
        return self.state.phase

    @property
    def stages(self) -> list[str]:
        """The stages that were reported."""
        return [f"{one.round}.{one.attempt} {one.stage}" for one in self.reports]

    @property
    def said(self) -> str:
        """The reason in the last report."""
        return self.reports[-1].reason


def selecting(plan_: Plan | None = None) -> Runner:
    """Both selectors are here, nobody waits."""
    runner = Runner(plan_ or plan())
    runner.told("a")
    runner.told("b")
    assert runner.phase() == "selection"
    return runner


def reporting(plan_: Plan | None = None) -> Runner:
    """Two clients of selector `a` and one of `b` are selected."""
    runner = selecting(plan_)
    runner.told("a", 2)
    runner.told("b", 1)
    runner.told("a", selected=2)
    runner.told("b", selected=1)
    assert runner.phase() == "reporting"
    return runner


def collecting(plan_: Plan | None = None) -> Runner:
    """All have reported."""
    runner = reporting(plan_)
    runner.told("a", selected=2, reported=2)
    runner.told("b", selected=1, reported=1)
    assert runner.phase() == "collecting"
    return runner


def test_a_round_from_selection_to_its_checkpoint() -> None:
    """Each stage is reported once, in order, and the next round's selection follows."""
    runner = collecting()
    assert runner.handed("a", 2).phase == "collecting"
    assert runner.handed("b", 1).phase == "aggregating"
    runner.aggregated()
    assert runner.stages == [
        "1.1 selection",
        "1.1 selection",
        "1.1 configuration",
        "1.1 reporting",
        "1.1 completed",
        "2.1 selection",
    ]
    completed = runner.reports[4]
    assert (completed.reported, completed.examples, completed.metrics) == (3, 30, {"loss": 0.5})
    assert (completed.checkpoint, completed.final) == (CHECKPOINT, False)
    assert (runner.state.base, runner.state.cohort) == (NEXT, None)
    assert runner.state.unrecorded == [CHECKPOINT.key], "the next selection has begun before it is stored"
    runner.then(Recorded(key=CHECKPOINT.key))
    assert (runner.state.unrecorded, runner.phase()) == ([], "selection")


def test_the_last_round_is_final() -> None:
    """After it the coordinator only answers that the training is finished."""
    runner = collecting(plan(rounds=1))
    runner.handed("a", 2)
    runner.handed("b", 1)
    runner.aggregated()
    assert (runner.reports[-1].stage, runner.reports[-1].final) == ("completed", True)
    assert runner.said.endswith("the training is finished")
    assert runner.phase() == "finished"
    assert rounds.orders(runner.rules, runner.state, "a", "a").finished == "The training is finished."
    runner.told("a", 5, after=1000)
    assert runner.reports[-1].final


def test_reasons_say_what_is_waited_for() -> None:
    """In plain words, with numbers and a time."""
    runner = Runner(plan(over_selection=1.5))
    assert runner.said == "0 of 2 selectors are here; waits for the others until 08:00:05 UTC"
    runner.told("a")
    runner.told("b", 2)
    assert words.reason(runner.rules, runner.state) == "2 of 5 clients are here; waits for 3 more until 08:10:00 UTC"
    runner.told("a", 3)
    assert runner.said == "5 clients are being selected and told what to do"
    runner.told("b", selected=2)
    runner.told("a", selected=3)
    assert runner.said == "0 of 3 clients have reported; waits for 3 more until 08:01:00 UTC"
    runner.told("b", selected=2, reported=1)
    assert words.reason(runner.rules, runner.state).startswith("1 of 3 clients have reported; waits for 2 more")
    runner.told("a", selected=3, reported=2)
    assert (
        words.reason(runner.rules, runner.state) == "3 of 3 clients have reported; their selectors hand the sums over"
    )


@pytest.mark.parametrize(
    ("changes", "waiting", "phase", "selected"),
    [
        ({}, 2, "selection", 0),
        ({}, 3, "configuration", 3),
        ({}, 7, "configuration", 3),
        ({"over_selection": 1.3}, 3, "selection", 0),
        ({"over_selection": 1.3}, 4, "configuration", 4),
        ({"goal_count": 1}, 1, "configuration", 1),
    ],
)
def test_selection_waits_for_the_goal_count_and_more(
    changes: dict[str, Any], waiting: int, phase: str, selected: int
) -> None:
    """Goal count × over-selection clients are selected, no sooner and no more."""
    runner = selecting(plan(**changes))
    state = runner.told("a", waiting)
    assert state.phase == phase
    assert sum(member.share for member in state.cohort.members.values()) == selected if state.cohort else not selected


@pytest.mark.parametrize(
    ("fraction", "waiting", "phase", "said"),
    [
        (1.0, 2, "selection", "abandoned: 2 of 3 clients came within 600 seconds, at least 3 were needed"),
        (0.5, 2, "configuration", "2 clients are being selected and told what to do"),
        (0.5, 1, "selection", "abandoned: 1 of 3 clients came within 600 seconds, at least 2 were needed"),
        (0.1, 0, "selection", "abandoned: 0 of 3 clients came within 600 seconds, at least 1 were needed"),
    ],
)
def test_selection_times_out(fraction: float, waiting: int, phase: str, said: str) -> None:
    """With the minimum count the round is run, with fewer the attempt is abandoned."""
    runner = selecting(plan(minimum_fraction=fraction))
    for _ in range(60):
        runner.told("a", waiting, after=9.9)
        runner.told("b")
    assert runner.phase() == "selection" and runner.state.attempt == 1
    runner.told("a", waiting, after=6)
    assert runner.phase() == phase
    assert said in [one.reason for one in runner.reports]


@pytest.mark.parametrize(
    ("changes", "reported", "outcome"),
    [
        ({}, 2, "abandoned"),
        ({"minimum_fraction": 0.6}, 2, "collecting"),
        ({"minimum_fraction": 0.6}, 1, "abandoned"),
        ({"minimum_fraction": 0.3}, 1, "collecting"),
    ],
)
def test_reporting_times_out(changes: dict[str, Any], reported: int, outcome: str) -> None:
    """At the report timeout the minimum count decides."""
    runner = reporting(plan(**changes))
    runner.told("a", selected=2, reported=reported)
    for _ in range(6):
        runner.told("a", selected=2, reported=reported, after=9.9)
        runner.told("b", selected=1)
    assert runner.phase() == "reporting"
    runner.then(Tick(), 0.6)
    if outcome == "abandoned":
        abandoned = runner.reports[-2]
        assert (abandoned.stage, abandoned.reported) == ("abandoned", reported)
        needed = plan(**changes).minimum_count
        assert abandoned.reason == (
            f"abandoned: {reported} of 3 reported within 60 seconds, at least {needed} were needed"
        )
        assert (runner.phase(), runner.state.attempt) == ("selection", 2)
    else:
        assert runner.phase() == "collecting"


def test_when_all_selected_have_reported_nobody_is_waited_for() -> None:
    """Fewer than the goal were there at the selection timeout: more will not come."""
    runner = selecting(plan(minimum_fraction=0.5))
    runner.told("a", 2)
    for _ in range(61):
        runner.told("a", 2, after=9.9)
        runner.told("b")
    runner.told("a", selected=2)
    assert runner.phase() == "reporting"
    runner.told("a", selected=2, reported=2)
    assert runner.phase() == "collecting"


def test_a_training_that_is_too_far_ahead_waits() -> None:
    """Of what could be stored and recorded; it says so, and goes on as soon as there is room."""
    runner = collecting(plan(rounds=99))
    keys = [f"problems/p/checkpoints/1/{number}.safetensors" for number in range(rounds.MOST_AHEAD - 1)]
    runner.state = msgspec.structs.replace(runner.state, unrecorded=keys)
    runner.handed("a", 2)
    runner.handed("b", 1)
    assert runner.aggregated().phase == "ahead"
    assert runner.said == "16 rounds are not recorded yet; the next one waits until there are fewer"
    assert (runner.reports[-1].round, runner.reports[-1].stage) == (2, "selection")
    work = rounds.orders(runner.rules, runner.state, "a", "a")
    assert (work.work, work.model) == (None, NEXT)
    runner.told("a", 9, after=10)
    assert (runner.phase(), runner.state.unrecorded) == ("ahead", [*keys, CHECKPOINT.key])
    runner.then(Recorded(key=keys[0]))
    runner.then(Recorded(key=keys[0]))
    assert runner.phase() == "configuration", "clients were here already"
    assert len(runner.state.unrecorded) == rounds.MOST_AHEAD - 1


def test_a_coordinator_that_begins_again_remembers_how_far_ahead_it_is() -> None:
    """And what became of the cohort before."""
    keys = [f"problems/p/checkpoints/1/{number}.safetensors" for number in range(rounds.MOST_AHEAD)]
    runner = Runner(plan(), unrecorded=keys, ended=Ended(cohort="c0-1-1", counted=["a"]))
    runner.told("a", 3)
    runner.told("b")
    assert runner.phase() == "ahead"
    last = [rounds.orders(runner.rules, runner.state, name, name).last for name in ("a", "b")]
    assert last == [Concluded(cohort="c0-1-1", counted=True), Concluded(cohort="c0-1-1", counted=False)]
    runner.then(Recorded(key=keys[-1]))
    assert runner.phase() == "configuration"


def test_what_comes_late_says_nothing() -> None:
    """A selector's older message, and whatever its earlier life said."""
    runner = reporting()
    runner.told("a", selected=2, reported=2, number=7)
    runner.told("a", selected=2, reported=1, number=6)
    assert runner.state.cohort is not None and runner.state.cohort.reported == 2
    runner.told("a", life="a2", selected=0)
    before = runner.state
    runner.told("a", 5, life="a", selected=2, reported=2, number=8)
    assert runner.state == before
    assert not rounds.orders(runner.rules, runner.state, "a", "a2").lost


def test_a_life_that_was_taken_for_an_earlier_one_begins_again() -> None:
    """The first message of the life before it came after its own; else nobody would listen to it ever again."""
    runner = selecting()
    runner.told("a", 3, life="a2")
    runner.told("a", life="a1")
    runner.told("a", 3, life="a2")
    assert runner.state.waiting == 0
    assert not rounds.orders(runner.rules, runner.state, "a", "a2").lost, "the other one may live"
    runner.told("a", 3, life="a2", after=rounds.LEASE)
    assert rounds.orders(runner.rules, runner.state, "a", "a2").lost
    runner.told("a", 3, life="a3")
    assert runner.state.waiting == 3
    assert not rounds.orders(runner.rules, runner.state, "a", "a3").lost


def test_of_two_processes_of_one_name_the_newer_stays() -> None:
    """They do not throw each other out for ever, each time with a new life."""
    runner = selecting()
    for _ in range(5):
        runner.told("a", 1, life="a1")
        runner.told("a", 2, life="a2")
        assert not rounds.orders(runner.rules, runner.state, "a", "a1").lost
        assert not rounds.orders(runner.rules, runner.state, "a", "a2").lost
    assert runner.state.waiting == 2 and runner.state.past == {"a", "a1"}


def test_a_selector_that_dies_again_and_again_does_not_take_all_attempts_at_once() -> None:
    """The first attempt is followed at once: mostly that was all. After others it is waited, ever longer."""
    runner = selecting(plan(attempts=5, report_timeout=600.0))
    spent, life = [], 0
    while runner.phase() != "finished":
        began = runner.now
        while runner.phase() == "selection":
            runner.told("b", 1, after=1)
            runner.told("a", 2, life=f"a{life}")
        runner.told("b", selected=1, begun=1)
        runner.told("a", selected=2, begun=0, life=f"a{life}", after=0.1)
        life += 1
        runner.told("a", life=f"a{life}")
        spent.append(round(runner.now - began))
        assert "a was lost" in runner.reports[-1].reason or "a was lost" in runner.reports[-2].reason
    assert spent == [1, 1, 14, 46, 194]
    rested = [one.reason for one in runner.reports if "nobody is selected before" in one.reason]
    assert len(rested) == 3 and all("as selectors were lost again" in one for one in rested)


def test_sums_that_are_asked_for_again_are_asked_for_by_another_name() -> None:
    """Even within the same moment: a selector hands over once for each name."""
    runner = collecting()
    assert runner.state.cohort is not None
    first = rounds.collection(runner.rules, runner.state.cohort)
    runner.handed("b", 1)
    runner.told("a", life="a2")
    runner.claim("t1", issuer="a", life="b")
    runner.claim("t2", issuer="a", life="b")
    runner.told("b", selected=1, reported=3, claimed={"t1": "a", "t2": "a"})
    assert runner.phase() == "collecting"
    assert rounds.collection(runner.rules, runner.state.cohort) != first


def test_the_last_attempt_is_final() -> None:
    """Then the training ends, and clients are told why."""
    runner = selecting()
    runner.then(Tick(), 601)
    assert (runner.phase(), runner.state.attempt) == ("selection", 2)
    runner.then(Tick(), 600)
    assert runner.phase() == "finished"
    last = runner.reports[-1]
    assert (last.stage, last.attempt, last.final) == ("abandoned", 2, True)
    assert last.reason == (
        "abandoned: 0 of 3 clients came within 600 seconds, at least 3 were needed; "
        "that was the last of 2 attempts, the training ends here"
    )
    assert runner.state.finished == (
        "The training ended in round 1: 0 of 3 clients came within 600 seconds, at least 3 were needed."
    )


def test_too_few_to_configure() -> None:
    """Clients that went away between selection and configuration are missing at once, not at the timeout."""
    runner = selecting()
    runner.told("a", 3)
    runner.told("a", selected=1)
    assert runner.reports[-2].reason == ("abandoned: only 1 of 3 clients could be configured, at least 3 were needed")


def test_orders_follow_the_round() -> None:
    """What a selector is told at each stage."""
    runner = selecting()

    def orders(life: str = "a") -> Any:
        return rounds.orders(runner.rules, runner.state, "a", life)

    assert (orders().work, orders().settling, orders().model) == (None, False, BASE)
    runner.told("a", 2)
    runner.told("b", 1)
    work = orders().work
    assert (work.share, work.collect, work.base, work.deadline) == (2, "", BASE, NOW + 60)
    assert (orders("b").work.share, orders("stranger").work.share) == (1, 0)
    runner.told("a", selected=2)
    runner.told("b", selected=1)
    runner.told("a", selected=2, reported=2)
    runner.told("b", selected=1, reported=1)
    assert orders().work.collect
    runner.handed("a", 2)
    runner.handed("b", 1)
    assert orders().work.collect, "until the checkpoint is computed, the sum is kept"
    runner.aggregated()
    assert (orders().work, orders().model) == (None, NEXT)
    assert (orders().last.counted, orders("stranger").last.counted) == (True, False)


def test_a_selector_that_comes_again_has_lost_its_sum() -> None:
    """Its updates do not count, and its clients may send them to it again."""
    runner = reporting()
    runner.told("a", selected=2, reported=2)
    assert runner.claim("t1", issuer="a", life="b") == "wait", "it may still be there"
    runner.told("a", life="a2")
    state = runner.told("a", life="a2", selected=0, share=0)
    assert state.cohort is not None and (state.cohort.reported, state.cohort.selected) == (0, 3)
    assert rounds.orders(runner.rules, state, "a", "a").work is None
    assert runner.claim("t1", issuer="a", life="a2") == "granted"
    assert runner.claim("t1", issuer="a", life="b", name="a") == "taken"
    assert runner.claim("t2", issuer="a", life="b", name="a") == "granted"
    runner.told("a", life="a2", selected=0, reported=1, claimed={"t1": "a"})
    runner.told("b", selected=1, reported=2, claimed={"t2": "a"})
    assert runner.phase() == "collecting"


def test_a_selector_that_is_silent_is_lost() -> None:
    """After the lease its clients may go to another one; when it is heard of again, its sum is not wanted."""
    runner = reporting()
    runner.told("a", selected=2, reported=1)
    for _ in range(3):
        runner.told("b", selected=1, after=5)
    assert runner.state.cohort is not None and runner.state.cohort.reported == 0
    assert runner.claim("t1", issuer="a", life="b") == "granted"
    runner.told("a", selected=2, reported=2)
    assert runner.state.cohort.reported == 0
    assert rounds.orders(runner.rules, runner.state, "a", "a").work is None


def test_clients_without_a_model_are_not_waited_for_when_their_selector_is_lost() -> None:
    """Nobody trains: with too few left the attempt is over at once, and says whom it lost."""
    runner = reporting()
    runner.told("a", selected=2, begun=0)
    runner.told("a", life="a2")
    abandoned = runner.reports[-2]
    assert (abandoned.stage, abandoned.attempt, abandoned.selected) == ("abandoned", 1, 3)
    assert abandoned.reason == (
        "abandoned: no more than 1 of 3 clients can report; a was lost, and 2 clients of it had not begun, "
        "at least 3 were needed"
    )
    assert (runner.phase(), runner.state.attempt, runner.now) == ("selection", 2, NOW)


def test_those_who_have_the_model_are_waited_for() -> None:
    """They train, and send their updates to another selector; the others come again for the next round."""
    runner = reporting(plan(minimum_fraction=0.6))
    runner.told("b", selected=1, begun=1, reported=1)
    runner.told("a", selected=2, begun=1)
    runner.told("a", life="a2")
    said = words.reason(runner.rules, runner.state)
    assert said == "1 of 3 clients have reported; waits for 1 more until 08:01:00 UTC"
    assert runner.claim("t1", issuer="a", life="b") == "granted"
    assert runner.phase() == "reporting"
    runner.told("b", selected=1, begun=1, reported=2, claimed={"t1": "a"})
    assert runner.phase() == "collecting", "the second client of a had no model"


def test_who_claims_is_waited_for_though_its_selector_was_lost_before_it_told() -> None:
    """As many as showed that they have the model, no more."""
    runner = reporting(plan(minimum_fraction=0.3))
    runner.told("a", selected=2, begun=0)
    runner.told("a", life="a2")
    assert runner.phase() == "reporting"
    assert runner.claim("t1", issuer="a", life="b") == "granted"
    runner.told("b", selected=1, begun=1, reported=1)
    assert runner.phase() == "reporting", "the client that claimed is sending"
    assert runner.claim("t1", issuer="a", life="a2", name="a") == "taken"
    runner.told("b", selected=1, begun=1, reported=2, claimed={"t1": "a"})
    assert runner.phase() == "collecting"


def test_a_selector_lost_before_it_told_whom_it_selected() -> None:
    """Nobody waits for clients of whom nobody has heard."""
    runner = selecting(plan(minimum_fraction=0.3))
    runner.told("a", 2)
    runner.told("b", 1)
    runner.told("b", selected=1, begun=1)
    assert runner.phase() == "configuration"
    runner.told("a", life="a2")
    assert runner.phase() == "reporting"
    runner.told("b", selected=1, begun=1, reported=1)
    assert runner.phase() == "collecting"


def test_too_few_are_left_to_configure() -> None:
    """A selector was lost before the others had selected."""
    runner = selecting()
    runner.told("a", 2)
    runner.told("b", 1)
    runner.told("a", selected=2, begun=0)
    runner.told("a", life="a2")
    assert runner.phase() == "configuration"
    runner.told("b", selected=1)
    assert runner.reports[-2].reason == (
        "abandoned: only 1 of 3 clients could be configured; a was lost, and 2 clients of it had not begun, "
        "at least 3 were needed"
    )


def test_of_an_older_selector_all_that_were_selected_are_waited_for() -> None:
    """It does not tell who has the model."""
    runner = reporting()
    runner.told("a", selected=2)
    runner.told("a", life="a2")
    assert runner.phase() == "reporting" and runner.state.cohort is not None
    assert runner.state.cohort.expected == 3


def test_over_selected_clients_make_up_for_those_who_were_lost() -> None:
    """The goal is reached as ever."""
    runner = selecting(plan(over_selection=1.6))
    runner.told("b", 4)
    runner.told("a", 1)
    runner.told("a", selected=1, begun=0)
    runner.told("b", selected=4, begun=2)
    runner.told("a", life="a2")
    runner.told("b", selected=4, begun=4, reported=2)
    assert runner.phase() == "reporting"
    runner.told("b", selected=4, begun=4, reported=3)
    assert runner.phase() == "collecting"


def test_a_silent_selector_that_is_heard_of_again_tells_how_many_had_begun() -> None:
    """It was cut off from the coordinator, not from its clients."""
    runner = reporting(plan(minimum_fraction=0.3))
    runner.told("a", selected=2, begun=0)
    for _ in range(3):
        runner.told("b", selected=1, begun=1, after=5)
    cohort = runner.state.cohort
    assert cohort is not None and (cohort.lost, cohort.expected) == (frozenset({"a"}), 1)
    runner.told("a", selected=2, begun=2, reported=1)
    cohort = runner.state.cohort
    assert cohort is not None and (cohort.expected, cohort.reported) == (3, 0)
    assert rounds.orders(runner.rules, runner.state, "a", "a").lost


def test_a_selector_that_is_heard_of_within_the_lease_is_not_lost() -> None:
    """Its clients may still get the model."""
    runner = reporting()
    runner.told("a", selected=2, begun=0)
    runner.told("b", selected=1, begun=1, after=10)
    runner.told("a", selected=2, begun=0, after=4)
    runner.told("b", selected=1, begun=1, after=10)
    assert runner.state.cohort is not None and runner.state.cohort.expected == 3


def test_how_many_had_begun_is_known_to_the_next_coordinator() -> None:
    """The selectors that are left tell it; one of them may have heard of the loss, another not."""
    before = reporting(plan(minimum_fraction=0.3))
    untold = before.part(selected=0, share=0)
    before.told("a", selected=2, begun=1)
    before.told("a", life="a2")
    work = rounds.orders(before.rules, before.state, "b", "b").work
    assert work is not None and work.shares == {"a": 1, "b": 1}
    runner = Runner(plan(minimum_fraction=0.3))
    runner.then(Told(name="a", life="a2", waiting=0, held=untold))
    part = before.part(selected=1, begun=1, shares=work.shares)
    runner.then(Told(name="b", life="b", waiting=0, held=part))
    assert runner.phase() == "reporting" and runner.state.cohort is not None
    assert runner.state.cohort.expected == 2
    runner.claim("t1", issuer="a", life="b")
    runner.told("b", selected=1, begun=1, reported=2, claimed={"t1": "a"})
    assert runner.phase() == "collecting"


def test_a_coordinator_that_stood_still_loses_nobody() -> None:
    """Silence says nothing when nobody listened."""
    runner = reporting()
    runner.told("a", selected=2, reported=1)
    runner.then(Awoken(), 30)
    runner.then(Tick(), 1)
    assert runner.state.cohort is not None and runner.state.cohort.reported == 1


def test_a_sum_that_is_lost_while_it_is_collected_opens_the_round_again() -> None:
    """Its clients may send again, up to the report timeout; the others' sums are asked for anew."""
    runner = collecting()
    runner.handed("b", 1)
    assert runner.claim("t1", issuer="a", life="b") == "wait"
    runner.told("a", life="a2")
    assert runner.phase() == "reporting"
    assert runner.said == "1 of 3 clients have reported; waits for 2 more until 08:01:00 UTC"
    work = rounds.orders(runner.rules, runner.state, "b", "b").work
    assert work is not None and not work.collect
    assert runner.claim("t1", issuer="a", life="b") == "granted"
    assert runner.claim("t2", issuer="a", life="b") == "granted"
    runner.told("b", selected=1, reported=3, claimed={"t1": "a", "t2": "a"})
    assert runner.phase() == "collecting"
    runner.told("a", life="a2", selected=0, closed=True)
    assert runner.handed("b", 3).phase == "aggregating"


def test_collecting_ends_without_those_who_do_not_hand_over() -> None:
    """With the minimum count the round completes without them."""
    runner = collecting(plan(minimum_fraction=0.6))
    runner.handed("a", 2)
    assert runner.phase() == "collecting"
    for _ in range(6):
        runner.told("b", selected=1, reported=1, after=10)
        runner.told("a", selected=2, reported=2)
    assert runner.phase() == "aggregating"
    assert runner.state.cohort is not None and runner.state.cohort.reported == 2


def test_a_sum_that_cannot_be_used_is_left_out() -> None:
    """Such as one that repeats an update; too late to send again, the attempt is abandoned."""
    runner = collecting()
    runner.handed("a", 2)
    assert runner.state.cohort is not None
    runner.then(Spoiled(life="b", cohort=runner.state.cohort.id), 61)
    assert runner.reports[-2].reason == "abandoned: 2 of 3 reported within 60 seconds, at least 3 were needed"


def test_a_coordinator_that_was_restarted_takes_the_cohort_up() -> None:
    """Selectors still hold it: nobody is selected again, and the deadline stays."""
    before = reporting()
    before.told("a", selected=2, reported=1)
    assert before.state.cohort is not None
    held = before.part(selected=2, reported=1)
    runner = Runner(plan(), now=NOW + 10)
    runner.now = NOW + 10
    runner.then(Told(name="a", life="a", waiting=9, held=held))
    assert runner.phase() == "settling"
    runner.then(Told(name="b", life="b", waiting=0, held=before.part(selected=1)))
    assert runner.phase() == "reporting"
    assert runner.stages == ["1.1 selection", "1.1 configuration", "1.1 reporting"]
    cohort = runner.state.cohort
    assert cohort is not None
    assert (cohort.id, cohort.selected, cohort.reported) == (before.state.cohort.id, 3, 1)
    assert cohort.deadline == before.state.cohort.deadline


@pytest.mark.parametrize("differs", [{"round": 2}, {"attempt": 2}, {"base": "d" * 64}])
def test_a_cohort_of_something_else_is_not_taken_up(differs: dict[str, Any]) -> None:
    """Only the very same attempt from the very same weights goes on."""
    before = reporting()
    runner = Runner(plan())
    runner.then(Told(name="a", life="a", waiting=0, held=before.part(selected=2, **differs)))
    runner.told("b")
    assert (runner.phase(), runner.state.cohort) == ("selection", None)


def test_selectors_keep_what_they_hold_while_the_coordinator_settles() -> None:
    """After some seconds it goes on without those that do not come."""
    runner = Runner(plan())
    runner.told("a")
    assert rounds.orders(runner.rules, runner.state, "a", "a").settling
    assert rounds.wakes(runner.state) == NOW + rounds.SETTLING
    runner.then(Tick(), rounds.SETTLING)
    assert not rounds.orders(runner.rules, runner.state, "a", "a").settling


def test_a_killed_coordinator_had_given_an_issuer_up() -> None:
    """Whose tickets were accepted elsewhere is known again: it was cut off and comes back with a sum of its own."""
    before = reporting()
    runner = Runner(plan())
    runner.then(Told(name="a", life="a", waiting=0, held=before.part(selected=2, reported=2)))
    claimed = {"t1": "a", "t2": "a"}
    held = before.part(selected=1, reported=2, claimed=claimed)
    state = runner.then(Told(name="b", life="b", waiting=0, held=held))
    assert state.cohort is not None and (state.cohort.reported, state.cohort.lost) == (2, frozenset({"a"}))
    assert rounds.orders(runner.rules, state, "a", "a").lost


def test_whoever_gave_out_a_ticket_that_is_granted_to_another_counts_no_more() -> None:
    """From the grant on, before its holder has told of the update: a coordinator that begins never met the issuer."""
    before = reporting()
    runner = Runner(plan())
    held = before.part(selected=1, reported=1)
    for _ in range(3):
        assert not runner.state.cohort or runner.claim("t1", issuer="a", life="b") == "wait", "it may only be late"
        runner.then(Told(name="b", life="b", waiting=0, held=held), rounds.SETTLING)
    assert runner.claim("t1", issuer="a", life="b") == "granted"
    runner.then(Told(name="a", life="a", waiting=0, held=before.part(selected=2, reported=2)))
    state = runner.handed("a", 2)
    assert state.cohort is not None and (runner.phase(), state.cohort.reported) == ("reporting", 1)
    there = rounds.orders(runner.rules, state, "a", "a")
    assert there.lost and there.work is None
    assert runner.claim("t2", issuer="b", life="a", name="b") == "over", "nor does it get what others gave out"


def test_two_sums_with_one_claimed_ticket_are_never_both_taken() -> None:
    """A coordinator that was restarted sees what one before it had granted twice over."""
    before = reporting()
    runner = Runner(plan())
    runner.then(Told(name="a", life="a", waiting=0, held=before.part(selected=2, reported=1, claimed={"t": "c"})))
    runner.then(Told(name="b", life="b", waiting=0, held=before.part(selected=1, reported=1, claimed={"t": "c"})))
    assert runner.state.cohort is not None
    assert runner.state.cohort.reported == 1


def test_a_cohort_is_taken_up_though_a_selector_was_lost_with_the_coordinator() -> None:
    """Nobody knows any more how many clients it had selected; they may still send their updates to another one."""
    before = reporting()
    runner = Runner(plan())
    runner.told("a", life="a2")
    runner.then(Told(name="b", life="b", waiting=0, held=before.part(selected=1, reported=1)))
    assert runner.phase() == "reporting"
    assert [runner.claim(ticket, issuer="a", life="b") for ticket in ("t1", "t2")] == ["granted", "granted"]
    runner.told("b", selected=1, reported=3, claimed={"t1": "a", "t2": "a"})
    assert runner.phase() == "collecting"


def test_a_selector_that_had_not_begun_does_its_part_after_a_restart() -> None:
    """It did not know yet, or had no model yet: nobody else has its clients."""
    before = selecting()
    before.told("a", 2)
    before.told("b", 1)
    runner = Runner(plan())
    runner.then(Told(name="a", life="a", waiting=0, held=before.part(selected=2, reported=2)))
    runner.told("b", 1)
    assert runner.phase() == "configuration"
    work = rounds.orders(runner.rules, runner.state, "b", "b").work
    assert work is not None and (work.share, work.shares) == (1, {"a": 2, "b": 1})
    runner.then(Told(name="b", life="b", waiting=0, held=before.part(selected=1)))
    assert runner.phase() == "reporting"
    runner.then(Told(name="b", life="b", waiting=0, held=before.part(selected=1, reported=1)))
    assert runner.phase() == "collecting"


def test_under_a_cap_nobody_is_selected_after_a_restart() -> None:
    """Of which organizations the others' clients are is not known: the attempt ends at once where that is too few."""
    capped = plan(clients_per_organization=1)
    before = Runner(capped)
    before.then(Told(name="a", life="a", waiting=2, organizations={"org 1": 1, "org 2": 1}))
    before.then(Told(name="b", life="b", waiting=1, organizations={"org 3": 1}))
    runner = Runner(capped)
    runner.then(Told(name="a", life="a", waiting=0, held=before.part(selected=2)))
    runner.told("b", 1)
    assert "abandoned: only 2 of 3 clients could be configured" in runner.reports[-2].reason
    assert (runner.phase(), runner.state.attempt) == ("selection", 2)


def test_refusals_and_organizations_are_reported() -> None:
    """Those of all selectors, while they are heard of."""
    runner = reporting()
    refusal = Refusal(organization="org 1", code="update_malformed", detail="no")
    of_a = [
        Contribution(organization="org 1", refusals={"update_malformed": 1}),
        Contribution(organization="org 2", updates=1, examples=5),
    ]
    of_b = [Contribution(organization=name, updates=1, examples=3) for name in ("org 1", "org 2")]
    runner.told("a", selected=2, reported=1, contributions=of_a, refusals=[refusal])
    runner.told("b", selected=1, reported=2, contributions=of_b)
    report = words.report(runner.rules, runner.state, runner.now)
    assert (report.participants, report.examples, report.refusals) == (["org 1", "org 2"], 11, [refusal])


def test_selectors_hear_who_was_revoked() -> None:
    """And when somebody takes part again."""
    runner = selecting()
    runner.then(Revoked(organizations=["org 1"]))
    assert rounds.orders(runner.rules, runner.state, "a", "a").revoked == ["org 1"]
    runner.then(Revoked(organizations=[]))
    assert rounds.orders(runner.rules, runner.state, "a", "a").revoked == []


def test_a_finished_run_is_only_told_of() -> None:
    """Nothing is reported any more."""
    state = rounds.over(round=3, attempt=1, base=BASE, now=NOW)
    rules = Rules(problem_id="p", run=1, plan=plan(), life="c2")
    state, reports = rounds.step(rules, state, Told(name="a", life="a", waiting=9), NOW + 1)
    assert (reports, state.phase) == ([], "finished")
    assert rounds.orders(rules, state, "a", "a").finished


@pytest.mark.parametrize(
    "event",
    [
        lambda: Handed(life="a", cohort="another", reported=2),
        lambda: Spoiled(life="a", cohort="another"),
        lambda: Recorded(key=CHECKPOINT.key),
        lambda: Aggregated(
            cohort="another",
            lives=["a"],
            result=Result(model=NEXT, reported=3, examples=3, participants=[]),
            checkpoint=CHECKPOINT,
        ),
    ],
)
def test_what_comes_at_the_wrong_time_changes_nothing(event: Callable[[], Event]) -> None:
    """Such as the end of work on a cohort that is over."""
    runner = reporting()
    before = runner.state
    assert runner.then(event()) == before


def test_a_round_that_waits_for_the_store_says_so() -> None:
    """In a report that may come before the one that it is completed, as often as there is something new."""
    runner = collecting()
    runner.handed("a", 2)
    runner.handed("b", 1)
    before = runner.reports[-1]
    runner.aggregated()
    completed = next(one for one in runner.reports if one.stage == "completed")
    first = words.unstored(completed, 1, "the store is down")
    assert first.reason == "3 of 3 clients have reported; the checkpoint is being stored: the store is down"
    second = words.unstored(completed, 3, "the store is full")
    assert second.reason.endswith("is being stored: the store is full; 2 rounds are waiting behind it")
    third = words.unstored(completed, 1, "no\0t\x1b[31m" + "x" * 9999)
    assert third.reason.endswith(": no t [31m" + "x" * 491) and third.reason.isprintable()
    for number, update in enumerate((first, second, third), before.report + 1):
        numbered = msgspec.structs.replace(update, report=number)
        assert domain.decide(runner.recorded, before, numbered) == [numbered]
        before = numbered
