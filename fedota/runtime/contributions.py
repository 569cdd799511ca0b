"""Who gave what: accepted and refused updates, summed by organization."""

from collections.abc import Iterable

import msgspec

from fedota.events.rounds import Contribution
from fedota.runtime.protocol import Accepted


class Contributions:
    """A running account. It grows with organizations, not with updates."""

    def __init__(self, told: Iterable[Contribution] = ()) -> None:
        self._of: dict[str, Contribution] = {}
        for one in told:
            self.add(one)

    @property
    def told(self) -> list[Contribution]:
        """One for each organization, by name."""
        return [self._of[organization] for organization in sorted(self._of)]

    def accept(self, one: Accepted) -> None:
        """An update is in the sum."""
        self.add(
            Contribution(
                organization=one.organization,
                updates=1,
                examples=one.examples,
                size=one.size,
                seconds=round(one.seconds, 3),
                clipped=int(one.clipped),
            )
        )

    def refuse(self, organization: str, code: str) -> None:
        """An update was not taken, for the reason that has this code."""
        self.add(Contribution(organization=organization, refusals={code: 1}))

    def add(self, more: Contribution) -> None:
        """What was counted elsewhere."""
        had = self._of.get(more.organization)
        if had is None:
            self._of[more.organization] = more
            return
        refusals = dict(had.refusals)
        for code, count in more.refusals.items():
            refusals[code] = refusals.get(code, 0) + count
        self._of[more.organization] = Contribution(
            organization=more.organization,
            updates=had.updates + more.updates,
            examples=had.examples + more.examples,
            size=had.size + more.size,
            seconds=max(had.seconds, more.seconds),
            clipped=had.clipped + more.clipped,
            refusals=refusals,
        )


def of_updates(accepted: Iterable[Accepted]) -> list[Contribution]:
    """What these updates come to."""
    account = Contributions()
    for one in accepted:
        account.accept(one)
    return account.told


def merged(*accounts: Iterable[Contribution]) -> list[Contribution]:
    """Several accounts as one."""
    return Contributions(one for account in accounts for one in account).told


def counted(account: Iterable[Contribution]) -> list[Contribution]:
    """Only what was accepted."""
    return [msgspec.structs.replace(one, refusals={}) for one in account if one.updates]


def refused(account: Iterable[Contribution]) -> list[Contribution]:
    """Only what was refused."""
    return [Contribution(organization=one.organization, refusals=one.refusals) for one in account if one.refusals]
