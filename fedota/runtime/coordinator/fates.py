"""What became of the updates of the last cohorts, for clients that ask where nobody else can know."""

from collections.abc import Iterable
from typing import Final, Literal

_MOST_TICKETS: Final = 100_000  # some 15 MB
_MOST_COHORTS: Final = 256


class Fates:
    """Remembers which tickets' updates are part of a checkpoint, of as many cohorts as there is room for."""

    def __init__(self) -> None:
        self._counted: dict[str, frozenset[str]] = {}  # by cohort, the newest last
        self._tickets = 0

    def ended(self, cohort: str, counted: Iterable[str] = ()) -> None:
        """A cohort is over; the updates of the tickets `counted` are part of a checkpoint, and no others of it."""
        self._counted[cohort] = tickets = frozenset(counted)
        self._tickets += len(tickets)
        while len(self._counted) > _MOST_COHORTS or (self._tickets > _MOST_TICKETS and len(self._counted) > 1):
            self._tickets -= len(self._counted.pop(next(iter(self._counted))))

    def of(self, cohort: str, ticket: str) -> Literal["counted", "left_out"] | None:
        """What became of an update; None of a cohort that is not over, or not remembered."""
        if (counted := self._counted.get(cohort)) is None:
            return None
        return "counted" if ticket in counted else "left_out"
