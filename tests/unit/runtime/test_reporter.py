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
        self.refusing = asyncio.Event()

    async def send(self, report: Report) -> None:
        """Record a report."""
        self.tried += 1
        if self.failures:
            raise self.failures.pop(0)
        if self.refusing.is_set():
            self.changed.set()
            raise FedotaError("unavailable")
        self.recorded.append((report.update.report, report.update.stage, report.update.waiting))
        self.changed.set()

    async def was_tried(self) -> None:
        """Wait until somebody has tried in vain."""
        await asyncio.wait_for(self.changed.wait(), 5)

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
    one.tell([update("selection")])
    one.tell([update("configuration")])
    async with sending(one):
        await log.has(2)
        one.tell([update("reporting")])
        await log.has(3)
    assert log.recorded == [(8, "selection", 0), (9, "configuration", 0), (10, "reporting", 0)]
    assert one.waiting == 0


async def test_a_report_is_sent_until_it_is_recorded() -> None:
    """Always with the same number: nothing overtakes it."""
    log = Log(FedotaError("unavailable"), FedotaError("timeout"), msgspec.DecodeError("?"), FedotaError("conflict"))
    one = Reporter(log.send, 0)
    one.tell([update("selection")])
    one.tell([update("configuration")])
    async with sending(one):
        await log.has(2)
    assert log.tried == 6
    assert [number for number, _, _ in log.recorded] == [1, 2]


async def test_a_refused_report_ends_it() -> None:
    """Nothing that comes after it could be recorded."""
    log = Log(FedotaError("report_refused", "no"))
    one = Reporter(log.send, 0)
    one.tell([update()])
    async with sending(one) as task:
        with pytest.raises(FedotaError, match="no"):
            await asyncio.wait_for(task, 5)
    assert log.tried == 1


async def test_of_mere_counts_only_the_latest_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while, and only when they are not what was told last."""
    monkeypatch.setattr(reporter, "_PACE", 0.05)
    log, now = Log(), update("selection")
    one = Reporter(log.send, 0, counts=lambda: now)
    one.tell([update("selection")])
    async with sending(one):
        await log.has(1)
        one.counts_changed()  # but they are what was told
        for waiting in range(1, 6):
            now = update("selection", waiting)
            one.counts_changed()
        assert one.waiting == 1
        await log.has(2)
        now = update("configuration", 5)
        one.tell([now])
        one.counts_changed()
        await log.has(3)
        now = update("reporting", 1)
        one.counts_changed()
        await log.has(4)
    assert log.recorded == [(1, "selection", 0), (2, "selection", 5), (3, "configuration", 5), (4, "reporting", 1)]


async def test_a_report_that_is_held_holds_those_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meanwhile what there is to say is said once, before it, and all numbers follow."""
    monkeypatch.setattr(reporter, "_PACE", 0.0)
    log, held, why = Log(), True, "the store is down"
    kept: list[list[tuple[int, str]]] = []

    def meanwhile(_: RoundUpdated) -> RoundUpdated | None:
        return msgspec.structs.replace(update("reporting"), reason=why) if why else None

    one = Reporter(
        log.send,
        4,
        held=lambda report: held and report.stage == "completed",
        meanwhile=meanwhile,
        keep=lambda reports: kept.append([(report.report, report.stage) for report in reports]),
    )
    one.tell([update("reporting")])
    one.tell([update("completed"), update("selection")])
    assert kept == [[(5, "reporting"), (6, "completed")]], "what comes after it is not kept"
    async with sending(one):
        await log.has(2)
        assert kept[1] == [(6, "reporting"), (7, "completed")]
        one.look_again()  # but there is nothing new
        why = "the store is full"
        one.look_again()
        await log.has(3)
        assert kept[2] == [(7, "reporting"), (8, "completed")]
        assert one.waiting == 2
        held = False
        one.look_again()
        await log.has(5)
    assert [(number, stage) for number, stage, _ in log.recorded] == [
        (5, "reporting"),
        (6, "reporting"),
        (7, "reporting"),
        (8, "completed"),
        (9, "selection"),
    ]
    assert len(kept) == 3


async def test_what_is_kept_begins_with_the_report_that_is_being_sent() -> None:
    """Its number and its words must be the same when it is sent again by another life."""
    log = Log()
    log.refusing.set()
    kept: list[list[RoundUpdated]] = []
    one = Reporter(log.send, 0, counts=lambda: update("selection", 3), keep=lambda them: kept.append(list(them)))
    one.counts_changed()
    async with sending(one):
        await log.was_tried()
        one.tell([update("configuration", 3)])
        one.tell([update("abandoned", 3), update("selection")])
    assert [(report.report, report.stage) for report in kept[0]] == [
        (1, "selection"),
        (2, "configuration"),
        (3, "abandoned"),
    ]
    log.refusing.clear()
    other = Reporter(log.send, 0)
    other.restore(kept[0])
    other.tell([update("selection")])
    async with sending(other):
        await log.has(4)
    assert log.recorded == [(1, "selection", 3), (2, "configuration", 3), (3, "abandoned", 3), (4, "selection", 0)]


async def test_what_cannot_be_kept_is_not_told() -> None:
    """A full disk: the report is not on its way either."""

    def keep(_: object) -> None:
        raise OSError("No space left on device")

    one = Reporter(Log().send, 0, keep=keep)
    with pytest.raises(OSError, match="No space"):
        one.tell([update("abandoned")])
    assert one.waiting == 0
