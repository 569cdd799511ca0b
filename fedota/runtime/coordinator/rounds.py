"""The round of Bonawitz et al. 2019 as a pure state machine: selection, configuration, reporting, and its end.

`step(rules, state, event, now)` gives the next state and the reports of each stage that was entered on the way. No I/O,
no clock: time is a number (Unix seconds) that comes in. The machine knows selectors by name and by *life*, an id that
is new each time such a process starts: what an earlier life held is lost.

The clients of one attempt are a *cohort*. Its id holds the coordinator's own life, so that a cohort that was forgotten
in a crash can never be taken for the one that came after it.
"""

import math
from collections.abc import Sequence
from typing import Any, Final, TypeVar

import msgspec

from fedota.events.problems import Plan
from fedota.runtime.contributions import counted, merged, refused
from fedota.runtime.coordinator.shares import available, shares
from fedota.runtime.coordinator.state import (
    Aggregated,
    Awoken,
    Cohort,
    Ended,
    Event,
    Grant,
    Handed,
    Member,
    Presence,
    Recorded,
    Reports,
    Revoked,
    Rules,
    Spoiled,
    State,
    Stopped,
)
from fedota.runtime.coordinator.words import FINISHED, beyond_cap, clients, given, losses, report, seconds, telling
from fedota.runtime.protocol import Claim, Claimed, Concluded, Held, ModelRef, Orders, Told, Work

LEASE: Final = 15.0  # seconds of silence after which a selector is taken for dead
SETTLING: Final = 5.0  # seconds that a coordinator waits for its selectors before it begins anything new
COLLECTING: Final = 60.0  # seconds, at least, that selectors have for handing their sums over
_WORSE: Final = 4  # times as long as before nobody is selected after selectors were lost once more
MOST_AHEAD: Final = 16  # rounds; a training that is so far ahead of what could be stored and recorded waits

S = TypeVar("S", bound=msgspec.Struct)


def start(
    rules: Rules,
    *,
    round: int,
    attempt: int,
    base: ModelRef,
    now: float,
    unrecorded: Sequence[str] = (),
    ended: Ended | None = None,
) -> tuple[State, Reports]:
    """A coordinator begins, or begins again, with an attempt of a round.

    What it remembers of an earlier life: checkpoints that are `unrecorded`, and the cohort that has `ended`.
    """
    state = State(
        round=round,
        attempt=attempt,
        base=base,
        phase="settling",
        began=now,
        until=now + min(SETTLING, rules.plan.selection_timeout),
        unrecorded=list(unrecorded),
        ended=ended,
    )
    return state, [report(rules, state, now)]


def over(
    *,
    round: int,
    attempt: int,
    base: ModelRef,
    now: float,
    unrecorded: Sequence[str] = (),
    ended: Ended | None = None,
    reason: str = FINISHED,
) -> State:
    """A coordinator begins again after the run's last round: there is nothing left to do but to say so."""
    return State(
        round=round,
        attempt=attempt,
        base=base,
        phase="finished",
        began=now,
        until=math.inf,
        unrecorded=list(unrecorded),
        ended=ended,
        finished=reason,
    )


def step(rules: Rules, state: State, event: Event, now: float) -> tuple[State, Reports]:
    """The state after an event, and what there is to report of the stages that were entered by it."""
    state = _silenced(_took(rules, state, event, now), now)
    reports: Reports = []
    if isinstance(event, Aggregated) and state.phase == "aggregating" and event.cohort == _cohort(state).id:
        state, reports = _complete(rules, state, event, now)
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
        case Handed():
            return _handed(state, event)
        case Spoiled(life=life, cohort=id_):
            cohort = state.cohort
            return _changed(state, cohort=_lose(cohort, life)) if cohort and cohort.id == id_ else state
        case Recorded(key=key):
            return _changed(state, unrecorded=[one for one in state.unrecorded if one != key])
        case Revoked(organizations=organizations):
            return _changed(state, revoked=organizations)
        case Stopped(words=words):
            ended = Ended(cohort=state.cohort.id) if state.cohort else state.ended
            return _changed(state, phase="finished", until=math.inf, cohort=None, ended=ended, finished=words)
    return state


