"""Processes killed at any moment: the training goes on, and each update counts once."""

import asyncio
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedota.errors import FedotaError
from fedota.events.problems import Plan
from tests.integration.runtime.conftest import (
    Participant,
    Weights,
    World,
    assert_same,
    expected_after,
    running,
    until,
)


def model() -> Weights:
    """Small weights."""
    return {"w": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)}


def plan(**changes: Any) -> Plan:
    """Three clients a round, all of them needed."""
    usual: dict[str, Any] = {"rounds": 2, "goal_count": 3, "minimum_fraction": 1.0}
    return Plan(**{**usual, **changes})


async def reported(world: World, count: int) -> None:
    """So many updates are known to be in sums."""
    await until(lambda: world.platform.reports[-1].reported == count)


def assert_trained(world: World, rounds: int, *clients: Participant) -> None:
    """The training came to its end in first attempts, with each client's update once in each round."""
    final = world.platform.final
    assert final is not None and (final.stage, final.round) == ("completed", rounds)
    assert {one.attempt for one in world.platform.reports} == {1}
    completed = [one for one in world.platform.reports if one.stage == "completed"]
    total = sum(one.number for one in clients)
    assert [(one.round, one.reported, one.examples) for one in completed] == [
        (number, len(clients), total) for number in range(1, rounds + 1)
    ]
    assert_same(world.platform.weights(final), expected_after(world.model, rounds, *clients))
    assert [one.rounds for one in clients] == [list(range(1, rounds + 1)) for _ in clients], "nobody trained twice"


async def test_a_coordinator_killed_while_clients_report(world: World, tmp_path: Path) -> None:
    """The same round goes on with what its selectors hold; clients notice nothing."""
    await world.launch(plan(), model())
    clients = [Participant(number) for number in (1, 2, 3)]
    async with running(*(one.run(world.kit(one.organization), tmp_path) for one in clients)):
        await until(lambda: all(one.rounds for one in clients))
        clients[0].go()
        await reported(world, 1)
        await world.coordinator.kill()
        clients[1].go()
        await until(lambda: clients[1].said("round 1: the update has arrived"))
        await world.coordinator.start()
        await reported(world, 2)
        for one in clients:
            one.go()
            one.go()
        clients[2].go()
        await until(lambda: world.platform.final)
    assert world.platform.resumed == 2
    assert_trained(world, 2, *clients)


async def test_a_coordinator_killed_after_the_checkpoint_before_it_is_recorded(world: World, tmp_path: Path) -> None:
    """The sums are still there: they come to the very same checkpoint, which is recorded once."""
    await world.launch(plan(rounds=1), model())
    clients = [Participant(number) for number in (1, 2, 3)]
    async with running(*(one.run(world.kit(one.organization), tmp_path) for one in clients)):
        await until(lambda: all(one.rounds for one in clients))
        for one in clients[:2]:
            one.go()
        await reported(world, 2)
        world.store.failing = True
        clients[2].go()
        await until(lambda: "503 (SlowDown)" in world.platform.reports[-1].reason)
        world.platform.refusing = FedotaError("unavailable", "The log is away.")
        await world.coordinator.kill()
        world.platform.refusing, world.store.failing = None, False
        await world.coordinator.start()
        await until(lambda: world.platform.final)
    assert_trained(world, 1, *clients)


async def test_a_coordinator_killed_while_clients_gather(world: World, tmp_path: Path) -> None:
    """They stay where they are, and the selection begins again in the same attempt."""
    await world.launch(plan(rounds=1), model())
    clients = [Participant(number, free=True) for number in (1, 2, 3)]
    async with running(*(one.run(world.kit(one.organization), tmp_path) for one in clients[:2])):
        await until(lambda: world.platform.reports[-1].waiting == 2)
        await world.coordinator.kill()
        async with running(clients[2].run(world.kit("org 3"), tmp_path)):
            await world.coordinator.start()
            await until(lambda: world.platform.final)
    assert_trained(world, 1, *clients)


async def test_a_coordinator_killed_again_and_again(world: World, tmp_path: Path) -> None:
    """Whatever it was doing."""
    await world.launch(plan(rounds=6), model())
    clients = [Participant(number, free=True) for number in (1, 2, 3)]
    pauses = np.random.default_rng(3).uniform(0.02, 0.35, size=8)
    async with running(*(one.run(world.kit(one.organization), tmp_path) for one in clients)):
        for pause in pauses:
            await asyncio.sleep(pause)  # a moment that nothing announces is what is tried here
            await world.coordinator.kill()
            await world.coordinator.start()
        final = await until(lambda: world.platform.final)
    assert_same(world.platform.weights(final), expected_after(world.model, 6, *clients), relative=1e-5)
    completed = [one for one in world.platform.reports if one.stage == "completed"]
    assert [(one.round, one.examples) for one in completed] == [(number, 6) for number in range(1, 7)]


