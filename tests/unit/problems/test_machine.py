"""Any order of commands and of others' events, against a model that a person can check at a glance."""

from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fedota.contracts import commands
from fedota.contracts.commands import Command
from fedota.errors import FedotaError
from fedota.events import EventData
from fedota.events.orchestrator import InfraFailed
from fedota.events.problems import ModelFile, Plan, ProblemCompleted, ProblemStarted, ProblemStopped
from fedota.events.rounds import Checkpoint, RoundUpdated
from services.problems.domain import State, decide, evolve, react

ID = "01890a5d-ac96-774b-bcce-b302099a8057"
MODEL = ModelFile(key="k/model", sha256="a" * 64, size=10)
ORGANIZATIONS = st.sampled_from(["Clinic A", "Clinic B"])
RUNS = st.integers(1, 3)
STEPS: dict[str, dict[str | None, str]] = {
    "RequestParticipation": {None: "requested", "refused": "requested", "revoked": "requested"},
    "ApproveParticipation": {"requested": "approved"},
    "RefuseParticipation": {"requested": "refused"},
    "RevokeParticipation": {"approved": "revoked"},
}


class Lifecycle(RuleBasedStateMachine):
    """`phase`, `runs` and `members` are kept by hand; the domain must agree after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[EventData] = []
        self.state: State | None = None
        self.phase = "none"
        self.runs = 0
        self.members: dict[str, str] = {}

    def give(self, command: Command, allowed: bool) -> None:
        """Decide on a command; whether it is accepted is known before."""
        try:
            happened = decide(self.state, command, model=MODEL)
        except FedotaError as error:
            assert not allowed, error
        else:
            assert allowed and len(happened) == 1, command
            self.record(happened[0])

    def tell(self, event: Any, allowed: bool) -> None:
        """Let somebody else's event come."""
        happened = react(self.state, event)
        assert bool(happened) == allowed, event
        for data in happened:
            self.record(data)

    def record(self, data: EventData) -> None:
        """What happened is in the stream."""
        self.log.append(data)
        self.state = evolve(self.state, data)

    @rule()
    def create(self) -> None:
        """Once only."""
        about = {"name": "n", "description": "d", "data_format": "f", "client_image": "image"}
        plan = Plan(rounds=1, goal_count=1)
        self.give(commands.CreateProblem(problem_id=ID, plan=plan, **about), self.phase == "none")
        self.phase = "draft" if self.phase == "none" else self.phase

    @rule()
    def revise(self) -> None:
        """Before the first start only."""
        self.give(commands.ReviseProblem(problem_id=ID, name="m"), self.phase == "draft")

    @rule()
    def start(self) -> None:
        """From the beginning or after a stop, as the next run."""
        allowed = self.phase in ("draft", "stopped")
        self.give(commands.StartProblem(problem_id=ID), allowed)
        if allowed:
            self.phase, self.runs = "running", self.runs + 1

    @rule()
    def stop(self) -> None:
        """While it runs."""
        self.give(commands.StopProblem(problem_id=ID), self.phase == "running")
        self.phase = "stopped" if self.phase == "running" else self.phase

    @rule(run=RUNS)
    def complete(self, run: int) -> None:
        """The last round of a run was completed; only the run that goes on is ended by it."""
        allowed = self.phase == "running" and run == self.runs
        self.tell(self.final("completed", run), allowed)
        self.phase = "completed" if allowed else self.phase

    @rule(run=RUNS, infra=st.booleans())
    def give_up(self, run: int, infra: bool) -> None:
        """A run could not go on."""
        allowed = self.phase == "running" and run == self.runs
        failed = InfraFailed(problem_id=ID, run=run, namespace="ns", reason="r", log=[])
        self.tell(failed if infra else self.final("abandoned", run), allowed)
        self.phase = "stopped" if allowed else self.phase

    @rule(kind=st.sampled_from(sorted(STEPS)), organization=ORGANIZATIONS)
    def participate(self, kind: str, organization: str) -> None:
        """A participation takes a step."""
        steps = STEPS[kind]
        now = self.members.get(organization)
        allowed = self.phase != "none" and now in steps
        if kind == "RequestParticipation" and self.phase == "completed":
            allowed = False
        more = {"reason": "r"} if kind in ("RefuseParticipation", "RevokeParticipation") else {}
        self.give(getattr(commands, kind)(problem_id=ID, organization=organization, **more), allowed)
        if allowed:
            self.members[organization] = steps[now]

    def final(self, stage: Any, run: int) -> RoundUpdated:
        """A run's last report."""
        checkpoint = Checkpoint(key="k/1", sha256="b" * 64, size=1) if stage == "completed" else None
        counts: dict[str, Any] = {"report": 4, "round": 1, "attempt": 1, "goal_count": 1, "minimum_count": 1}
        return RoundUpdated(
            problem_id=ID, run=run, stage=stage, final=True, checkpoint=checkpoint, reason="r", **counts
        )

    @invariant()
    def agrees(self) -> None:
        """The state is what the stream says, and what was kept by hand."""
        if self.state is None:
            assert self.phase == "none" and not self.log
            return
        assert (self.state.phase, self.state.run, self.state.members) == (self.phase, self.runs, self.members)

    @invariant()
    def each_run_ends_once_at_most(self) -> None:
        """Runs are numbered without gaps; none has two ends, and none begins before the one before it has ended."""
        open_run = 0
        for data in self.log:
            match data:
                case ProblemStarted(run=run):
                    assert open_run <= 0 and run == -open_run + 1
                    open_run = run
                case ProblemStopped(run=run) | ProblemCompleted(run=run):
                    assert open_run == run
                    open_run = -run


TestLifecycle = Lifecycle.TestCase
TestLifecycle.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