def _told(state: State, told: Told, now: float) -> State:
    before = state.presences.get(told.name)
    if told.life in state.past or (before is not None and _is_late(told, before)):
        return state
    presence = Presence(
        life=told.life,
        heard=now,
        number=told.number,
        waiting=told.waiting,
        organizations=told.organizations,
        held=told.held,
    )
    cohort, past = state.cohort, state.past
    if before is not None and before.life != told.life:
        past |= {before.life}
    if cohort is not None:
        if before is not None and before.life != told.life:
            cohort = _lose(cohort, before.life)
        for life, member in cohort.members.items():  # a life that a coordinator before this one knew
            if member.name == told.name and life != told.life:
                cohort = _lose(cohort, life)
        cohort = _joined(cohort, told)
    return _changed(state, presences={**state.presences, told.name: presence}, past=past, cohort=cohort)


def _is_late(told: Told, before: Presence) -> bool:
    """Whether a newer message of the same life came before this one."""
    return told.life == before.life and told.number < before.number


def _joined(cohort: Cohort, told: Told) -> Cohort:
    """The cohort, with what a selector says of its part in it."""
    held = told.held
    if held is None or held.cohort != cohort.id:
        return cohort
    known = cohort.members.get(told.life)
    begun = held.begun if held.begun is not None else held.selected or 0
    if told.life in cohort.lost:  # it was only cut off: meanwhile more of its clients may have got the model
        had = _changed(known or Member(name=told.name, share=held.share), selected=held.selected, begun=begun)
        return _changed(cohort, members={**cohort.members, told.life: had})
    if known is not None and known.handed:  # what it says of its sum may be older than the sum itself
        contributions = merged(counted(known.contributions), refused(held.contributions))
        late = _changed(known, contributions=contributions, refusals=held.refusals)
        return _changed(cohort, members={**cohort.members, told.life: late})
    member = _changed(
        known or Member(name=told.name, share=held.share),
        selected=held.selected,
        begun=begun,
        reported=held.reported,
        contributions=held.contributions,
        refusals=held.refusals,
        closed=held.closed,
    )
    joined = _changed(cohort, members={**cohort.members, told.life: member})
    if any(ticket in cohort.claims and cohort.claims[ticket].holder != told.life for ticket in held.claimed):
        return _lose(joined, told.life)  # it counts a client that another selector counts
    for issuer in held.claimed.values():  # a coordinator that was killed had granted it: it has to be known again
        joined = _lose(joined, issuer)
    claims = {ticket: Grant(holder=told.life, issuer=issuer) for ticket, issuer in held.claimed.items()}
    return _changed(joined, claims={**cohort.claims, **claims})


def _handed(state: State, event: Handed) -> State:
    cohort = state.cohort
    if cohort is None or cohort.id != event.cohort or event.life not in cohort.counting:
        return state
    before = cohort.members[event.life]
    contributions = merged(event.contributions, refused(before.contributions))
    member = _changed(before, handed=True, closed=True, reported=event.reported, contributions=contributions)
    return _changed(state, cohort=_changed(cohort, members={**cohort.members, event.life: member}))


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
    holder = _holder(cohort, wanted)
    if holder == wanted.life:
        return Claimed(answer="granted")
    if holder in cohort.lost or (holder == wanted.issuer and _has_gone(state, wanted, now)):
        return Claimed(answer="granted")
    return Claimed(answer="wait" if holder == wanted.issuer else "taken")


def _holder(cohort: Cohort, wanted: Claim) -> str:
    """The life that may have the update now."""
    return cohort.claims[wanted.ticket].holder if wanted.ticket in cohort.claims else wanted.issuer


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
    holder = _holder(cohort, wanted)
    if holder != wanted.life:
        cohort = _lose(cohort, holder)
    grant = Grant(holder=wanted.life, issuer=wanted.issuer)
    return _changed(state, cohort=_changed(cohort, claims={**cohort.claims, wanted.ticket: grant}))


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
        case "ahead" if len(state.unrecorded) < MOST_AHEAD:
            return _begin(rules, state, now)
    return None


