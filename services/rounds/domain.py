"""Which report may follow from what was recorded, and where a coordinator goes on: pure functions, no I/O.

A report is judged by two things. `State` is what others' events say of the problem, and when the present attempt
began. The run's last report, from the stream itself, says which one comes next: reports come in order, so the last one
stands for all before it.
"""

import math
import re
from collections.abc import Sequence
from typing import Final
from uuid import UUID

import msgspec

from fedota.contracts.runtime import REPORT_BYTES, Resume
from fedota.errors import FedotaError
from fedota.events import Event, to_json
from fedota.events.problems import (
    ParticipationApproved,
    ParticipationRevoked,
    Plan,
    ProblemCompleted,
    ProblemStarted,
    ProblemStopped,
)
from fedota.events.rounds import Checkpoint, RoundUpdated, Stage
from services.rounds.contributions import contributions_fault

_NEXT: Final[dict[Stage, tuple[Stage, ...]]] = {
    "selection": ("selection", "configuration", "abandoned"),
    "configuration": ("reporting", "abandoned", "selection"),
    "reporting": ("reporting", "completed", "abandoned", "selection"),
}
_COUNTS: Final = {"waiting": 2**31 - 1, "selected": 2**31 - 1, "reported": 2**31 - 1, "examples": 2**53}  # at most
_BELOW: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(?:/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """The newest start of a problem: event id and correlation of its `ProblemStarted`, and why it is over if it is.

    `completed` when that is so because its last round is.
    """

    number: int
    plan: Plan
    cause: UUID
    correlation: UUID
    over: str | None = None
    completed: bool = False


class State(msgspec.Struct, frozen=True, kw_only=True):
    """A problem as the log tells it up to some position.

    `members` are the organizations that ever were approved, each with whether it is now.
    """

    run: Run | None = None
    members: dict[str, bool] = {}

    @property
    def revoked(self) -> list[str]:
        """The organizations that take part no more."""
        return sorted(name for name, approved in self.members.items() if not approved)


def evolve(state: State, event: Event) -> State:
    """The state after an event; the very same one when the event changes nothing."""
    match event.data:
        case ProblemStarted(run=number, plan=plan):
            run = Run(number=number, plan=plan, cause=event.id, correlation=event.correlation)
            return msgspec.structs.replace(state, run=run)
        case ProblemStopped(run=number, reason=reason):
            return _over(state, number, reason, completed=False)
        case ProblemCompleted(run=number):
            return _over(state, number, "the training is completed", completed=True)
        case ParticipationApproved(organization=organization):
            return msgspec.structs.replace(state, members={**state.members, organization: True})
        case ParticipationRevoked(organization=organization):
            return msgspec.structs.replace(state, members={**state.members, organization: False})
    return state


def _over(state: State, number: int, reason: str, *, completed: bool) -> State:
    if state.run is None or state.run.number != number:
        return state
    return msgspec.structs.replace(state, run=msgspec.structs.replace(state.run, over=reason, completed=completed))


def current_run(state: State, number: int) -> Run:
    """The run of this number. Raises `report_refused` unless it is the newest one and still goes on."""
    if state.run is None or number > state.run.number:
        raise _refused(f"Run {number} of this problem was never started.")
    if number < state.run.number:
        raise _refused(f"Run {number} is over: run {state.run.number} has been started since. End this coordinator.")
    if state.run.over is not None:
        raise _refused(f"Run {number} is over ({state.run.over}). End this coordinator.")
    return state.run


def decide(state: State, last: RoundUpdated | None, update: RoundUpdated) -> Sequence[RoundUpdated]:
    """The report, when it follows from what was recorded; `last` is the newest report of the problem, of any run.

    Raises `report_refused`, saying what was expected.
    """
    plan = current_run(state, update.run).plan
    if last is not None and last.run > update.run:  # `state` is behind, the stream is not
        raise _refused(f"Run {update.run} is over: run {last.run} has reported since. End this coordinator.")
    if last is not None and last.run < update.run:
        last = None
    _require_order(last, update)
    if fault := (
        _plan_fault(plan, update)
        or _number_fault(plan, update)
        or _stage_fault(update)
        or contributions_fault(plan, update)
    ):
        raise _refused(f"Report {update.report}: {fault}")
    _require_members(state, update)
    if (size := len(to_json(update))) > REPORT_BYTES:
        raise _refused(f"Report {update.report} has {size} bytes of JSON, more than {REPORT_BYTES}.")
    return [update]


def _require_order(last: RoundUpdated | None, update: RoundUpdated) -> None:
    if last is not None and last.final:
        raise _refused(f"Report {last.report} was final: nothing comes after it.")
    number = last.report + 1 if last else 1
    if update.report != number:
        raise _refused(f"Report {number} was expected, not {update.report}. Ask where to resume.")
    round_, attempt, stages = _expected(last)
    if (update.round, update.attempt) != (round_, attempt) or update.stage not in stages:
        raise _refused(
            f"Report {number} was expected to be of round {round_}, attempt {attempt}, stage {' or '.join(stages)}; "
            f"it is of round {update.round}, attempt {update.attempt}, stage {update.stage}."
        )


def _expected(last: RoundUpdated | None) -> tuple[int, int, tuple[Stage, ...]]:
    """Round, attempt and stages that may come now. A coordinator that was restarted begins its attempt's selection
    again: the round that it had in memory is lost, the attempt is not.
    """
    if last is None:
        return 1, 1, ("selection",)
    if last.stage == "completed":
        return last.round + 1, 1, ("selection",)
    if last.stage == "abandoned":
        return last.round, last.attempt + 1, ("selection",)
    return last.round, last.attempt, _NEXT[last.stage]


def _plan_fault(plan: Plan, update: RoundUpdated) -> str | None:
    """What the plan says against a report."""
    if update.goal_count != plan.goal_count:
        return f"the plan's goal count is {plan.goal_count}, not {update.goal_count}."
    if update.minimum_count != plan.minimum_count:
        return f"the plan's minimum count is {plan.minimum_count}, not {update.minimum_count}."
    if update.stage == "completed" and update.final != (update.round == plan.rounds):
        return f"the completed report of round {plan.rounds} is the final one, this is of round {update.round}."
    if update.stage == "abandoned" and update.attempt >= plan.attempts and not update.final:
        return f"attempt {plan.attempts} is the plan's last, so that it is abandoned is final."
    if update.final and update.stage not in ("completed", "abandoned"):
        return f"stage {update.stage} cannot be final."
    return None


def _number_fault(plan: Plan, update: RoundUpdated) -> str | None:
    """What cannot be counted so."""
    for name, most in _COUNTS.items():
        count = getattr(update, name)
        if not 0 <= count <= most:
            return f"{name} is {count}, not between 0 and {most}."
        if name in ("selected", "reported") and count > plan.selected_count:
            return f"{name} is {count}, but the plan selects {plan.selected_count} clients."
    if not (math.isfinite(update.seconds) and update.seconds >= 0):
        return f"{update.seconds} seconds is no age."
    if len(set(update.participants)) < len(update.participants):
        return "a participant is named twice."
    return None


def _stage_fault(update: RoundUpdated) -> str | None:
    """What the stage needs and what it cannot have."""
    if "\0" in update.reason:  # PostgreSQL's text holds none: it could be recorded and never be shown
        return "its reason holds a NUL character."
    if update.stage == "completed":
        return _completed_fault(update)
    if update.checkpoint is not None:
        return f"stage {update.stage} has no checkpoint, only a completed round has one."
    if update.stage == "abandoned" and not update.reason:
        return "an abandoned attempt needs its reason."
    return None


def _completed_fault(update: RoundUpdated) -> str | None:
    if update.reported < update.minimum_count:
        return f"{update.reported} updates complete no round, it takes {update.minimum_count}."
    if not 1 <= len(update.participants) <= update.reported:
        return f"{update.reported} updates cannot come from {len(update.participants)} organizations."
    return _checkpoint_fault(update.problem_id, update.checkpoint)


def _checkpoint_fault(problem_id: str, checkpoint: Checkpoint | None) -> str | None:
    if checkpoint is None:
        return "a completed round needs its checkpoint."
    prefix = f"problems/{problem_id}/checkpoints/"
    rest = checkpoint.key.removeprefix(prefix)
    if rest == checkpoint.key or not _BELOW.fullmatch(rest):
        return f"the checkpoint's key is not a plain one below {prefix}"
    if not _DIGEST.fullmatch(checkpoint.sha256) or not 0 < checkpoint.size <= 2**53:
        return "the checkpoint needs its SHA-256 in hex and its size."
    return None


def _require_members(state: State, update: RoundUpdated) -> None:
    """Raise unless all whose updates count had a participation.

    One that was revoked since may be named: its update may be in a sum already, and no sum can be taken apart again.
    The coordinator hears of it with the answer, and takes nothing more from it. Of whom nothing was accepted, nothing
    is asked: after the log was restored from an older copy, tokens may be in use of approvals that it has lost.
    """
    if strangers := [name for name in update.participants if name not in state.members]:
        raise _refused(f"Report {update.report}: {', '.join(strangers)} had no approved participation.")


def stopped(state: State, run: int) -> str | None:
    """Why a run was ended before its last round; None where it goes on, is completed or was never started."""
    if state.run is None or not 0 < run <= state.run.number:
        return None
    if run < state.run.number:
        return f"run {state.run.number} has been started since; it has new join kits"
    return None if state.run.completed else state.run.over


def resume(state: State, run: int, history: Sequence[RoundUpdated]) -> Resume:
    """Where the coordinator of a run goes on.

    `history` has the newest report of the run first, and goes back at least to the last round that was completed.
    Raises `report_refused` for a run that was never started.
    """
    if state.run is None or run > state.run.number:
        raise _refused(f"Run {run} of this problem was never started.")
    over = run < state.run.number or state.run.over is not None
    why = stopped(state, run)
    if not history:
        return Resume(finished=over, stopped=why, revoked=state.revoked)
    last = history[0]
    round_, attempt, _ = _expected(last)
    return Resume(
        report=last.report,
        round=round_,
        attempt=attempt,
        checkpoint=next((update.checkpoint for update in history if update.checkpoint), None),
        finished=over or last.final,
        stopped=why if not last.final or last.stage != "completed" else None,
        revoked=state.revoked,
    )


def _refused(detail: str) -> FedotaError:
    return FedotaError("report_refused", detail)
