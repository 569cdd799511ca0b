"""Pace steering (Bonawitz et al. 2019, 2.3): when the clients that are sent away are to come back. Pure; time is input.

Clients that were sent away together would come back together, however many they are. So each is given a moment of its
own: so many a second and no more, one behind the other. Clients name themselves, so a single organization may send away
as many as it likes: each has a queue of its own, and room is left for those of one more.
"""

from collections import deque
from math import ceil
from random import Random
from typing import Final

RATE: Final = 200.0  # clients a second that one selector asks back
SOON: Final = 1.0  # seconds, at least
LATEST: Final = 3600.0  # seconds; however many there are, none is sent away for longer
_HOLD: Final = 25.0  # seconds of a client's long poll: below what proxies commonly allow
_REMEMBERED: Final = 8  # rounds by which the next one is judged
_LANES: Final = 128
_FORGETTING: Final = 1.0  # seconds between two looks at whose slots have passed


class _Slots:
    """Moments, each given away once, `rate` of them in a second, in turn from as many lanes.

    Slots are numbered from the clock's beginning, and that of number n is in lane n modulo `_LANES`. Where there are n
    organizations with slots to come, each may be in one of n + 1 parts of the lanes, and takes the first slot that is
    free there. So who takes all that there are for an hour leaves others half of them at least.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._free = list(range(_LANES))  # by lane, the first slot that is free
        self._queues: dict[str, dict[int, int]] = {}  # by organization, its last slot in each lane that it is in
        self._swept = 0.0

    def take(self, organization: str, now: float, earliest: float, latest: float) -> float | None:
        """The first one that is free; None when that would be too late."""
        self._forget(now)
        queue = self._queues.get(organization, {})
        first = ceil(earliest * self._rate)
        slot = min(self._next(lane, first) for lane in self._lanes(queue))
        if slot > latest * self._rate:
            return None
        self._free[slot % _LANES] = slot + _LANES
        queue[slot % _LANES] = slot
        self._queues[organization] = queue
        return slot / self._rate

    def _next(self, lane: int, first: int) -> int:
        """The first slot in the lane that is free and not before the `first`."""
        return max(self._free[lane], first + (lane - first) % _LANES)

    def _lanes(self, queue: dict[int, int]) -> list[int] | range:
        """Where it may take a slot: anywhere until it is in as many lanes as it may be, then there."""
        organizations = len(self._queues) + (not queue)
        most = max(1, _LANES // (organizations + 1))
        return sorted(queue)[:most] if len(queue) >= most else range(_LANES)

    def _forget(self, now: float) -> None:
        """Drop what has passed, and whoever has nothing to come."""
        if now - self._swept < _FORGETTING:
            return
        self._swept, past = now, now * self._rate
        left = (
            (name, {lane: slot for lane, slot in queue.items() if slot >= past}) for name, queue in self._queues.items()
        )
        self._queues = {name: queue for name, queue in left if queue}


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

    def soon(self, now: float, organization: str) -> float:
        """Seconds after which a client comes back that is waited for, or that nobody can have now."""
        return self._seconds(self._soon, organization, now, now + SOON)

    def later(self, now: float, organization: str) -> float:
        """Seconds after which a client comes back for whom there is no room: not before there can be work."""
        return self._seconds(self._later, organization, now, max(now + SOON, self.work(now)))

    def hold(self) -> float:
        """Seconds that a client's long poll lasts: those that came together do not end together."""
        return self._chance.uniform(_HOLD / 2, _HOLD)

    def _seconds(self, slots: _Slots, organization: str, now: float, earliest: float) -> float:
        slot = slots.take(organization, now, earliest, now + LATEST)
        return slot - now if slot is not None else self._chance.uniform(LATEST / 2, LATEST)
