"""Sums on their way from a selector to the coordinator, on a line that breaks."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fedota.events.problems import Plan
from tests.integration.runtime.conftest import Participant, World, assert_same, expected_after, running, until
from tests.integration.runtime.test_transfers import MEGABYTE, Cutter, model

MEGABYTES = 12  # of the model
SIZE = 2 * MEGABYTES * MEGABYTE  # bytes of a sum
_SLOWLY = 120  # seconds, in which a busy machine trains with so large a model: how long it takes is not looked at
_SMALL_TALK = 0.1  # of a sum, at most, that is said beside it


def plan(**changes: Any) -> Plan:
    """One client, whose update the mean is bit for bit."""
    usual: dict[str, Any] = {"rounds": 1, "goal_count": 1, "minimum_fraction": 1.0, "selectors": 1}
    return Plan(**{**usual, **changes})


@asynccontextmanager
async def cut(world: World, plan_: Plan, megabytes: float = MEGABYTES) -> AsyncIterator[Cutter]:
    """Everything is up, and the first selector reaches the coordinator by this."""
    world.prepare(plan_, model(megabytes))
    await world.coordinator.start()
    async with Cutter(world.coordinator.url).standing() as cutter:
        direct, world.coordinator.url = world.coordinator.url, cutter.url
        await world.selectors[0].start()
        world.coordinator.url = direct
        for selector in world.selectors[1:]:
            await selector.start()
        yield cutter


async def trained(world: World, client: Participant, data: Path) -> None:
    """One round with one client, whose update came as it was, and once."""
    async with running(client.run(world.kit(client.organization), data)):
        final = await until(lambda: world.platform.final)
    assert (final.reported, final.attempt, client.rounds) == (1, 1, [1])
    weights = world.platform.weights(final)
    assert all(np.array_equal(weights[name], values) for name, values in client.trained(world.model, 1).items())


async def test_a_sum_goes_on_where_its_connection_broke(world: World, tmp_path: Path) -> None:
    """Twice; its beginning is not sent again, and no bit of it is another."""
    async with cut(world, plan()) as cutter:
        cutter.cuts["up"] = [SIZE // 2, SIZE // 4]
        await trained(world, Participant(1, free=True), tmp_path)
        assert cutter.cuts["up"] == []
        assert SIZE < cutter.carried["up"] < (1 + _SMALL_TALK) * SIZE, cutter.carried


async def test_a_sum_whose_answer_is_lost_is_not_sent_again(world: World, tmp_path: Path) -> None:
    """It counts once."""
    async with cut(world, plan()) as cutter:
        cutter.swallows = SIZE
        await trained(world, Participant(1, free=True), tmp_path)
        assert cutter.swallows == 0
        assert SIZE < cutter.carried["up"] < (1 + _SMALL_TALK) * SIZE, cutter.carried


async def test_a_coordinator_killed_in_the_middle_of_a_sum(world: World, tmp_path: Path) -> None:
    """The next one knows nothing of it and gets it as a whole."""
    async with cut(world, plan()) as cutter:
        cutter.cuts["up"], cutter.shuts = [SIZE // 2], True
        client = Participant(1, free=True)
        async with running(client.run(world.kit(client.organization), tmp_path)):
            await until(lambda: not cutter.open)
            await world.coordinator.kill()
            cutter.carried["up"] = 0
            await world.coordinator.start()
            cutter.open, cutter.shuts = True, False
            final = await until(lambda: world.platform.final)
        assert cutter.carried["up"] > SIZE, cutter.carried
    assert (final.reported, final.attempt, client.rounds) == (1, 1, [1])
    weights = world.platform.weights(final)
    assert all(np.array_equal(weights[name], values) for name, values in client.trained(world.model, 1).items())


def _peak(world: World) -> float:
    """The most memory that the coordinator ever had, in megabytes."""
    status = Path(f"/proc/{world.coordinator.process.pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024 / MEGABYTE


async def test_a_sum_that_broke_off_costs_a_coordinator_no_more_memory(world: World, tmp_path: Path) -> None:
    """Three times the model beyond what it needs while it waits, though another sum is whole before it goes on."""
    megabytes, spare = 150, 24
    first, second = Participant(1), Participant(2, free=True)
    async with cut(world, plan(goal_count=2, selectors=2), megabytes) as cutter:
        base = _peak(world)
        homes = zip((first, second), world.selectors, strict=True)
        async with running(*(one.run(world.kit(one.organization, home), tmp_path) for one, home in homes)):
            await until(lambda: second.said("the update has arrived"), _SLOWLY)
            cutter.cuts["up"], cutter.shuts = [2 * megabytes * MEGABYTE // 2], True
            first.go()
            await until(lambda: not cutter.open, _SLOWLY)
            await until(lambda: world.platform.reports[-1].reported == 2, _SLOWLY)
            cutter.open = True
            final = await until(lambda: world.platform.final, _SLOWLY)
        peak = _peak(world)
        assert cutter.carried["up"] < 2.2 * megabytes * MEGABYTE, cutter.carried
    assert_same(world.platform.weights(final), expected_after(world.model, 1, first, second))
    assert peak < base + 3 * megabytes + spare, f"{peak:.0f} MB, of which {base:.0f} MB were needed before"
