"""One worker a name, and no wake is lost."""

import asyncio

from fedota.errors import FedotaError
from services.orchestrator.workers import Workers


class Work:
    """Records what is worked on; each piece ends when it is let go."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.at_once: dict[str, int] = {}
        self.gates: dict[str, asyncio.Semaphore] = {}
        self.errors: list[Exception] = []

    async def __call__(self, name: str) -> None:
        """Work on `name`, alone."""
        self.begun.append(name)
        self.at_once[name] = self.at_once.get(name, 0) + 1
        assert self.at_once[name] == 1, "two at once"
        try:
            await self.gate(name).acquire()
            if self.errors:
                raise self.errors.pop()
        finally:
            self.at_once[name] -= 1

    def gate(self, name: str) -> asyncio.Semaphore:
        """What `name` waits at."""
        return self.gates.setdefault(name, asyncio.Semaphore(0))


async def _rest() -> None:
    """Let every task go as far as it can."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_wake_while_working_means_once_more() -> None:
    """Once, however many they were; a slow one holds up no other."""
    work = Work()
    async with Workers.open(work) as workers:
        workers.wake(["a", "b"])
        await _rest()
        workers.wake(["a"])
        workers.wake(["a"])
        work.gate("b").release()
        await _rest()
        workers.wake(["b"])
        await _rest()
        assert work.begun == ["a", "b", "b"]
        work.gate("a").release()
        await _rest()
        assert work.begun == ["a", "b", "b", "a"]
        work.gate("a").release()
        await _rest()
        assert work.begun == ["a", "b", "b", "a"]


async def test_what_fails_is_left_to_the_next_wake() -> None:
    """Foreseen or not; a wake that came meanwhile is served at once."""
    work = Work()
    work.errors = [RuntimeError("made up"), FedotaError("unavailable")]
    async with Workers.open(work) as workers:
        for count in (1, 2, 3):
            workers.wake(["a"])
            await _rest()
            assert work.begun == ["a"] * count
            work.gate("a").release()
            await _rest()
        work.errors = [RuntimeError("made up")]
        workers.wake(["a"])
        await _rest()
        workers.wake(["a"])
        work.gate("a").release()
        await _rest()
        assert work.begun == ["a"] * 5


async def test_work_that_asks_for_it_is_done_again_later() -> None:
    """Unless it was woken before: then what it says that time counts."""
    begun: list[str] = []
    left = [60.0, 0.001]
    twice = asyncio.Event()

    async def work(name: str) -> float | None:
        begun.append(name)
        if len(begun) == 3:
            twice.set()
        return left.pop(0) if left else None

    async with Workers.open(work) as workers:
        workers.wake(["a"])
        await _rest()
        assert begun == ["a"]
        workers.wake(["a"])
        await asyncio.wait_for(twice.wait(), 5)
        await _rest()
        assert workers._timers == {}


async def test_on_the_way_out_no_later_work_is_left() -> None:
    """It would find everything closed."""
    begun: list[str] = []

    async def work(name: str) -> float:
        begun.append(name)
        return 0.0

    async with Workers.open(work) as workers:
        workers.wake(["a"])
        async with asyncio.timeout(5):
            while not workers._timers:  # noqa: ASYNC110 - it is set in the step that ends the first
                await asyncio.sleep(0)
        before = len(begun)
    await _rest()
    assert len(begun) == before


async def test_on_the_way_out_nothing_goes_on() -> None:
    """What is at work is cancelled, and not begun again."""
    work = Work()
    async with Workers.open(work) as workers:
        workers.wake(["a"])
        await _rest()
        workers.wake(["a"])
    await _rest()
    assert work.begun == ["a"]
    assert work.at_once == {"a": 0}
