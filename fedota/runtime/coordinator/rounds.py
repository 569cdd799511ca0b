"""The round of Bonawitz et al. 2019 as a pure state machine: selection, configuration, reporting, and its end.

`step(rules, state, event, now)` gives the next state and the reports of each stage that was entered on the way. No I/O,
no clock: time is a number (Unix seconds) that comes in. The machine knows selectors by name and by *life*, an id that
is new each time such a process starts: what an earlier life held is lost.

The clients of one attempt are a *cohort*. Its id holds the coordinator's own life, so that a cohort that was forgotten
in a crash can never be taken for the one that came after it.
"""

import math
from typing import Any, Final, TypeVar

import msgspec

from fedota.events.problems import Plan
from fedota.events.rounds import Checkpoint
from fedota.runtime.coordinator.state import (
    Aggregated,
    Awoken,
    Cohort,
    Event,
    Handed,
    Member,
    Presence,
    Reports,
    Result,
    Revoked,
    Rules,
    Spoiled,
    State,
    Stored,
    Trouble,
)
from fedota.runtime.coordinator.words import clients, report, seconds
from fedota.runtime.protocol import Claim, Claimed, Concluded, Held, ModelRef, Orders, Told, Work

LEASE: Final = 15.0  # seconds of silence after which a selector is taken for dead
SETTLING: Final = 5.0  # seconds that a coordinator waits for its selectors before it begins anything new
COLLECTING: Final = 60.0  # seconds, at least, that selectors have for handing their sums over
_FINISHED: Final = "The training is finished."

S = TypeVar("S", bound=msgspec.Struct)


def start(rules: Rules, *, round: int, attempt: int, base: ModelRef, now: float) -> tuple[State, Reports]:
    """A coordinator begins, or begins again, with an attempt of a round."""
    state = State(
        round=round,
        attempt=attempt,
        base=base,
        phase="settling",
        began=now,
        until=now + min(SETTLING, rules.plan.selection_timeout),
    )
    return state, [report(rules, state, now)]


def over(*, round: int, attempt: int, base: ModelRef, now: float) -> State:
    """A coordinator begins again after the run's last report: there is nothing left to do but to say so."""
    return State(
        round=round, attempt=attempt, base=base, phase="finished", began=now, until=math.inf, finished=_FINISHED
    )


def step(rules: Rules, state: State, event: Event, now: float) -> tuple[State, Reports]:
    """The state after an event, and what there is to report of the stages that were entered by it."""
    state = _silenced(_took(rules, state, event, now), now)
    reports: Reports = []
    if isinstance(event, Stored) and state.phase == "storing":
        state, reports = _complete(rules, state, event.checkpoint, now)
    while (moved := _advance(rules, state, now)) is not None:
        state, report_ = moved
        reports += report_
    return state, reports


def wakes(state: State) -> float:
    """When time alone may change something."""
    silent = min((presence.heard + LEASE for presence in state.presences.values()), default=math.inf)
    return min(state.until, silent)


# What events do by themselves.


def _took(rules: Rules, state: State, event: Event, now: float) -> State:
    match event:
        case Told():
            return _told(state, event, now)
        case Awoken():
            heard = {name: _changed(presence, heard=now) for name, presence in state.presences.items()}
            return _changed(state, presences=heard)
        case Claim():
            return _claimed(state, event, now)
        case Handed(life=life, cohort=id_, reported=reported):
            return _with_member(state, id_, life, handed=True, closed=True, reported=reported)
        case Spoiled(life=life, cohort=id_):
            cohort = state.cohort
            return _changed(state, cohort=_lose(cohort, life)) if cohort and cohort.id == id_ else state
        case Aggregated(result=result) if state.phase == "aggregating":
            return _changed(state, phase="storing", result=result)
        case Revoked(organizations=organizations):
            return _changed(state, revoked=organizations)
        case Trouble(reason=reason):
            return _changed(state, trouble=reason)
    return state


def _told(state: State, told: Told, now: float) -> State:
    before = state.presences.get(told.name)
    presence = Presence(life=told.life, heard=now, waiting=told.waiting, held=told.held)
    cohort = state.cohort
    if cohort is not None:
        if before is not None and before.life != told.life:
            cohort = _lose(cohort, before.life)
        for life, member in cohort.members.items():  # a life that a coordinator before this one knew
            if member.name == told.name and life != told.life:
                cohort = _lose(cohort, life)
        cohort = _joined(cohort, told)
    return _changed(state, presences={**state.presences, told.name: presence}, cohort=cohort)


