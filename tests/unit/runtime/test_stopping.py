"""A run that is stopped from outside, in the coordinator's state and in words."""

import pytest

from fedota.contracts.runtime import Resume
from fedota.runtime.coordinator import rounds, words
from fedota.runtime.coordinator.journal import begin
from fedota.runtime.coordinator.state import Stopped, Tick
from tests.unit.runtime.test_rounds import BASE, NOW, Runner, plan

_STOPPED = Stopped(words="The training was stopped: enough.")


def _up_to(phase: str) -> Runner:
    """A run in this phase."""
    runner = Runner(plan(selectors=1))
    if phase == "settling":
        return runner
    runner.told("a")
    if phase == "selection":
        return runner
    runner.told("a", 3)
    if phase == "configuration":
        return runner
    runner.told("a", 1, selected=3, reported=1)
    if phase == "reporting":
        return runner
    runner.told("a", 1, selected=3, reported=3)
    if phase == "collecting":
        return runner
    runner.handed("a", 3)
    return runner


@pytest.mark.parametrize("phase", ["settling", "selection", "configuration", "reporting", "collecting", "aggregating"])
def test_a_stop_ends_every_phase(phase: str) -> None:
    """Nothing is asked of selectors any more, nothing reported, and what they hold is not part of a checkpoint."""
    runner = _up_to(phase)
    assert runner.phase() == phase
    cohort, reports = runner.state.cohort, len(runner.reports)
    assert runner.then(_STOPPED).cohort is None
    runner.told("a", 3)
    for _ in range(3):
        runner.then(Tick(), after=1000)
    runner.told("a", 3, life="another")
    assert (runner.phase(), len(runner.reports)) == ("finished", reports)
    orders = rounds.orders(runner.rules, runner.state, "a", "another")
    assert (orders.finished, orders.work, orders.settling, orders.lost) == (_STOPPED.words, None, False, False)
    assert (orders.last is None) == (cohort is None)
    assert orders.last is None or not orders.last.counted


def test_a_stop_leaves_what_had_ended() -> None:
    """A client whose update counts in the round before is told so, also after the stop."""
    runner = _up_to("aggregating")
    runner.aggregated()
    runner.then(_STOPPED)
    last = rounds.orders(runner.rules, runner.state, "a", "a").last
    assert last is not None and last.counted


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("", "The training was stopped."),
        (" \n", "The training was stopped."),
        ("Enough.", "The training was stopped: Enough."),
        ("enough", "The training was stopped: enough."),
        ("why not?", "The training was stopped: why not?"),
        ("one\nline\t\x1b[31m", "The training was stopped: one line [31m."),
        ("abandoned: too few; the training ends here", "The training was stopped: too few; the training ends here."),
        ("x" * 2000, f"The training was stopped: {'x' * 500}."),
    ],
)
def test_clients_are_told_in_one_sentence(reason: str, said: str) -> None:
    """Whatever the setter has written, or not."""
    assert words.stopped(reason) == said


@pytest.mark.parametrize(("why", "said"), [(None, words.FINISHED), ("enough", "The training was stopped: enough.")])
def test_a_coordinator_that_begins_after_the_end_says_the_same(why: str | None, said: str) -> None:
    """It was restarted while clients are still told."""
    resume = Resume(report=3, finished=True, stopped=why)
    state, reports = begin(Runner(plan()).rules, resume, None, BASE, NOW)
    assert (state.phase, state.finished, reports) == ("finished", said, [])
