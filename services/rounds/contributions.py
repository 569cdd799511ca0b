"""What can be wrong with the contributions that a report tells: pure functions, no I/O."""

import math
import re
from typing import Final

from fedota.events.problems import Plan
from fedota.events.rounds import Contribution, RoundUpdated

_MOST: Final = 2**53  # what every reader of JSON can count to
_MOST_CODES: Final = 64
_CODE: Final = re.compile(r"[a-z][a-z_]{0,63}")


def contributions_fault(plan: Plan, update: RoundUpdated) -> str | None:
    """Why these contributions cannot be; None when they can.

    An attempt of very many organizations leaves some out, and so may one of an older coordinator: then what is told is
    a part of the report's counts, else it is all of them.
    """
    if not update.contributions:
        return None
    if update.stage not in ("completed", "abandoned"):
        return f"stage {update.stage} tells no contributions, only the end of an attempt does."
    if len({one.organization for one in update.contributions}) < len(update.contributions):
        return "an organization's contribution is told twice."
    for one in update.contributions:
        if fault := _number_fault(one) or _cap_fault(plan, one) or _refusal_fault(one):
            return f"the contribution of {one.organization}: {fault}"
    return _total_fault(update)


def _number_fault(one: Contribution) -> str | None:
    for name in ("updates", "examples", "size", "clipped"):
        count = getattr(one, name)
        if not 0 <= count <= _MOST:
            return f"{name} is {count}, not between 0 and {_MOST}."
    if not (math.isfinite(one.seconds) and one.seconds >= 0):
        return f"{one.seconds} seconds is no duration."
    if one.examples < one.updates or (one.examples and not one.updates):
        return f"{one.updates} updates cannot weigh {one.examples} examples."
    if one.clipped > one.updates:
        return f"{one.clipped} of {one.updates} updates cannot have been clipped."
    return None


def _cap_fault(plan: Plan, one: Contribution) -> str | None:
    """What the plan's caps say against it."""
    clients, examples = plan.clients_per_organization, plan.examples_per_update
    if clients is not None and one.updates > clients:
        return f"{one.updates} updates, but the plan selects at most {clients} clients of an organization."
    if examples is not None and one.examples > one.updates * examples:
        return f"{one.examples} examples, but the plan lets an update weigh at most {examples}."
    if one.clipped and plan.clip_norm is None:
        return f"{one.clipped} updates were clipped, but the plan clips none."
    return None


def _refusal_fault(one: Contribution) -> str | None:
    if len(one.refusals) > _MOST_CODES or not all(_CODE.fullmatch(code) for code in one.refusals):
        return "refusals are counted by error code."
    if not all(1 <= count <= _MOST for count in one.refusals.values()):
        return f"a count of refusals is between 1 and {_MOST}."
    return None


def _total_fault(update: RoundUpdated) -> str | None:
    givers = {one.organization for one in update.contributions if one.updates}
    participants = set(update.participants)
    if strangers := givers - participants:
        return f"{min(strangers)} gave an update and is not among the participants."
    for name, count in (("updates", update.reported), ("examples", update.examples)):
        told = sum(getattr(one, name) for one in update.contributions)
        if told > count or (told < count and givers == participants):
            return f"the contributions come to {told} {name}, the report to {count}."
    return None