def _settle(rules: Rules, state: State, now: float) -> tuple[State, Reports] | None:
    if len(state.presences) < rules.plan.selectors and now < state.until:
        return None
    held = [presence.held for presence in state.presences.values() if presence.held and _fits(state, presence.held)]
    if not held and len(state.unrecorded) >= MOST_AHEAD:
        return _begin(rules, state, now)
    if not held:
        return _enter(rules, _changed(state, phase="selection", until=state.began + rules.plan.selection_timeout), now)
    # One coordinator made one cohort of an attempt: should there be two, the one with more updates is worth more.
    chosen = max(held, key=lambda one: (one.reported, one.cohort))
    cohort = Cohort(id=chosen.cohort, deadline=chosen.deadline, shares=_least(chosen, held))
    for name, presence in sorted(state.presences.items()):
        cohort = _joined(cohort, Told(name=name, life=presence.life, waiting=0, held=presence.held))
    cohort = _changed(cohort, members={**_to_begin(rules.plan, state, cohort), **cohort.members})
    return _enter(rules, _changed(state, phase="configuration", cohort=cohort, until=cohort.deadline), now)


def _least(chosen: Held, held: list[Held]) -> dict[str, int]:
    """The shares of a cohort. They become less when a life is lost, and not all selectors may have heard of that."""
    told = [one.shares for one in held if one.cohort == chosen.cohort]
    return {life: min(shares.get(life, share) for shares in told) for life, share in chosen.shares.items()}


def _to_begin(plan: Plan, state: State, cohort: Cohort) -> dict[str, Member]:
    """The selectors that are here and have not begun with their part of a cohort that is taken up.

    Under a cap they select nobody: how many of which organization the others have selected is not known any more.
    """
    shares = cohort.shares if plan.clients_per_organization is None else dict.fromkeys(cohort.shares, 0)
    return {
        presence.life: Member(name=name, share=shares[presence.life])
        for name, presence in state.presences.items()
        if presence.life in shares and presence.life not in cohort.members
    }


def _fits(state: State, held: Held) -> bool:
    return (held.round, held.attempt, held.base) == (state.round, state.attempt, state.base.sha256)


def _select(rules: Rules, state: State, now: float) -> tuple[State, Reports] | None:
    plan = rules.plan
    if now < state.rests:
        return None
    there = available(plan, state)
    if there >= plan.selected_count or (now >= state.until and there >= plan.minimum_count):
        return _configure(rules, state, now)
    if now >= state.until:
        came = f"{there} of {clients(plan.selected_count)} came within {seconds(plan.selection_timeout)}"
        needed = f"at least {plan.minimum_count} were needed"
        return _abandon(rules, state, f"{came}{beyond_cap(plan, state)}, {needed}", now)
    return None


def _configure(rules: Rules, state: State, now: float) -> tuple[State, Reports]:
    parts = shares(rules.plan, state)
    cohort = Cohort(
        id=f"{rules.life}-{state.round}-{state.attempt}",
        deadline=now + rules.plan.report_timeout,
        shares={presence.life: parts[name].clients for name, presence in state.presences.items()},
        members={
            presence.life: Member(name=name, share=parts[name].clients, quotas=parts[name].quotas)
            for name, presence in state.presences.items()
        },
    )
    return _enter(rules, _changed(state, phase="configuration", cohort=cohort, until=cohort.deadline), now)


def _configured(rules: Rules, state: State, now: float) -> tuple[State, Reports] | None:
    cohort = _cohort(state)
    open_ = [member for member in cohort.counting.values() if member.selected is None and member.share]
    if open_ and now < cohort.deadline:
        return None
    if cohort.expected < rules.plan.minimum_count:
        there = f"only {cohort.expected} of {clients(rules.plan.selected_count)} could be configured"
        needed = f"at least {rules.plan.minimum_count} were needed"
        return _abandon(rules, state, f"{there}{losses(cohort)}, {needed}", now)
    return _enter(rules, _changed(state, phase="reporting"), now)


def _reported(rules: Rules, state: State, now: float) -> tuple[State, Reports] | None:
    cohort, plan = _cohort(state), rules.plan
    all_ = cohort.reported >= cohort.expected
    enough = cohort.reported >= plan.minimum_count and (all_ or now >= state.until)
    if cohort.reported >= plan.goal_count or enough:
        until = now + max(COLLECTING, plan.report_timeout)
        members = {life: _changed(member, closed=False) for life, member in cohort.members.items()}
        collecting = _changed(cohort, collections=cohort.collections + 1, members=members)
        return _changed(state, phase="collecting", cohort=collecting, until=until), []
    if cohort.expected < plan.minimum_count:  # whoever trains still trains for nothing
        can = f"no more than {cohort.expected} of {clients(plan.goal_count)} can report"
        needed = f"at least {plan.minimum_count} were needed"
        return _abandon(rules, state, f"{can}{losses(cohort)}, {needed}", now)
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
    said = telling(said, given(state.cohort))
    concluded = state
    if state.cohort is not None:
        concluded = _changed(state, ended=Ended(cohort=state.cohort.id), cohort=None)
    if final:
        reason = f"The training ended in round {state.round}: {why}."
        return _changed(concluded, phase="finished", until=math.inf, finished=reason), [said]
    again = _changed(concluded, attempt=state.attempt + 1, rests=_rests(rules.plan, state, now))
    following, reports = _begin(rules, again, now)
    return following, [said, *reports]


