"""Large bodies: what those that come and those that go have in common.

aiohttp hands a body over in pieces that were copied three times on their way, which for tensors of many megabytes is
much of a round's work. So large bodies go past it, straight between the socket and where they are wanted; see
`receiving` and `sending`. Whoever is too slow is cut off: what came is kept, and gone on with.
"""

from time import monotonic
from typing import Final

STALL: Final = 20.0  # seconds without a byte after which a body is cut off
SMALL: Final = 1 << 18  # bytes below which a connection of its own costs more than the copies
_SLOWEST: Final = 16_384  # bytes a second: whoever is slower takes a place from those who are not


def too_slow(moved: int, began: float) -> bool:
    """Whether so many bytes since then are so few that the line is given up."""
    return monotonic() - began > 2 * STALL + moved / _SLOWEST


def broken() -> ConnectionResetError:
    """The error that a line broke."""
    return ConnectionResetError("The connection was closed in the middle of a body.")