def _joined(cohort: Cohort, told: Told) -> Cohort:
    """The cohort, with what a selector says of its part in it."""
    held = told.held
    if held is None or held.cohort != cohort.id or told.life in cohort.lost:
        return cohort
    known = cohort.members.get(told.life)
    if known is not None and known.handed:
        return cohort  # what it says may be older than its sum
    member = _changed(
        known or Member(name=told.name, share=held.share),
        selected=held.selected,
        reported=held.reported,
        examples=held.examples,
        organizations=held.organizations,
        refusals=held.refusals,
        closed=held.closed,
    )
    joined = _changed(cohort, members={**cohort.members, told.life: member})
    if any(cohort.claims.get(ticket, told.life) != told.life for ticket in held.claimed):
        return _lose(joined, told.life)  # it counts a client that another selector counts
    return _changed(joined, claims={**cohort.claims, **dict.fromkeys(held.claimed, told.life)})


def _with_member(state: State, cohort_id: str, life: str, **changes: Any) -> State:
    cohort = state.cohort
    if cohort is None or cohort.id != cohort_id or life not in cohort.counting:
        return state
    member = _changed(cohort.members[life], **changes)
    return _changed(state, cohort=_changed(cohort, members={**cohort.members, life: member}))


def _lose(cohort: Cohort, life: str) -> Cohort:
    member = cohort.members.get(life)
    if member is not None and member.handed:
        return cohort  # its sum is here already
    return _changed(cohort, lost=cohort.lost | {life})


def _silenced(state: State, now: float) -> State:
    """Without the selectors that were not heard of for too long."""
    silent = [name for name, presence in state.presences.items() if now >= presence.heard + LEASE]
    if not silent:
        return state
    cohort = state.cohort
    for name in silent:
        cohort = _lose(cohort, state.presences[name].life) if cohort else None
    kept = {name: presence for name, presence in state.presences.items() if name not in silent}
    return _changed(state, presences=kept, cohort=cohort)


def claim(state: State, wanted: Claim, now: float) -> Claimed:
    """Whether a selector may accept the update of another one's ticket."""
    cohort = state.cohort
    if cohort is None or cohort.id != wanted.cohort or wanted.life in cohort.lost:
        return Claimed(answer="over")
    if state.phase not in ("configuration", "reporting"):
        # While sums are collected the issuer may turn out to be lost, and the cohort be opened again.
        return Claimed(answer="wait" if state.phase == "collecting" else "over")
    holder = cohort.claims.get(wanted.ticket, wanted.issuer)
    if holder == wanted.life:
        return Claimed(answer="granted")
    if holder in cohort.lost or (holder == wanted.issuer and _has_gone(state, wanted, now)):
        return Claimed(answer="granted")
    return Claimed(answer="wait" if holder == wanted.issuer else "taken")


def _has_gone(state: State, wanted: Claim, now: float) -> bool:
    """Whether the life that gave a ticket out is over, as far as a coordinator can know that never met it."""
    presence = state.presences.get(wanted.name)
    if presence is None:
        return now >= state.began + LEASE
    return presence.life != wanted.issuer


def _claimed(state: State, wanted: Claim, now: float) -> State:
    """Remember what `claim` granted; from then on the issuer's sum, should it come back, counts no more."""
    if claim(state, wanted, now).answer != "granted" or state.cohort is None:
        return state
    cohort = state.cohort
    holder = cohort.claims.get(wanted.ticket, wanted.issuer)
    if holder != wanted.life:
        cohort = _lose(cohort, holder)
    return _changed(state, cohort=_changed(cohort, claims={**cohort.claims, wanted.ticket: wanted.life}))


# How a round goes on.


def _advance(rules: Rules, state: State, now: float) -> tuple[State, Reports] | None:
    """The next stage, if it is time for it."""
    match state.phase:
        case "settling":
            return _settle(rules, state, now)
        case "selection":
            return _select(rules, state, now)
        case "configuration":
            return _configured(rules, state, now)
        case "reporting":
            return _reported(rules, state, now)
        case "collecting":
            return _collected(rules, state, now)
    return None


