"""How many clients each selector selects, and of each organization: over all selectors no more than the cap."""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from fedota.events.problems import Plan
from fedota.runtime.coordinator.state import Presence, State


class Share(NamedTuple):
    """A selector's part: so many clients, and of an organization no more than its quota. No quotas, no cap."""

    clients: int
    quotas: dict[str, int]


def available(plan: Plan, state: State) -> int:
    """The clients that wait and may be selected."""
    cap = plan.clients_per_organization
    if cap is None:
        return state.waiting
    return sum(min(count, cap) for count in _by_organization(state.presences).values())


def shares(plan: Plan, state: State) -> dict[str, Share]:
    """Each selector's part of the clients that a round selects."""
    wanted, cap = min(plan.selected_count, available(plan, state)), plan.clients_per_organization
    if cap is None:
        waiting = {name: presence.waiting for name, presence in state.presences.items()}
        return {name: Share(count, {}) for name, count in share_out(wanted, waiting).items()}
    quotas = _quotas(cap, state.presences)
    counts = share_out(wanted, {name: sum(quotas[name].values()) for name in quotas})
    return {name: Share(counts[name], quotas[name]) for name in quotas}


def _by_organization(presences: Mapping[str, Presence]) -> Counter[str]:
    total: Counter[str] = Counter()
    for presence in presences.values():
        total.update(presence.organizations)
    return total


def _quotas(cap: int, presences: Mapping[str, Presence]) -> dict[str, dict[str, int]]:
    """What each selector may take of each organization; over all selectors no more than the cap."""
    quotas: dict[str, dict[str, int]] = {name: {} for name in presences}
    for organization, count in _by_organization(presences).items():
        waiting = {name: presence.organizations.get(organization, 0) for name, presence in presences.items()}
        for name, quota in share_out(min(cap, count), waiting).items():
            if quota:
                quotas[name][organization] = quota
    return quotas


def share_out(wanted: int, waiting: dict[str, int]) -> dict[str, int]:
    """So many clients, by each selector's part of those that wait; never more than a selector has."""
    total = sum(waiting.values())
    shares = {name: wanted * count // total if total else 0 for name, count in waiting.items()}
    for name in sorted(waiting, key=lambda name: (shares[name] - wanted * waiting[name] / max(total, 1), name)):
        if sum(shares.values()) < wanted and shares[name] < waiting[name]:
            shares[name] += 1
    return shares
