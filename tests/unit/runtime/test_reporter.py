"""Reports on their way."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from fedota.contracts.runtime import Report
from fedota.errors import FedotaError
from fedota.events.rounds import RoundUpdated
from fedota.runtime.coordinator import platform, reporter
from fedota.runtime.coordinator.reporter import Reporter


def update(stage: Any = "selection", waiting: int = 0) -> RoundUpdated:
    """A report without its number."""
    return RoundUpdated(
        problem_id="p",
        run=1,
        report=0,
        round=1,
        attempt=1,
        stage=stage,
        goal_count=3,
        minimum_count=3,
        waiting=waiting,
    )


class Log:
    """Where reports go; `failures` are raised first."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.tried = 0
        self.recorded: list[tuple[int, str, int]] = []
        self.changed = asyncio.Event()

    async def send(self, report: Report) -> None:
        """Record a report."""
        self.tried += 1
        if self.failures:
            raise self.failures.pop(0)
        self.recorded.append((report.update.report, report.update.stage, report.update.waiting))
        self.changed.set()

    async def has(self, count: int) -> None:
        """Wait for so many."""
        async with asyncio.timeout(5):
            while len(self.recorded) < count:
                self.changed.clear()
                await self.changed.wait()


@asynccontextmanager
async def sending(one: Reporter) -> AsyncIterator["asyncio.Task[None]"]:
    """At work within this."""
    task = asyncio.create_task(one.run())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait({task})


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits for its turn."""
    monkeypatch.setattr(platform, "_FIRST_DELAY", 0.001)


async def test_every_stage_is_told_in_order_with_the_numbers_after_the_last() -> None:
    """Also those that came before anybody sent."""
    log = Log()
    one = Reporter(log.send, 7)
    one.tell(update("selection"))
    one.tell(update("configuration"))
    async with sending(one):
        await log.has(2)
        one.tell(update("reporting"))
        await log.has(3)
    assert log.recorded == [(8, "selection", 0), (9, "configuration", 0), (10, "reporting", 0)]
    assert one.waiting == 0


async def test_a_report_is_sent_until_it_is_recorded() -> None:
    """Always with the same number: nothing overtakes it."""
    log = Log(FedotaError("unavailable"), FedotaError("timeout"), msgspec.DecodeError("?"), FedotaError("conflict"))
    one = Reporter(log.send, 0)
    one.tell(update("selection"))
    one.tell(update("configuration"))
    async with sending(one):
        await log.has(2)
    assert log.tried == 6
    assert [number for number, _, _ in log.recorded] == [1, 2]


async def test_a_refused_report_ends_it() -> None:
    """Nothing that comes after it could be recorded."""
    log = Log(FedotaError("report_refused", "no"))
    one = Reporter(log.send, 0)
    one.tell(update())
    async with sending(one) as task:
        with pytest.raises(FedotaError, match="no"):
            await asyncio.wait_for(task, 5)
    assert log.tried == 1


async def test_of_mere_counts_only_the_latest_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while, and only when they are not what was told last."""
    monkeypatch.setattr(reporter, "_PACE", 0.05)
    log, now = Log(), update("selection")
    one = Reporter(log.send, 0, lambda: now)
    one.tell(update("selection"))
    async with sending(one):
        await log.has(1)
        one.counts_changed()  # but they are what was told
        for waiting in range(1, 6):
            now = update("selection", waiting)
            one.counts_changed()
        assert one.waiting == 1
        await log.has(2)
        now = update("configuration", 5)
        one.tell(now)
        one.counts_changed()
        await log.has(3)
        now = update("reporting", 1)
        one.counts_changed()
        await log.has(4)
    assert log.recorded == [(1, "selection", 0), (2, "selection", 5), (3, "configuration", 5), (4, "reporting", 1)]
