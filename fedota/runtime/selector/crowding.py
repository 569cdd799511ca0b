"""When updates are to come again that found no place: spread over the time in which so many are taken. Pure."""

import math
from collections import deque
from typing import Final

_JUDGED: Final = 64  # of the latest updates
_UNKNOWN: Final = 5  # seconds, as long as nothing is known
_LONGEST: Final = 60  # seconds


class Crowding:
    """How fast updates are taken while there are any. `now` is in seconds of a clock that only goes forward."""

    def __init__(self) -> None:
        self._since = 0.0
        self._took: deque[float] = deque(maxlen=_JUDGED)

    def begins(self, now: float) -> None:
        """An update comes while no other is on its way: the time before tells nothing."""
        self._since = now

    def taken(self, now: float) -> None:
        """One more is in the sum."""
        self._took.append(now - self._since)
        self._since = now

    def seconds(self, left: int) -> int:
        """Whole seconds in which so many more are taken, at the pace of the latest ones; at least one."""
        if not self._took:
            return _UNKNOWN
        return max(1, min(_LONGEST, math.ceil(left * sum(self._took) / len(self._took))))
