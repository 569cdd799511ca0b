"""What coordinators report, over NATS from their own accounts, recorded in PostgreSQL."""

import asyncio
from typing import Any

import msgspec
import nats.errors
import pytest

from fedota.contracts.runtime import REPORT_BYTES, Report
from fedota.errors import FedotaError
from fedota.events import to_json
from fedota.events.problems import ParticipationRevoked, Plan, ProblemStopped
from fedota.kernel.database import connect_pool
from fedota.kernel.event_log import EventLog
from fedota.kernel.projection import Projector
from fedota.kernel.rebuilding import rebuild, verify
from services.rounds.projection import PROJECTION, load
from tests.integration.rounds.coordinator import Coordinator
from tests.integration.rounds.world import CLINIC, World, told, training
from tests.support.services import new_id, until


async def refused(coordinator: Coordinator, update: Any) -> str:
    """The words that a report is refused with."""
    with pytest.raises(FedotaError) as caught:
        await coordinator.report(update)
    assert caught.value.problem.code == "report_refused"
    return caught.value.problem.detail


async def test_a_training_from_its_first_to_its_last_report(served: World) -> None:
    """All is recorded as it was said, and goes back to the start of the run."""
    problem_id = await served.start()
    async with served.coordinator(problem_id) as coordinator:
        positions = [await coordinator.report(update) for update in training(problem_id)]
        assert "final" in await refused(coordinator, told(problem_id, "selection", 13, 4))
    events = await served.platform.events(f"rounds/{problem_id}")
    assert [event.data for event in events] == training(problem_id)
    assert [event.position for event in events] == positions
    [*_, started] = await served.platform.events(f"problems/{problem_id}")
    origins = {(event.actor, event.causation, event.correlation) for event in events}
    assert origins == {(f"coordinator:{problem_id}", started.id, started.correlation)}


async def test_the_same_report_again(served: World) -> None:
    """The same content gives the same position, however old; other content under a number that was used is refused."""
    problem_id = await served.start()
    updates = training(problem_id)[:6]
    async with served.coordinator(problem_id) as coordinator:
        positions = [await coordinator.report(update) for update in updates]
        assert [await coordinator.report(update) for update in updates] == positions
        other = msgspec.structs.replace(updates[3], examples=1)
        assert await refused(coordinator, other) == "Report 4 was recorded with other content. Ask where to resume."
        await served.platform.record(ProblemStopped(problem_id=problem_id, run=1, reason="enough"))
        assert (await coordinator.resume()).finished  # the news has come
        assert "is over (enough)" in await refused(coordinator, told(problem_id, "reporting", 7, 2))
        assert await coordinator.report(updates[-1]) == positions[-1]
    assert await served.reports(problem_id) == updates


async def test_one_report_sent_many_times_at_once(served: World) -> None:
    """A coordinator that lost the answer may shout: it is recorded once, with one position."""
    problem_id = await served.start()
    update = told(problem_id, "selection", 1)
    async with served.coordinator(problem_id) as coordinator:
        positions = await asyncio.gather(*(coordinator.report(update) for _ in range(20)))
    assert len(set(positions)) == 1
    assert await served.reports(problem_id) == [update]


async def test_two_coordinators_of_one_run(world: World) -> None:
    """One that was taken for dead and comes back writes no second story: of each number, one report is recorded."""
    problem_id = await world.start()
    async with world.running(), world.running(), world.coordinator(problem_id) as coordinator:
        recorded = []
        for number in range(1, 11):
            claims = [told(problem_id, "selection", number, waiting=waiting) for waiting in range(4)]
            outcomes = await asyncio.gather(*(coordinator.report(claim) for claim in claims), return_exceptions=True)
            [winner] = [claim for claim, outcome in zip(claims, outcomes, strict=True) if isinstance(outcome, int)]
            recorded.append(winner)
            for outcome in outcomes:
                if isinstance(outcome, BaseException):
                    assert isinstance(outcome, FedotaError)
                    assert outcome.problem.code == "report_refused"
    assert await world.reports(problem_id) == recorded


