"""Runs that end by others' events, also over kills and restarts."""

import asyncio
import time

import aiohttp
import asyncpg
import pytest

from fedota.contracts import commands
from fedota.errors import FedotaError
from fedota.events import EventData
from fedota.events.problems import ModelFile, ProblemCompleted, ProblemStopped
from fedota.kernel.settings import SettingsError
from services.problems.app import create_app
from tests.integration.problems.world import World, failed, final
from tests.support.services import new_id


async def test_the_last_round_completes_the_problem(served: World) -> None:
    """Its checkpoint is the result; the event goes back to the report."""
    problem_id = await served.start()
    await served.platform.record(final(problem_id, "completed", last=False), final(problem_id, "completed"))
    await served.happens(problem_id, "ProblemCompleted")
    [*_, event] = await served.platform.events(f"problems/{problem_id}")
    result = ModelFile(key="k/3", sha256="b" * 64, size=9)
    assert event.data == ProblemCompleted(problem_id=problem_id, run=1, rounds=3, model=result)
    [_, cause] = await served.platform.events(f"rounds/{problem_id}")
    assert (event.actor, event.causation, event.correlation) == ("service:problems", cause.id, cause.correlation)


@pytest.mark.parametrize("infra", [True, False])
async def test_what_cannot_go_on_is_stopped(served: World, infra: bool) -> None:
    """With the words of who gave up; then it can be started again, and a late word on the first run does nothing."""
    problem_id = await served.start()
    last: EventData = failed(problem_id) if infra else final(problem_id, "abandoned")
    reason = "no memory" if infra else "abandoned: nobody came"
    await served.platform.record(last)
    await served.happens(problem_id, "ProblemStopped")
    [*_, event] = await served.platform.events(f"problems/{problem_id}")
    assert event.data == ProblemStopped(problem_id=problem_id, run=1, reason=reason)

    await served.platform.send(commands.StartProblem(problem_id=problem_id))
    await served.platform.record(failed(problem_id), final(problem_id, "completed"), failed(problem_id, run=2))
    await served.happens(problem_id, "ProblemStarted", "ProblemStopped")
    [*_, event] = await served.platform.events(f"problems/{problem_id}")
    assert event.data == ProblemStopped(problem_id=problem_id, run=2, reason="no memory")


async def test_events_about_nothing_known_hold_nothing_up(served: World) -> None:
    """A word on a problem that does not exist is passed over, and nothing is parked."""
    await served.platform.record(failed(new_id()))
    problem_id = await served.start()
    await served.platform.record(failed(problem_id))
    await served.happens(problem_id, "ProblemStopped")
    async with served.running() as other, aiohttp.ClientSession() as session:
        reply = await session.get(f"{other.url}/readyz")
        assert (reply.status, await reply.json()) == (200, {"status": "ready", "failing": {}})


async def test_what_happened_while_it_was_down_is_made_good(world: World) -> None:
    """An end that nobody saw is seen at the next start."""
    async with world.running():
        problem_id = await world.start()
    await world.platform.record(final(problem_id, "completed"))
    assert (await world.types(problem_id))[-1] == "ProblemStarted"
    async with world.running():
        await world.happens(problem_id, "ProblemCompleted")


async def test_a_crash_between_the_reaction_and_its_checkpoint_repeats_nothing(world: World) -> None:
    """The same report comes again after a crash, even when the problem was started anew meanwhile."""
    async with world.running():
        problem_id = await world.start()
        await world.platform.record(final(problem_id, "abandoned"))
        await world.happens(problem_id, "ProblemStopped")
        await world.platform.send(commands.StartProblem(problem_id=problem_id))
        happened = await world.types(problem_id)
    connection = await asyncpg.connect(world.settings.database_url.reveal())
    await connection.execute("update problems.checkpoint set position = 0, event = null")
    await connection.close()
    async with world.running():
        marker = await world.start()
        await world.platform.record(failed(marker))
        await world.happens(marker, "ProblemStopped")  # all before it was seen again
        assert await world.types(problem_id) == happened


async def test_a_stop_and_an_end_that_meet(served: World) -> None:
    """Whoever comes first, the run ends once: the setter is told, or the late word does nothing."""

    async def stop(problem_id: str) -> str:
        try:
            await served.platform.send(commands.StopProblem(problem_id=problem_id, reason="enough"))
        except FedotaError as error:
            assert error.problem.code == "problem_state"
            return "too late"
        return "stopped"

    async def one() -> tuple[str, str]:
        problem_id = await served.start()
        outcome, _ = await asyncio.gather(stop(problem_id), served.platform.record(final(problem_id, "completed")))
        await served.happens(problem_id, "ProblemStopped" if outcome == "stopped" else "ProblemCompleted")
        return problem_id, outcome

    ended = await asyncio.gather(*(one() for _ in range(20)))
    marker = await served.start()
    await served.platform.record(failed(marker))
    await served.happens(marker, "ProblemStopped")  # nothing of the others is left to come
    for problem_id, outcome in ended:
        last = "ProblemStopped" if outcome == "stopped" else "ProblemCompleted"
        assert await served.types(problem_id) == ["ProblemCreated", "ProblemStarted", last]


async def test_killed_while_commands_come_in(world: World) -> None:
    """Commands whose answer a kill -9 took away are sent again with their keys: each happens once."""
    child = await world.process()
    problem_id = await world.create()
    names: list[str] = []
    answered, over = asyncio.Event(), asyncio.Event()
    taken = 0  # answers

    async def join(name: str) -> None:
        nonlocal taken
        command = commands.RequestParticipation(problem_id=problem_id, organization=name)
        deadline = time.monotonic() + 60
        while True:
            try:
                await world.platform.gateway.command(command, actor="organization", key=name, timeout=2)
            except FedotaError as error:
                assert error.problem.code in ("timeout", "unavailable"), error
                assert time.monotonic() < deadline
                taken += 1
            else:
                answered.set()
                return

    async def come() -> None:
        while not over.is_set():  # whenever the kill comes, each has asked and was not answered yet
            names.append(f"Clinic {len(names)}")
            await join(names[-1])

    joining = asyncio.gather(*(come() for _ in range(50)))
    await answered.wait()
    child.kill()
    assert await child.wait() == -9
    before = len(await world.types(problem_id)) - 1
    await world.process()
    over.set()
    await joining
    events = await world.platform.events(f"problems/{problem_id}")
    assert before and taken, "the kill came too early or too late to prove anything"
    assert sorted(event.data.organization for event in events[1:]) == sorted(names)  # type: ignore[attr-defined]


async def test_a_key_that_others_may_read_stops_the_start(world: World) -> None:
    """The service does not come up with a signing key that anybody could have copied."""
    world.key_file.chmod(0o644)
    with pytest.raises(SettingsError, match="chmod 600"):
        create_app(world.settings)
