"""Resources that come up, and go down, beside each other."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager


@asynccontextmanager
async def entered(managers: Sequence[AbstractAsyncContextManager[None]]) -> AsyncIterator[None]:
    """Enter all at once and leave all at once. When one cannot be entered the others are left again."""
    up: list[asyncio.Event] = [asyncio.Event() for _ in managers]
    down = asyncio.Event()

    async def hold(manager: AbstractAsyncContextManager[None], ready: asyncio.Event) -> None:
        async with manager:
            ready.set()
            await down.wait()

    tasks = [asyncio.create_task(hold(*pair)) for pair in zip(managers, up, strict=True)]
    arrival = asyncio.ensure_future(asyncio.gather(*(ready.wait() for ready in up)))
    try:
        await asyncio.wait([arrival, *tasks], return_when=asyncio.FIRST_COMPLETED)
        if arrival.done():
            yield
    finally:
        arrival.cancel()
        if not all(ready.is_set() for ready in up):
            for task in tasks:
                task.cancel()
        down.set()
        await asyncio.gather(arrival, return_exceptions=True)
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
            raise result
