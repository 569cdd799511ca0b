"""A round in reports for the log and in plain words for people."""

from datetime import UTC, datetime
from typing import Final

from fedota.events.rounds import RoundUpdated, Stage
from fedota.runtime.coordinator.state import Rules, State

MOST_REFUSALS: Final = 50  # told in a report; all of them are in the selectors' metrics
_STAGES: Final[dict[str, Stage]] = {
    "settling": "selection",
    "selection": "selection",
    "configuration": "configuration",
}


def report(rules: Rules, state: State, now: float) -> RoundUpdated:
    """The attempt as it stands now, without its number."""
    plan, cohort = rules.plan, state.cohort
    members = list(cohort.counting.values()) if cohort else []
    return RoundUpdated(
        problem_id=rules.problem_id,
        run=rules.run,
        report=0,
        round=state.round,
        attempt=state.attempt,
        stage=_STAGES.get(state.phase, "reporting"),
        goal_count=plan.goal_count,
        minimum_count=plan.minimum_count,
        waiting=state.waiting,
        selected=cohort.selected if cohort else 0,
        reported=cohort.reported if cohort else 0,
        participants=sorted({name for member in members for name in member.organizations}),
        refusals=[refusal for member in members for refusal in member.refusals][:MOST_REFUSALS],
        examples=sum(member.examples for member in members),
        seconds=round(max(0.0, now - state.began), 3),
        reason=reason(rules, state),
    )


def reason(rules: Rules, state: State) -> str:
    """The stage that the round is in, in plain words and numbers."""
    plan, cohort = rules.plan, state.cohort
    match state.phase:
        case "settling":
            here = f"{len(state.presences)} of {plan.selectors} selectors are here"
            return f"{here}; waits for the others until {_clock(state.until)}"
        case "selection":
            here = f"{state.waiting} of {clients(plan.selected_count)} {_are(plan.selected_count)} here"
            missing = plan.selected_count - state.waiting
            return f"{here}; waits for {missing} more until {_clock(state.until)}" if missing > 0 else here
        case "configuration":
            wanted = sum(member.share for member in (cohort.members.values() if cohort else ()))
            return f"{clients(wanted)} {_are(wanted)} being selected and told what to do"
        case "finished":
            return state.finished or ""
    reported = cohort.reported if cohort else 0
    have = f"{reported} of {clients(max(plan.goal_count, reported))} {_have(plan.goal_count)} reported"
    match state.phase:
        case "reporting":
            return f"{have}; waits for {max(0, plan.goal_count - reported)} more until {_clock(state.until)}"
        case "collecting":
            return f"{have}; their selectors hand the sums over"
        case "storing":
            return f"{have}; the checkpoint is being stored" + (f": {state.trouble}" if state.trouble else "")
    return f"{have}; the next checkpoint is being computed"


def clients(count: int) -> str:
    """So many of them."""
    return f"{count} client" if count == 1 else f"{count} clients"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _have(count: int) -> str:
    return "has" if count == 1 else "have"


def seconds(seconds: float) -> str:
    """So many of them."""
    return f"{seconds:g} second" if seconds == 1 else f"{seconds:g} seconds"


def _clock(when: float) -> str:
    return f"{datetime.fromtimestamp(when, UTC):%H:%M:%S} UTC"
