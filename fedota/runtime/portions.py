"""How much of something scarce one organization may hold while others may want some. Pure."""

from collections import Counter
from typing import Final

_GREED: Final = 3  # times what is free that one may hold


class Portions:
    """So much of something, shared by whoever comes; nobody holds more than three times what is left.

    Alone one gets three quarters of all, two get three sevenths each: something is always left for who has nothing
    yet, however long the others keep theirs. Where there are many organizations all of it is used.
    """

    def __init__(self, most: int) -> None:
        self._free = most
        self._held: Counter[str] = Counter()

    def held(self, who: str) -> int:
        """How much one has."""
        return self._held[who]

    def admits(self, who: str, amount: int = 1) -> bool:
        """Whether one may have so much more."""
        return amount <= self._free and self._held[who] + amount <= _GREED * self._free

    def take(self, who: str, amount: int = 1) -> None:
        """One has so much more. Ask `admits` before."""
        self._free -= amount
        self._held[who] += amount

    def give_back(self, who: str, amount: int = 1) -> None:
        """One needs so much no more."""
        self._free += amount
        self._held[who] -= amount
        if not self._held[who]:
            del self._held[who]