def _rests(plan: Plan, state: State, now: float) -> float:
    """Before when nobody is selected for the next attempt.

    One that lost its selectors ends long before its time. A selector that dies again and again would take all attempts
    within seconds, so only the first one is followed at once.
    """
    if state.cohort is None or not state.cohort.lost or now >= state.cohort.deadline or state.attempt == 1:
        return 0.0
    return min(state.began + LEASE * float(_WORSE) ** (state.attempt - 2), state.cohort.deadline)


def _begin(rules: Rules, state: State, now: float) -> tuple[State, Reports]:
    """The selection of an attempt, unless the training is too far ahead."""
    if len(state.unrecorded) >= MOST_AHEAD:
        return _enter(rules, _changed(state, phase="ahead", began=now, until=math.inf), now)
    until = max(now, state.rests) + rules.plan.selection_timeout
    return _enter(rules, _changed(state, phase="selection", began=now, until=until), now)


def _complete(rules: Rules, state: State, aggregated: Aggregated, now: float) -> tuple[State, Reports]:
    """The round's checkpoint is computed: the round counts, and the next one begins while it is being stored.

    Its report is made now. It may be sent only when the checkpoint is stored.
    """
    result, plan = aggregated.result, rules.plan
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
        checkpoint=aggregated.checkpoint,
        final=final,
        reason=f"{reason}; the training is finished" if final else reason,
    )
    said = telling(said, given(state.cohort, result))
    done = _changed(
        state,
        base=result.model,
        ended=Ended(cohort=aggregated.cohort, counted=aggregated.lives),
        cohort=None,
        rests=0.0,
        unrecorded=[*state.unrecorded, aggregated.checkpoint.key],
    )
    if final:
        return _changed(done, phase="finished", until=math.inf, finished=FINISHED), [said]
    following, reports = _begin(rules, _changed(done, round=state.round + 1, attempt=1), now)
    return following, [said, *reports]


# What selectors are told.


def orders(rules: Rules, state: State, name: str, life: str) -> Orders:
    """What this life of a selector should be doing now."""
    cohort, work = state.cohort, None
    if cohort is not None and life not in cohort.lost:
        member = cohort.members.get(life)
        shares = {one: cohort.begun(one) if one in cohort.lost else share for one, share in cohort.shares.items()}
        work = Work(
            cohort=cohort.id,
            round=state.round,
            attempt=state.attempt,
            base=state.base,
            share=member.share if member else 0,
            shares=shares,
            deadline=cohort.deadline,
            collect=collection(rules, cohort) if state.phase in ("collecting", "aggregating") else "",
            quotas=member.quotas if member else {},
            examples_per_update=rules.plan.examples_per_update,
            clip_norm=rules.plan.clip_norm,
        )
    last = state.ended
    return Orders(
        life=life,
        model=state.base,
        config=rules.plan.client_config,
        work=work,
        settling=state.phase == "settling",
        lost=(cohort is not None and life in cohort.lost) or (life in state.past and name not in state.presences),
        last=Concluded(cohort=last.cohort, counted=life in last.counted) if last else None,
        finished=state.finished,
        revoked=state.revoked,
    )


def collection(rules: Rules, cohort: Cohort) -> str:
    """The name of one collection of a cohort's sums: no earlier life of ours and no earlier try has the same."""
    return f"{rules.life}/{cohort.id}/{cohort.collections}"


def _cohort(state: State) -> Cohort:
    if state.cohort is None:
        raise AssertionError(f"{state.phase} without a cohort")
    return state.cohort


def _changed(struct: S, **changes: Any) -> S:
    return msgspec.structs.replace(struct, **changes)
