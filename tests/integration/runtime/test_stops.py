"""A run that is stopped from outside: its clients hear why, whatever they are doing, and nothing breaks."""

import asyncio
from pathlib import Path

from tests.integration.runtime.conftest import Participant, World, another_waits, running, until
from tests.integration.runtime.test_updates import Bare, body, model, plan, reporting

_TOLD = "The training was stopped: the data were wrong."


async def test_everybody_hears_why_it_was_stopped(world: World) -> None:
    """Who waits, who has sent an update, who still trains, and who comes after a crash of them all."""
    async with reporting(world, plan(rounds=3)) as (sent, trains):
        waits = Bare(sent.http, world.selectors[0], world.token("org 3"), "client-3")
        assert (await sent.send(body()))[0] == 200
        waiting = asyncio.create_task(waits.check_in())
        await another_waits(world)
        world.platform.stop("the data were wrong")
        told = len(world.platform.reports)
        finished = {"status": "finished", "reason": _TOLD}
        assert await asyncio.wait_for(waiting, 10) == {**finished, "update": "none"}
        assert await sent.check_in(Fedota_Ticket=sent.ticket) == {**finished, "update": "over"}
        await trains.refused("round_over", body())
        assert await trains.check_in(Fedota_Ticket=trains.ticket) == {**finished, "update": "over"}
        assert len(world.platform.reports) == told
        await world.coordinator.says("")
        assert world.coordinator.process.returncode is None
        assert "the training stops" not in world.coordinator.log()
        for component in world.components:
            await component.kill()
        for component in world.components:
            await component.start()
        assert await waits.check_in() == {**finished, "update": "none"}


async def test_a_client_ends_with_the_reason(world: World, tmp_path: Path) -> None:
    """It trains while the run is stopped, and that is no failure of its own."""
    await world.launch(plan(goal_count=1), model())
    one = Participant(1)
    async with running(one.run(world.kit("org 1"), tmp_path)):
        await until(lambda: one.rounds)
        world.platform.stop("")
        one.go()
    assert one.lines[-1] == "The training was stopped."
