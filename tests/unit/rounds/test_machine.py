"""A coordinator that crashes whenever it likes, and one that says anything: the record stays a possible training."""

from itertools import pairwise
from typing import Any, Final

import hypothesis.strategies as st
import msgspec
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fedota.errors import FedotaError
from fedota.events.problems import (
    ModelFile,
    ParticipationApproved,
    ParticipationRevoked,
    Plan,
    ProblemStarted,
    ProblemStopped,
)
from fedota.events.rounds import Checkpoint, RoundUpdated
from services.rounds.domain import State, decide, evolve, resume
from tests.support.events import recorded

ID: Final = "01890a5d-ac96-774b-bcce-b302099a8057"
PLAN: Final = Plan(rounds=3, goal_count=2, minimum_fraction=1.0, attempts=2)
STAGES: Final = ("selection", "configuration", "reporting", "completed", "abandoned")
CLINIC: Final = "Clinic A"


class Training(RuleBasedStateMachine):
    """`reports` is the stream; what is accepted into it must always read as one training after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.state = State()
        self.reports: list[RoundUpdated] = []
        self.run = 0
        self.running = False
        self.next = (1, 1, 1)  # report, round, attempt that an honest coordinator would send now
        self.stage = ""
        self.learn(ParticipationApproved(problem_id=ID, organization=CLINIC))

    def learn(self, data: Any) -> None:
        """An event reaches the read model."""
        self.state = evolve(self.state, recorded(data))

    def judge(self, update: RoundUpdated) -> bool:
        """Whether a report is accepted; then it is recorded."""
        try:
            decide(self.state, self.reports[-1] if self.reports else None, update)
        except FedotaError as error:
            assert error.problem.code == "report_refused" and error.problem.detail
            return False
        self.reports.append(update)
        self.learn(update)
        return True

    def made(self, stage: Any, report: int, round_: int, attempt: int, run: int | None = None) -> RoundUpdated:
        """A report that is right in itself."""
        done = stage == "completed"
        return RoundUpdated(
            problem_id=ID,
            run=self.run if run is None else run,
            report=report,
            round=round_,
            attempt=attempt,
            stage=stage,
            goal_count=2,
            minimum_count=2,
            reported=2 if done else 0,
            participants=[CLINIC] if done else [],
            checkpoint=Checkpoint(key=f"problems/{ID}/checkpoints/{round_}", sha256="b" * 64, size=1) if done else None,
            final=(done and round_ == PLAN.rounds) or (stage == "abandoned" and attempt == PLAN.attempts),
            reason="r",
        )

    @precondition(lambda self: not self.running)
    @rule()
    def start(self) -> None:
        """The setter starts the training, again if it had been stopped."""
        self.run, self.running = self.run + 1, True
        self.next, self.stage = (1, 1, 1), ""
        model = ModelFile(key="k", sha256="a" * 64, size=1)
        self.learn(ProblemStarted(problem_id=ID, run=self.run, plan=PLAN, model=model))

    @precondition(lambda self: self.running)
    @rule()
    def stop(self) -> None:
        """The setter stops it."""
        self.running = False
        self.learn(ProblemStopped(problem_id=ID, run=self.run, reason="enough"))

    @rule()
    def leave_and_return(self) -> None:
        """An organization is revoked and approved again: nothing is undone by it."""
        self.learn(ParticipationRevoked(problem_id=ID, organization=CLINIC, reason="r"))
        self.learn(ParticipationApproved(problem_id=ID, organization=CLINIC))

    @rule(choice=st.integers(0, 9))
    def go_on(self, choice: int) -> None:
        """An honest coordinator's next report is always accepted, until it has nothing left to say."""
        report, round_, attempt = self.next
        ways = {
            "": ("selection",),
            "selection": ("configuration", "configuration", "selection", "abandoned"),
            "configuration": ("reporting", "reporting", "abandoned"),
            "reporting": ("completed", "completed", "reporting", "abandoned"),
        }.get(self.stage, ())
        if not self.running or not ways:
            return
        stage = ways[choice % len(ways)]
        update = self.made(stage, report, round_, attempt)
        assert self.judge(update), update
        self.stage = "final" if update.final else stage
        match self.stage:
            case "completed":
                self.next, self.stage = (report + 1, round_ + 1, 1), ""
            case "abandoned":
                self.next, self.stage = (report + 1, round_, attempt + 1), ""
            case _:
                self.next = (report + 1, round_, attempt)

    @precondition(lambda self: self.run)
    @rule()
    def crash(self) -> None:
        """The coordinator loses its memory and asks where it was: exactly there, with the selection before it."""
        history = [update for update in reversed(self.reports) if update.run == self.run]
        told = resume(self.state, self.run, history)
        assert told.finished == (not self.running or self.stage == "final")
        if not told.finished:
            assert (told.report + 1, told.round, told.attempt) == self.next
            done = [update.checkpoint for update in history if update.stage == "completed"]
            assert told.checkpoint == (done[0] if done else None)
            self.stage = ""

    @rule(
        stage=st.sampled_from(STAGES),
        report=st.integers(0, 9),
        round_=st.integers(0, 4),
        attempt=st.integers(0, 3),
        run=st.integers(0, 3),
    )
    def say_anything(self, stage: Any, report: int, round_: int, attempt: int, run: int) -> None:
        """A coordinator that was taken over: what is accepted of it is judged below, and the honest one is gone."""
        if self.judge(self.made(stage, report, round_, attempt, run)):
            told = resume(self.state, self.run, self.reports[::-1])
            self.next = (told.report + 1, told.round, told.attempt)
            last = self.reports[-1]
            self.stage = "final" if last.final else "" if stage in ("completed", "abandoned") else stage

    @invariant()
    def each_run_reads_as_one_training(self) -> None:
        """Reports, rounds and attempts count without gaps; a round completes once; nothing comes after the end."""
        for run in {update.run for update in self.reports}:
            story = [update for update in self.reports if update.run == run]
            assert [update.report for update in story] == list(range(1, len(story) + 1))
            assert not any(update.final for update in story[:-1])
            done = [update.round for update in story if update.stage == "completed"]
            assert done == list(range(1, len(done) + 1))
            places = [(update.round, update.attempt) for update in story]
            assert places == sorted(places) and places[0] == (1, 1)
            for before, now in pairwise(story):
                ended = before.stage in ("completed", "abandoned")
                assert (places_of(before) != places_of(now)) == ended
                assert now.stage == "selection" or not ended

    @invariant()
    def runs_do_not_mix(self) -> None:
        """No report of an older run stands behind one of a newer."""
        runs = [update.run for update in self.reports]
        assert runs == sorted(runs)


def places_of(update: RoundUpdated) -> tuple[int, int]:
    """Round and attempt."""
    return update.round, update.attempt


def test_the_machine_reaches_the_end() -> None:
    """The honest coordinator of the machine gets to its final report: the rules above are not empty."""
    machine = Training()
    machine.start()
    for _ in range(4 * PLAN.rounds):
        machine.go_on(0)
    assert machine.reports[-1] == msgspec.structs.replace(machine.reports[-1], final=True, round=PLAN.rounds)
    assert len(machine.reports) == 4 * PLAN.rounds


TestTraining = Training.TestCase
TestTraining.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
