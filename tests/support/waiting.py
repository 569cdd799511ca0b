"""Waiting for what must happen, instead of for some time."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Final

_PATIENCE: Final = 20.0  # seconds that a test waits for what must happen
_PAUSE: Final = 0.02  # seconds between two looks


async def until(look: Callable[[], Awaitable[Any]], what: str = "", patience: float = _PATIENCE) -> Any:
    """What `look` (an async function without arguments) gives as soon as that is true."""
    last: Any = None
    with suppress(TimeoutError):
        async with asyncio.timeout(patience):
            while True:
                with suppress(TimeoutError):  # the look's own: not yet
                    if last := await look():
                        return last
                await asyncio.sleep(_PAUSE)
    raise AssertionError(f"still not so after {patience:.0f} s: {what or look}; last seen: {last!r}")
