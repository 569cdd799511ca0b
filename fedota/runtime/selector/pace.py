"""Pace steering (Bonawitz et al. 2019, 2.3): when the clients that are sent away are to come back. Pure; time is input.

Clients that were sent away together would come back together, however many they are. So each is given a moment of its
own: so many a second and no more, one behind the other.
"""

from collections import deque
from random import Random
from typing import Final

RATE: Final = 200.0  # clients a second that one selector asks back
SOON: Final = 1.0  # seconds, at least
LATEST: Final = 3600.0  # seconds; however many there are, none is sent away for longer
_HOLD: Final = 25.0  # seconds of a client's long poll: below what proxies commonly allow
_REMEMBERED: Final = 8  # rounds by which the next one is judged


class _Slots:
    """Moments, each given away once."""

    def __init__(self, rate: float) -> None:
        self._gap = 1 / rate
        self._free = 0.0

    def take(self, earliest: float, latest: float) -> float | None:
        """The first one that is free; None when that would be too late."""
        slot = max(earliest, self._free)
        if slot > latest:
            return None
        self._free = slot + self._gap
        return slot


class Pace:
    """One selector's. `now` is in seconds of a clock that only goes forward."""

    def __init__(self, chance: Random, rate: float = RATE) -> None:
        self._chance = chance
        self._soon = _Slots(rate / 2)
        self._later = _Slots(rate / 2)
        self._began: float | None = None
        self._until = 0.0
        self._lengths: deque[float] = deque(maxlen=_REMEMBERED)
        self._running = False

    def round_began(self, now: float, deadline: float) -> None:
        """A cohort was selected; at the deadline it is over at the latest."""
        if self._began is not None:
            self._lengths.append(now - self._began)
        self._began, self._until, self._running = now, deadline, True

    def round_ended(self) -> None:
        """There is none now: the next one may begin at any moment."""
        self._running = False

    def work(self, now: float) -> float:
        """The soonest moment at which there can be work for a client that comes now, as the rounds before tell.

        As short as the shortest of the last ones: a client that comes too early only comes again, one that comes too
        late is missed.
        """
        if not self._running or self._began is None or not self._lengths:
            return now
        return max(now, min(self._began + min(self._lengths), self._until))

    def soon(self, now: float) -> float:
        """Seconds after which a client comes back that is waited for, or that nobody can have now."""
        return self._seconds(self._soon, now, now + SOON)

    def later(self, now: float) -> float:
        """Seconds after which a client comes back for whom there is no room: not before there can be work."""
        return self._seconds(self._later, now, max(now + SOON, self.work(now)))

    def hold(self) -> float:
        """Seconds that a client's long poll lasts: those that came together do not end together."""
        return self._chance.uniform(_HOLD / 2, _HOLD)

    def _seconds(self, slots: _Slots, now: float, earliest: float) -> float:
        slot = slots.take(earliest, now + LATEST)
        return slot - now if slot is not None else self._chance.uniform(LATEST / 2, LATEST)