def _settle(rules: Rules, state: State, now: float) -> tuple[State, Reports] | None:
    if len(state.presences) < rules.plan.selectors and now < state.until:
        return None
    held = [presence.held for presence in state.presences.values() if presence.held and _fits(state, presence.held)]
    if not held:
        return _enter(rules, _changed(state, phase="selection", until=state.began + rules.plan.selection_timeout), now)
    # One coordinator made one cohort of an attempt: should there be two, the one with more updates is worth more.
    chosen = max(held, key=lambda one: (one.reported, one.cohort))
    cohort = Cohort(id=chosen.cohort, deadline=chosen.deadline, taken_up=True)
    for name, presence in sorted(state.presences.items()):
        cohort = _joined(cohort, Told(name=name, life=presence.life, waiting=0, held=presence.held))
    return _enter(rules, _changed(state, phase="configuration", cohort=cohort, until=cohort.deadline), now)


def _fits(state: State, held: Held) -> bool:
    return (held.round, held.attempt, held.base) == (state.round, state.attempt, state.base.sha256)


def _select(rules: Rules, state: State, now: float) -> tuple[State, Reports] | None:
    plan = rules.plan
    if state.waiting >= plan.selected_count or (now >= state.until and state.waiting >= plan.minimum_count):
        return _configure(rules, state, now)
    if now >= state.until:
        came = f"{state.waiting} of {clients(plan.selected_count)} came within {seconds(plan.selection_timeout)}"
        return _abandon(rules, state, f"{came}, at least {plan.minimum_count} were needed", now)
    return None


def _configure(rules: Rules, state: State, now: float) -> tuple[State, Reports]:
    waiting = {name: presence.waiting for name, presence in state.presences.items()}
    shares = share_out(min(rules.plan.selected_count, state.waiting), waiting)
    cohort = Cohort(
        id=f"{rules.life}-{state.round}-{state.attempt}",
        deadline=now + rules.plan.report_timeout,
        members={presence.life: Member(name=name, share=shares[name]) for name, presence in state.presences.items()},
    )
    return _enter(rules, _changed(state, phase="configuration", cohort=cohort, until=cohort.deadline), now)


