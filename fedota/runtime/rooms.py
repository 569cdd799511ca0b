"""Memory for large bodies that is used again.

Fresh memory has to be cleared by the kernel, page by page, which takes longer than filling it: it was two fifths of a
coordinator's work in a round with two sums of 80 MB.
"""

import sys
from typing import Final

import numpy as np
from numpy.typing import NDArray

_LARGEST: Final = 256 * 1024**2  # bytes; what is larger is given back between two uses
_UNUSED: Final = next(sys.getrefcount(held) for held in [object()])  # as a loop over a list sees what only that holds


class Rooms:
    """At most `most` rooms are held, all of the size that was asked for last.

    A room is free again when nobody holds any part of it any more: no view, no slice, no array over it.
    """

    def __init__(self, most: int = 1) -> None:
        self._most = most
        self._held: list[NDArray[np.uint8]] = []

    def room(self, size: int) -> memoryview:
        """Memory for so many bytes, with anything in it."""
        self._held = [held for held in self._held if held.nbytes == size]
        if (free := next((held for held in self._held if sys.getrefcount(held) == _UNUSED), None)) is not None:
            return free.data
        new = np.empty(size, np.uint8)
        if size <= _LARGEST and len(self._held) < self._most:
            self._held.append(new)
        return new.data