async def test_a_run_that_begins_while_a_report_of_the_last_one_is_judged(
    served: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was decided on a stream that has moved on is not appended: the new run's story stays whole."""
    problem_id = await served.start()
    newest = EventLog.newest
    overtaken = False

    async def overtaking(self: EventLog, subject: str, **limits: int) -> Any:
        nonlocal overtaken
        events = await newest(self, subject, **limits)
        if not overtaken:
            overtaken = True
            await served.platform.record(ProblemStopped(problem_id=problem_id, run=1, reason="enough"))
            await served.start(run=2, problem_id=problem_id)
            await served.platform.record(told(problem_id, "selection", 1, run=2))
        return events

    async with served.coordinator(problem_id) as coordinator:
        assert (await coordinator.resume(1)).report == 0  # the first run is known, and its end will be news
        overtaken = False
        monkeypatch.setattr(EventLog, "newest", overtaking)
        assert "Run 1 is over" in await refused(coordinator, told(problem_id, "selection", 1))
        assert overtaken
    assert [update.run for update in await served.reports(problem_id)] == [2]


async def test_a_report_waits_for_the_read_model(served: World) -> None:
    """A coordinator may be quicker than the event of its own start; what is over is over however old the view is."""
    problem_id = new_id()
    async with served.coordinator(problem_id) as coordinator:
        async with served.standing_still():
            await served.start(problem_id=problem_id)
            early = asyncio.create_task(coordinator.report(told(problem_id, "selection", 1)))
            resumed = asyncio.create_task(coordinator.resume())
            await asyncio.wait([early, resumed], timeout=0.5)
            assert not early.done() and not resumed.done()
        assert await early > 0
        assert (await resumed).round == 1
        await served.platform.record(ProblemStopped(problem_id=problem_id, run=1, reason="enough"))
        assert (await coordinator.resume()).finished


async def test_a_read_model_that_stays_behind_refuses_nothing(served: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator hears that it should ask again: a refusal would end its run."""
    problem_id = new_id()
    monkeypatch.setattr(Projector.wait_for, "__defaults__", (0.1,))
    async with served.coordinator(problem_id) as coordinator, served.standing_still():
        await served.start(problem_id=problem_id)
        with pytest.raises(FedotaError) as caught:
            await coordinator.report(told(problem_id, "selection", 1))
        assert caught.value.problem.code == "timeout" and caught.value.problem.retry_after


async def test_reports_do_not_wait_for_each_others_projection(served: World) -> None:
    """What comes next is known from the stream itself, so a coordinator goes on while the read model stands still."""
    problem_id = await served.start()
    async with served.coordinator(problem_id) as coordinator:
        await coordinator.resume()  # the start is known from here on
        async with served.standing_still():
            for update in training(problem_id)[:3]:
                await asyncio.wait_for(coordinator.report(update), 2)


async def test_a_coordinator_reaches_its_own_problem_only(served: World) -> None:
    """Neither by what it says nor by where it says it."""
    mine, other = await served.start(), await served.start()
    async with served.coordinator(mine) as coordinator:
        assert "about another problem" in await refused(coordinator, told(other, "selection", 1))
        coordinator.problem_id = other
        with pytest.raises((nats.errors.NoRespondersError, nats.errors.TimeoutError)):
            await coordinator.ask("report", to_json(Report(update=told(other, "selection", 1))), timeout=1)
    assert await served.reports(other) == await served.reports(mine) == []


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_request"),
        (b"{", "invalid_request"),
        (b"\xff", "invalid_request"),
        (b"[]", "invalid_field"),
        (b"{}", "invalid_field"),
        (b'{"update": {"problem_id": 1}}', "invalid_field"),
    ],
)
async def test_bodies_that_are_no_reports(served: World, body: bytes, code: str) -> None:
    """A coordinator that sends rubbish is told so, and the service answers the next one."""
    problem_id = await served.start()
    async with served.coordinator(problem_id) as coordinator:
        for verb in ("report", "resume"):
            with pytest.raises(FedotaError) as caught:
                await coordinator.ask(verb, body)
            assert caught.value.problem.code == code
        assert await coordinator.report(told(problem_id, "selection", 1)) > 0


async def test_a_report_that_no_event_could_carry(served: World) -> None:
    """The relay would stop at an event that NATS does not take: it is refused before it is one."""
    problem_id = await served.start()
    async with served.coordinator(problem_id) as coordinator:
        assert "bytes of JSON" in await refused(
            coordinator, told(problem_id, "selection", 1, reason="x" * REPORT_BYTES)
        )
        assert "not between" in await refused(coordinator, told(problem_id, "selection", 1, waiting=2**70))
        assert await served.reports(problem_id) == []


async def test_a_coordinator_hears_of_an_organization_that_was_revoked(served: World) -> None:
    """With its next report, when it asks, and when it comes back; what had been summed is recorded as it happened."""
    problem_id = await served.start()
    reports = training(problem_id)
    async with served.coordinator(problem_id) as coordinator:
        for update in reports[:3]:
            assert (await coordinator.reported(update)).revoked == []
        assert (await coordinator.revoked()).revoked == []
        await served.platform.record(ParticipationRevoked(problem_id=problem_id, organization=CLINIC, reason="left"))
        await until(lambda: _is_told(coordinator), "a coordinator is told")
        assert (await coordinator.revoked()).revoked == [CLINIC]
        assert (await coordinator.reported(reports[3])).revoked == [CLINIC]


async def test_a_coordinator_hears_that_its_run_was_stopped(served: World) -> None:
    """When it asks, and when it comes back: with the setter's reason, and of its own run."""
    problem_id = await served.start()
    async with served.coordinator(problem_id) as coordinator:
        assert (await coordinator.resume()).stopped is None
        assert (await coordinator.revoked()).stopped is None
        await served.platform.record(ProblemStopped(problem_id=problem_id, run=1, reason="enough"))
        assert (await coordinator.resume()).stopped == "enough"
        assert (await coordinator.revoked()).stopped == "enough"
        await served.start(run=2, problem_id=problem_id)
        assert (await coordinator.resume(2)).stopped is None
        assert (await coordinator.revoked(2)).stopped is None
        assert "run 2 has been started" in ((await coordinator.revoked(1)).stopped or "")


async def _is_told(coordinator: Coordinator) -> bool:
    return (await coordinator.resume()).revoked == [CLINIC]


async def test_where_a_coordinator_goes_on(world: World) -> None:
    """After each report, and after restarts of the service, it is sent where the record ends."""
    problem_id = await world.start()
    async with world.running(), world.coordinator(problem_id) as coordinator:
        assert (await coordinator.resume()).report == 0
        for update in training(problem_id)[:5]:
            await coordinator.report(update)
    async with world.running(), world.coordinator(problem_id) as coordinator:
        resume = await coordinator.resume()
        assert (resume.report, resume.round, resume.attempt, resume.finished) == (5, 2, 1, False)
        assert resume.checkpoint == training(problem_id)[3].checkpoint
        await coordinator.report(told(problem_id, "selection", 6, 2))
        await coordinator.report(told(problem_id, "abandoned", 7, 2))
        resume = await coordinator.resume()
        assert (resume.report, resume.round, resume.attempt) == (7, 2, 2)
        await world.platform.record(ProblemStopped(problem_id=problem_id, run=1, reason="enough"))
        assert (await coordinator.resume()).finished
        await world.start(run=2, problem_id=problem_id)
        assert (await coordinator.resume()).finished
        second = await coordinator.resume(2)
        assert (second.report, second.round, second.checkpoint, second.finished) == (0, 1, None, False)
        await coordinator.report(told(problem_id, "selection", 1, run=2))
        assert (await coordinator.resume()).report == 7
        with pytest.raises(FedotaError, match="never started"):
            await coordinator.resume(3)


async def test_a_long_stream_is_never_read_whole(served: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report looks at the last one only, a resume goes back to the last checkpoint and no further."""
    problem_id = await served.start()
    done = training(problem_id)[:4]
    again = [told(problem_id, "selection", number, 2, waiting=number) for number in range(5, 505)]
    await served.platform.record(*done)
    async with asyncio.TaskGroup() as group:
        for update in again:  # in the order of their creation
            group.create_task(served.platform.record(update))

    async def too_much(*_: object) -> None:
        raise AssertionError("the whole stream was read")

    read: list[int] = []
    newest = EventLog.newest

    async def counted(self: EventLog, subject: str, **limits: int) -> Any:
        events = await newest(self, subject, **limits)
        read.append(len(events))
        return events

    monkeypatch.setattr(EventLog, "stream", too_much)
    monkeypatch.setattr(EventLog, "newest", counted)
    async with served.coordinator(problem_id) as coordinator:
        resume = await coordinator.resume()
        assert (resume.report, resume.round, resume.checkpoint) == (504, 2, done[-1].checkpoint)
        assert sum(read) <= 504 + 96
        read.clear()
        await coordinator.report(told(problem_id, "selection", 505, 2))
        assert read == [1]


async def test_killed_while_reports_come_in(world: World) -> None:
    """Reports whose answer a kill -9 took away are sent again: the record has each once, in order."""
    plan = Plan(rounds=100, goal_count=2, attempts=2)
    problem_id = await world.start(plan=plan)
    updates = [
        told(problem_id, stage, 4 * (round_ - 1) + offset, round_, final=False)
        for round_ in range(1, 51)
        for offset, stage in enumerate(("selection", "configuration", "reporting", "completed"), 1)
    ]
    child = await world.process()
    async with world.coordinator(problem_id) as coordinator:

        async def say(update: Any) -> int:
            while True:
                try:
                    return await coordinator.report(update, timeout=2)
                except (nats.errors.Error, FedotaError) as error:
                    if isinstance(error, FedotaError):
                        assert error.problem.code in ("timeout", "unavailable"), error

        async def say_all() -> list[int]:
            return [await say(update) for update in updates]

        async def under_way() -> bool:
            return len(await world.reports(problem_id)) > 20

        saying = asyncio.create_task(say_all())
        for _ in range(2):
            await until(under_way, "reports are coming in")
            child.kill()
            assert await child.wait() == -9
            assert not saying.done(), "the kill came too late to prove anything"
            child = await world.process()
        positions = await saying
    assert await world.reports(problem_id) == updates
    assert positions == sorted(set(positions))


async def test_a_rebuild_gives_the_same_rows(world: World) -> None:
    """The read model holds nothing that the log does not."""
    problem_id = await world.start()
    async with world.running(), world.coordinator(problem_id) as coordinator:
        for update in training(problem_id)[:5]:
            await coordinator.report(update)
        await coordinator.resume()
    async with (
        connect_pool(world.settings.database_url, "rounds") as pool,
        EventLog.open(pool) as log,
    ):
        before = await load(pool, problem_id)
        assert await verify(PROJECTION, pool, log) == (1, [])
        assert await rebuild(PROJECTION, pool, log) == 1
        assert await load(pool, problem_id) == before
    assert before.run and before.members == {CLINIC: True}