def share_out(wanted: int, waiting: dict[str, int]) -> dict[str, int]:
    """So many clients, by each selector's part of those that wait; never more than a selector has."""
    total = sum(waiting.values())
    shares = {name: wanted * count // total if total else 0 for name, count in waiting.items()}
    for name in sorted(waiting, key=lambda name: (shares[name] - wanted * waiting[name] / max(total, 1), name)):
        if sum(shares.values()) < wanted and shares[name] < waiting[name]:
            shares[name] += 1
    return shares


def _configured(rules: Rules, state: State, now: float) -> tuple[State, Reports] | None:
    cohort = _cohort(state)
    open_ = [member for member in cohort.counting.values() if member.selected is None and member.share]
    if open_ and now < cohort.deadline:
        return None
    if cohort.selected < rules.plan.minimum_count and not cohort.taken_up:
        there = f"only {cohort.selected} of {clients(rules.plan.selected_count)} could be configured"
        return _abandon(rules, state, f"{there}, at least {rules.plan.minimum_count} were needed", now)
    return _enter(rules, _changed(state, phase="reporting"), now)


def _reported(rules: Rules, state: State, now: float) -> tuple[State, Reports] | None:
    cohort, plan = _cohort(state), rules.plan
    all_ = cohort.reported >= cohort.selected and not cohort.taken_up
    enough = cohort.reported >= plan.minimum_count and (all_ or now >= state.until)
    if cohort.reported >= plan.goal_count or enough:
        until = now + max(COLLECTING, plan.report_timeout)
        members = {life: _changed(member, closed=False) for life, member in cohort.members.items()}
        collecting = _changed(cohort, collecting_until=until, members=members)
        return _changed(state, phase="collecting", cohort=collecting, until=until), []
    if now >= state.until:
        return _abandon(rules, state, _too_few(plan, cohort.reported), now)
    return None


def _collected(rules: Rules, state: State, now: float) -> tuple[State, Reports] | None:
    cohort, plan = _cohort(state), rules.plan
    owing = [life for life, one in cohort.counting.items() if not (one.handed or (one.closed and not one.reported))]
    if owing and now < state.until:
        return None
    for life in owing:
        cohort = _lose(cohort, life)
    state = _changed(state, cohort=cohort)
    if cohort.reported >= plan.minimum_count:
        return _changed(state, phase="aggregating", until=math.inf), []
    if now >= cohort.deadline:
        return _abandon(rules, state, _too_few(plan, cohort.reported), now)
    # A selector was lost with its sum: its clients may send their updates again, to another one.
    members = {life: _changed(member, handed=False, closed=False) for life, member in cohort.members.items()}
    reopened = _changed(cohort, members=members)
    return _enter(rules, _changed(state, phase="reporting", cohort=reopened, until=cohort.deadline), now)


def _too_few(plan: Plan, reported: int) -> str:
    within = f"{reported} of {plan.goal_count} reported within {seconds(plan.report_timeout)}"
    return f"{within}, at least {plan.minimum_count} were needed"


def _enter(rules: Rules, state: State, now: float) -> tuple[State, Reports]:
    return state, [report(rules, state, now)]


def _abandon(rules: Rules, state: State, why: str, now: float) -> tuple[State, Reports]:
    final = state.attempt >= rules.plan.attempts
    tail = f"; that was the last of {rules.plan.attempts} attempts, the training ends here" if final else ""
    said = _changed(
        report(rules, state, now), stage="abandoned", final=final, reason=f"abandoned: {why}{tail}", checkpoint=None
    )
    concluded = state
    if state.cohort is not None:
        concluded = _changed(state, concluded=state.cohort, cohort=None, completed=False)
    if final:
        reason = f"The training ended in round {state.round}: {why}."
        return _changed(concluded, phase="finished", until=math.inf, finished=reason), [said]
    again, reports = _begin(rules, _changed(concluded, attempt=state.attempt + 1), now)
    return again, [said, *reports]


def _begin(rules: Rules, state: State, now: float) -> tuple[State, Reports]:
    """The selection of an attempt."""
    until = now + rules.plan.selection_timeout
    return _enter(rules, _changed(state, phase="selection", began=now, until=until), now)


def _complete(rules: Rules, state: State, checkpoint: Checkpoint, now: float) -> tuple[State, Reports]:
    """The round's checkpoint is stored: the round counts, and the next one begins."""
    result, plan = _result(state), rules.plan
    final = state.round >= plan.rounds
    of = max(plan.goal_count, result.reported)
    reason = f"{result.reported} of {clients(of)} reported in {seconds(round(now - state.began, 1))}"
    if result.reported < plan.goal_count:
        reason += f", at least {plan.minimum_count} were needed"
    said = _changed(
        report(rules, state, now),
        stage="completed",
        reported=result.reported,
        participants=result.participants,
        examples=result.examples,
        metrics=result.metrics,
        checkpoint=checkpoint,
        final=final,
        reason=f"{reason}; the training is finished" if final else reason,
    )
    done = _changed(
        state, base=result.model, concluded=state.cohort, completed=True, cohort=None, result=None, trouble=""
    )
    if final:
        return _changed(done, phase="finished", until=math.inf, finished=_FINISHED), [said]
    following, reports = _begin(rules, _changed(done, round=state.round + 1, attempt=1), now)
    return following, [said, *reports]


# What selectors are told.


def orders(rules: Rules, state: State, name: str, life: str) -> Orders:
    """What this life of a selector should be doing now."""
    cohort, model = state.cohort, state.result.model if state.result else state.base
    work = None
    if cohort is not None and life not in cohort.lost:
        member = cohort.members.get(life)
        work = Work(
            cohort=cohort.id,
            round=state.round,
            attempt=state.attempt,
            base=state.base,
            share=member.share if member else 0,
            deadline=cohort.deadline,
            collect=collection(rules, cohort) if state.phase in ("collecting", "aggregating", "storing") else "",
        )
    last = state.concluded
    return Orders(
        life=life,
        model=model,
        config=rules.plan.client_config,
        work=work,
        settling=state.phase == "settling",
        lost=cohort is not None and life in cohort.lost,
        last=Concluded(cohort=last.id, counted=state.completed and _is_handed(last, life)) if last else None,
        finished=state.finished,
        revoked=state.revoked,
    )


def collection(rules: Rules, cohort: Cohort) -> str:
    """The name of one collection of a cohort's sums: no earlier life of ours and no earlier try has the same."""
    return f"{rules.life}-{cohort.collecting_until}"


def _is_handed(cohort: Cohort, life: str) -> bool:
    return life in cohort.members and cohort.members[life].handed


def _cohort(state: State) -> Cohort:
    if state.cohort is None:
        raise AssertionError(f"{state.phase} without a cohort")
    return state.cohort


def _result(state: State) -> Result:
    if state.result is None:
        raise AssertionError(f"{state.phase} without a result")
    return state.result


def _changed(struct: S, **changes: Any) -> S:
    return msgspec.structs.replace(struct, **changes)
