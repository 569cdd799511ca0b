"""A round in reports for the log and in plain words for people."""

from collections import Counter
from datetime import UTC, datetime
from itertools import accumulate
from typing import Final, TypeVar

import msgspec

from fedota.contracts.runtime import REPORT_BYTES
from fedota.events import to_json
from fedota.events.problems import Plan
from fedota.events.rounds import Contribution, Refusal, RoundUpdated, Stage
from fedota.runtime.contributions import counted, merged, refused
from fedota.runtime.coordinator.shares import available
from fedota.runtime.coordinator.state import Cohort, Result, Rules, State

MOST_REFUSALS: Final = 50  # told in a report; all of them are counted in its contributions
MOST_CONTRIBUTIONS: Final = 2000  # told in a report; all of those of a completed round are in its manifest
_CONTRIBUTIONS_SIZE: Final = 256 * 1024  # bytes of JSON, as all that follow; a report that is too large is not recorded
_PARTICIPANTS_SIZE: Final = 256 * 1024
_MARGIN: Final = 16 * 1024  # for what a report is given later: its number, words on where its checkpoint is
_LONGEST: Final = 500  # characters of what others say
T = TypeVar("T")
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
    told = RoundUpdated(
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
        refusals=[_short(refusal) for member in members for refusal in member.refusals][:MOST_REFUSALS],
        examples=sum(one.examples for one in contributions),
        seconds=round(max(0.0, now - state.began), 3),
        reason=reason(rules, state),
    )
    return _naming(told, contributions)


def _short(refusal: Refusal) -> Refusal:
    return msgspec.structs.replace(refusal, detail=refusal.detail[:_LONGEST])


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
    update = _naming(update, contributions)
    room = min(_CONTRIBUTIONS_SIZE, REPORT_BYTES - _MARGIN - len(to_json(update)))
    told = _first(_by_examples(contributions)[:MOST_CONTRIBUTIONS], room)
    left_out = len(contributions) - len(told)
    note = f"; contributions of {left_out} more organizations are not told here" if left_out else ""
    told.sort(key=lambda one: one.organization)
    return msgspec.structs.replace(update, contributions=told, reason=update.reason + note)


def _naming(update: RoundUpdated, contributions: list[Contribution]) -> RoundUpdated:
    """The report with its participants: of too many those who gave most, and then it says so.

    Then there is no room to tell the contributions of all who are named, so what is told is only a part of the counts.
    """
    named = _first([one.organization for one in _by_examples(contributions) if one.updates], _PARTICIPANTS_SIZE)
    left_out = sum(1 for one in contributions if one.updates) - len(named)
    if not left_out:
        return update
    note = f"; {left_out} more organizations that gave updates are not named here"
    return msgspec.structs.replace(update, participants=sorted(named), reason=update.reason + note)


def _by_examples(contributions: list[Contribution]) -> list[Contribution]:
    return sorted(contributions, key=lambda one: (-one.examples, one.organization))


def _first(all_: list[T], room: int) -> list[T]:
    """As many of them as have room in JSON."""
    ends = accumulate(len(to_json(one)) + 1 for one in all_)
    return [one for one, end in zip(all_, ends, strict=True) if end <= room]


def beyond_cap(plan: Plan, state: State) -> str:
    """Who waits and cannot be selected, because its organization has as many clients in the round as it may have."""
    more = state.waiting - available(plan, state)
    return f", and {more} more of organizations that may send only {plan.clients_per_organization}" if more else ""


def losses(cohort: Cohort) -> str:
    """Of which selectors that were lost clients cannot report, as they had no model yet."""
    missing: Counter[str] = Counter()
    for member in (cohort.members[life] for life in cohort.lost & cohort.members.keys()):
        missing[member.name] += (member.selected or 0) - member.begun
    left = [f"; {name} was lost, and {clients(count)} of it had not begun" for name, count in missing.items() if count]
    return "".join(sorted(left))


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
            if state.rests > state.began:
                here += f"; nobody is selected before {_clock(state.rests)}, as selectors were lost again"
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
            left = min(plan.goal_count, cohort.expected if cohort else 0) - reported
            return f"{have}; waits for {max(0, left)} more until {_clock(state.until)}"
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
        reason=f"{have} {_have(completed.goal_count)} reported; the checkpoint is being stored: {_plain(why)}{others}",
    )


def _plain(text: str) -> str:
    """What others say, short and without control characters: none of them can be recorded or shown."""
    return "".join(char if char.isprintable() else " " for char in text[:_LONGEST])


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


def stopped(reason: str) -> str:
    """What clients are told when the run was ended before its last round; the reason may be a person's, or empty."""
    line = "".join(one for one in " ".join(reason.split()) if one.isprintable())  # a terminal will show it
    said = line.removeprefix("abandoned: ")[:_LONGEST]
    if not said:
        return "The training was stopped."
    return f"The training was stopped: {said}" + ("" if said[-1] in ".!?…" else ".")


def _rounds(count: int) -> str:
    return f"{count} round is" if count == 1 else f"{count} rounds are"


def _have(count: int) -> str:
    return "has" if count == 1 else "have"


def seconds(seconds: float) -> str:
    """So many of them."""
    return f"{seconds:g} second" if seconds == 1 else f"{seconds:g} seconds"


def _clock(when: float) -> str:
    return f"{datetime.fromtimestamp(when, UTC):%H:%M:%S} UTC"
