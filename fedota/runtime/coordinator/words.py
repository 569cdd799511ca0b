"""A round in reports for the log and in plain words for people."""

from datetime import UTC, datetime
from itertools import accumulate
from typing import Final

import msgspec

from fedota.events import to_json
from fedota.events.problems import Plan
from fedota.events.rounds import Contribution, RoundUpdated, Stage
from fedota.runtime.contributions import counted, merged, refused
from fedota.runtime.coordinator.shares import available
from fedota.runtime.coordinator.state import Cohort, Result, Rules, State

MOST_REFUSALS: Final = 50  # told in a report; all of them are counted in its contributions
MOST_CONTRIBUTIONS: Final = 2000  # told in a report; all of those of a completed round are in its manifest
_CONTRIBUTIONS_SIZE: Final = 256 * 1024  # bytes; a report that is too large is not recorded
FINISHED: Final = "The training is finished."
_STAGES: Final[dict[str, Stage]] = {
    "settling": "selection",
    "selection": "selection",
    "ahead": "selection",
    "configuration": "configuration",
}


def report(rules: Rules, state: State, now: float) -> RoundUpdated:
    """The attempt as it stands now, without its number."""
    plan, cohort = rules.plan, state.cohort
    members = list(cohort.counting.values()) if cohort else []
    contributions = merged(*(member.contributions for member in members))
    return RoundUpdated(
        problem_id=rules.problem_id,
        run=rules.run,
        report=0,
        round=state.round,
        attempt=state.attempt,
        stage=_STAGES.get(state.phase, "reporting"),
        goal_count=plan.goal_count,
        minimum_count=plan.minimum_count,
        waiting=available(plan, state),
        selected=cohort.selected if cohort else 0,
        reported=cohort.reported if cohort else 0,
        participants=[one.organization for one in contributions if one.updates],
        refusals=[refusal for member in members for refusal in member.refusals][:MOST_REFUSALS],
        examples=sum(one.examples for one in contributions),
        seconds=round(max(0.0, now - state.began), 3),
        reason=reason(rules, state),
    )


def given(cohort: Cohort | None, result: Result | None = None) -> list[Contribution]:
    """What each organization gave to an attempt that ends: to its sums, or, with a result, to its checkpoint.

    Whatever selector refused an update, it was refused; what was in a sum that is lost counts for nothing.
    """
    if cohort is None:
        return []
    accepted = [result.contributions] if result else [counted(one.contributions) for one in cohort.counting.values()]
    return merged(*accepted, *(refused(member.contributions) for member in cohort.members.values()))


def telling(update: RoundUpdated, contributions: list[Contribution]) -> RoundUpdated:
    """The report with contributions: of too many the largest, and then it says so."""
    told = _largest(contributions)
    left_out = len(contributions) - len(told)
    note = f"; contributions of {left_out} more organizations are not told here" if left_out else ""
    return msgspec.structs.replace(update, contributions=told, reason=update.reason + note)


def _largest(contributions: list[Contribution]) -> list[Contribution]:
    """As many as a report may hold, by organization."""
    if len(contributions) <= MOST_CONTRIBUTIONS and len(to_json(contributions)) <= _CONTRIBUTIONS_SIZE:
        return contributions
    ordered = sorted(contributions, key=lambda one: (-one.examples, one.organization))[:MOST_CONTRIBUTIONS]
    sizes = accumulate(len(to_json(one)) + 1 for one in ordered)
    kept = [one for one, size in zip(ordered, sizes, strict=True) if size < _CONTRIBUTIONS_SIZE]
    return sorted(kept, key=lambda one: one.organization)


def beyond_cap(plan: Plan, state: State) -> str:
    """Who waits and cannot be selected, because its organization has as many clients in the round as it may have."""
    more = state.waiting - available(plan, state)
    return f", and {more} more of organizations that may send only {plan.clients_per_organization}" if more else ""


def reason(rules: Rules, state: State) -> str:
    """The stage that the round is in, in plain words and numbers."""
    plan, cohort = rules.plan, state.cohort
    match state.phase:
        case "settling":
            here = f"{len(state.presences)} of {plan.selectors} selectors are here"
            return f"{here}; waits for the others until {_clock(state.until)}"
        case "selection":
            there, wanted = available(plan, state), plan.selected_count
            here = f"{there} of {clients(wanted)} {_are(wanted)} here{beyond_cap(plan, state)}"
            missing = wanted - there
            return f"{here}; waits for {missing} more until {_clock(state.until)}" if missing > 0 else here
        case "configuration":
            wanted = sum(member.share for member in (cohort.members.values() if cohort else ()))
            return f"{clients(wanted)} {_are(wanted)} being selected and told what to do"
        case "ahead":
            return f"{_rounds(len(state.unrecorded))} not recorded yet; the next one waits until there are fewer"
        case "finished":
            return state.finished or ""
    reported = cohort.reported if cohort else 0
    have = f"{reported} of {clients(max(plan.goal_count, reported))} {_have(plan.goal_count)} reported"
    match state.phase:
        case "reporting":
            return f"{have}; waits for {max(0, plan.goal_count - reported)} more until {_clock(state.until)}"
        case "collecting":
            return f"{have}; their selectors hand the sums over"
    return f"{have}; the next checkpoint is being computed"


def unstored(completed: RoundUpdated, waiting: int, why: str) -> RoundUpdated:
    """What can be told of a round whose `completed` report waits for its checkpoint to be stored.

    `waiting` rounds are not recorded yet, this one among them.
    """
    have = f"{completed.reported} of {clients(max(completed.goal_count, completed.reported))}"
    others = f"; {_rounds(waiting - 1)} waiting behind it" if waiting > 1 else ""
    return msgspec.structs.replace(
        completed,
        stage="reporting",
        metrics={},
        contributions=[],
        checkpoint=None,
        final=False,
        reason=f"{have} {_have(completed.goal_count)} reported; the checkpoint is being stored: {why}{others}",
    )


def clients(count: int) -> str:
    """So many of them."""
    return f"{count} client" if count == 1 else f"{count} clients"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def farewell(last: RoundUpdated) -> str:
    """What clients are told when the training is over."""
    if last.stage == "completed":
        return FINISHED
    return f"The training ended in round {last.round}: {last.reason.removeprefix('abandoned: ')}."


def _rounds(count: int) -> str:
    return f"{count} round is" if count == 1 else f"{count} rounds are"


def _have(count: int) -> str:
    return "has" if count == 1 else "have"


def seconds(seconds: float) -> str:
    """So many of them."""
    return f"{seconds:g} second" if seconds == 1 else f"{seconds:g} seconds"


def _clock(when: float) -> str:
    return f"{datetime.fromtimestamp(when, UTC):%H:%M:%S} UTC"
