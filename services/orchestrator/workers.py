"""One worker a name, woken as often as one likes: never two of a name at once, and no wake is lost."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Final

import structlog

from fedota.errors import FedotaError
from fedota.kernel.event_log import OUTAGES

WAITED_OUT: Final = (FedotaError, *OUTAGES)
_log = structlog.get_logger(__name__)


class Workers:
    """Runs `work(name)` for each name that is woken; what fails is left to the next wake.

    Where `work` gives a number, the name is woken again after so many seconds.
    """

    def __init__(self, work: Callable[[str], Awaitable[float | None]]) -> None:
        self._work = work
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._again: set[str] = set()

    @classmethod
    @asynccontextmanager
    async def open(cls, work: Callable[[str], Awaitable[float | None]]) -> AsyncIterator["Workers"]:
        """The workers; those that are busy on the way out are cancelled."""
        workers = cls(work)
        try:
            yield workers
        finally:
            workers._again.clear()
            tasks = list(workers._tasks.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for timer in workers._timers.values():
                timer.cancel()

    def wake(self, names: Iterable[str]) -> None:
        """Let each of these be worked on, once more where it is being worked on now."""
        for name in names:
            if timer := self._timers.pop(name, None):
                timer.cancel()
            if name in self._tasks:
                self._again.add(name)
            else:
                self._tasks[name] = asyncio.create_task(self._run(name), name=f"worker {name}")

    async def _run(self, name: str) -> None:
        later = None
        try:
            later = await self._work(name)
        except WAITED_OUT as error:
            _log.warning("left for later", name=name, error=str(error) or type(error).__name__)
        except Exception:  # whatever is wrong with one must not keep the others from being worked on
            _log.exception("work failed", name=name)
        finally:
            del self._tasks[name]
        if name in self._again:
            self._again.discard(name)
            self.wake([name])
        elif later is not None:
            self._timers[name] = asyncio.get_running_loop().call_later(later, self.wake, [name])