async def test_a_selector_killed_and_started_again(world: World, tmp_path: Path) -> None:
    """Its clients send their updates again; they train no second time."""
    await world.launch(plan(), model())
    clients = [Participant(number) for number in (1, 2, 3)]
    first, second = world.selectors
    homes = [first, first, second]
    async with running(
        *(one.run(world.kit(one.organization, home), tmp_path) for one, home in zip(clients, homes, strict=True))
    ):
        await until(lambda: all(one.rounds for one in clients))
        clients[0].go()
        await reported(world, 1)
        await first.kill()
        await first.start()
        await reported(world, 1)
        for one in (clients[1], clients[2], *clients):
            one.go()
        await until(lambda: world.platform.final)
    assert_trained(world, 2, *clients)


async def test_a_selector_killed_for_good(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it is taken for dead, its clients send their updates to another one."""
    await world.launch(plan(rounds=1), model())
    clients = [Participant(number) for number in (1, 2, 3)]
    first, second = world.selectors
    monkeypatch.setattr("random.sample", lambda urls, _: list(urls))  # a client asks the first that its kit names
    kits = [world.kit("org 1", first, second), world.kit("org 2", first, second), world.kit("org 3", second)]
    async with running(*(one.run(kit, tmp_path) for one, kit in zip(clients, kits, strict=True))):
        await until(lambda: all(one.rounds for one in clients))
        clients[0].go()
        await reported(world, 1)
        await first.kill()
        for one in clients[1:]:
            one.go()
        await until(lambda: world.platform.final, 45)
    assert_trained(world, 1, *clients)


async def test_coordinator_and_selector_killed_together(world: World, tmp_path: Path) -> None:
    """What neither of them remembers, the clients still have."""
    await world.launch(plan(rounds=1), model())
    clients = [Participant(number) for number in (1, 2, 3)]
    first, second = world.selectors
    homes = [first, first, second]
    async with running(
        *(one.run(world.kit(one.organization, home), tmp_path) for one, home in zip(clients, homes, strict=True))
    ):
        await until(lambda: all(one.rounds for one in clients))
        clients[0].go()
        clients[2].go()
        await reported(world, 2)
        await asyncio.gather(world.coordinator.kill(), first.kill())
        await asyncio.gather(world.coordinator.start(), first.start())
        clients[1].go()
        await until(lambda: world.platform.final)
    assert_trained(world, 1, *clients)


async def test_a_selector_that_stands_still_is_given_up_and_comes_back(world: World, tmp_path: Path) -> None:
    """What it holds counts no more, even though it was never gone; its clients send again."""
    await world.launch(plan(rounds=1), model())
    clients = [Participant(number) for number in (1, 2, 3)]
    first, second = world.selectors
    homes = [first, first, second]
    async with running(
        *(one.run(world.kit(one.organization, home), tmp_path) for one, home in zip(clients, homes, strict=True))
    ):
        await until(lambda: all(one.rounds for one in clients))
        clients[0].go()
        await reported(world, 1)
        first.process.send_signal(signal.SIGSTOP)
        await reported(world, 0)
        first.process.send_signal(signal.SIGCONT)
        await reported(world, 1)
        assert "it begins again" in first.log()
        for one in clients[1:]:
            one.go()
        await until(lambda: world.platform.final)
    assert_trained(world, 1, *clients)


async def test_a_coordinator_that_stands_still_gives_nobody_up(world: World, tmp_path: Path) -> None:
    """It was not there to hear them."""
    await world.launch(plan(rounds=1), model())
    clients = [Participant(number) for number in (1, 2, 3)]
    async with running(*(one.run(world.kit(one.organization), tmp_path) for one in clients)):
        await until(lambda: all(one.rounds for one in clients))
        clients[0].go()
        await reported(world, 1)
        world.coordinator.process.send_signal(signal.SIGSTOP)
        clients[1].go()
        await until(lambda: clients[1].said("round 1: the update has arrived"))
        await asyncio.sleep(17)  # longer than a selector may be silent
        world.coordinator.process.send_signal(signal.SIGCONT)
        await reported(world, 2)
        clients[2].go()
        await until(lambda: world.platform.final)
    assert_trained(world, 1, *clients)
    assert all("begins again" not in selector.log() for selector in world.selectors)


async def test_a_coordinator_killed_before_a_selector_had_begun(world: World, tmp_path: Path) -> None:
    """Its share of the round is not lost: it selects its clients once it hears of it, in the same attempt."""
    await world.launch(plan(rounds=1), model())
    clients = [Participant(number, free=True) for number in (1, 2, 3)]
    first, second = world.selectors
    async with running(clients[2].run(world.kit("org 3", second), tmp_path)):
        await until(lambda: world.platform.reports[-1].waiting == 1)
        second.process.send_signal(signal.SIGSTOP)
        async with running(*(one.run(world.kit(one.organization, first), tmp_path) for one in clients[:2])):
            await until(lambda: all(one.said("the update has arrived") for one in clients[:2]))
            await world.coordinator.kill()
            second.process.send_signal(signal.SIGCONT)
            await world.coordinator.start()
            await until(lambda: world.platform.final)
    assert_trained(world, 1, *clients)
