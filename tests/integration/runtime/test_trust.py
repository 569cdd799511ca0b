"""How much of a round one organization can be, and what is told of it afterwards, with real processes."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiohttp
import msgspec
import numpy as np
import pytest
import safetensors.numpy

from fedota.events.problems import Plan
from fedota.events.rounds import Contribution
from tests.integration.runtime.conftest import World, assert_same, until, weighted_mean
from tests.integration.runtime.test_updates import Bare, body, model


def plan(**changes: Any) -> Plan:
    """Four clients a round over two selectors, at most two of an organization."""
    usual: dict[str, Any] = {"rounds": 1, "goal_count": 4, "minimum_fraction": 1.0, "clients_per_organization": 2}
    return Plan(**{**usual, **changes})


class Crowd:
    """Clients that wait to be selected, each in a task of its own; they come again until they are."""

    def __init__(self, world: World, http: aiohttp.ClientSession) -> None:
        self._world = world
        self._http = http
        self.tasks: dict[asyncio.Task[Bare], str] = {}

    def come(self, organization: str, selector: int, count: int = 1) -> None:
        """So many clients of an organization check in at a selector."""
        token = self._world.token(organization)
        for number in range(count):
            bare = Bare(self._http, self._world.selectors[selector], token, f"client-{selector}-{number}")
            self.tasks[asyncio.create_task(self._selected(bare))] = organization

    async def _selected(self, bare: Bare) -> Bare:
        while True:
            try:
                if (await bare.check_in())["status"] == "selected":
                    return bare
            except aiohttp.ClientError:  # its selector is started again, at the same address
                await asyncio.sleep(0.05)

    def selected(self) -> dict[str, list[Bare]]:
        """Who was selected so far, by organization."""
        found: dict[str, list[Bare]] = {}
        for task, organization in self.tasks.items():
            if task.done():
                found.setdefault(organization, []).append(task.result())
        return found

    def number(self) -> int:
        """How many were selected so far."""
        return sum(map(len, self.selected().values()))


@asynccontextmanager
async def crowd(world: World) -> AsyncIterator[Crowd]:
    """Nobody, yet; those who still wait at the end go."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        made = Crowd(world, http)
        try:
            yield made
        finally:
            for task in made.tasks:
                task.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.gather(*made.tasks)


async def accepted(bare: Bare, value: float, examples: int) -> None:
    """An update with this value everywhere is taken in."""
    status, answer = await bare.send(body(value), Fedota_Examples=str(examples))
    assert status == 200, answer


def weights(value: float) -> Any:
    """What such an update holds."""
    return safetensors.numpy.load(body(value))


def without_times(contributions: list[Contribution]) -> list[Contribution]:
    """The same, with times that are as long as can be told beforehand."""
    assert all(0 < one.seconds < 30 for one in contributions if one.updates)
    return [msgspec.structs.replace(one, seconds=0.0) for one in contributions]


async def test_an_organization_is_no_more_of_a_round_than_the_plan_lets_it(world: World) -> None:
    """Neither by the number of its clients at whatever selectors, nor by the examples or the size of an update."""
    caps: dict[str, Any] = {"examples_per_update": 10, "clip_norm": 600.0}
    await world.launch(plan(**caps), model())
    platform = world.platform
    async with crowd(world) as people:
        people.come("org 1", 0, 3)
        people.come("org 1", 1, 2)
        said = "2 of 4 clients are here, and 3 more of organizations that may send only 2; waits for 2 more"
        await until(lambda: any(one.reason.startswith(said) for one in platform.reports))
        assert platform.reports[-1].waiting == 2 and not people.number()
        people.come("org 2", 0)
        people.come("org 3", 1)
        await until(lambda: people.number() == 4)
        (one, other), (second,), (third,) = (people.selected()[f"org {number}"] for number in (1, 2, 3))
        spoiled = body(large=np.full((300, 1000), np.nan, np.float32))
        await second.refused("update_not_finite", spoiled)
        await accepted(one, 1.0, 50)
        await accepted(other, 1.0, 4)
        await accepted(second, 0.5, 10)
        await accepted(third, 2.0, 1_000_000_000)
        final = await until(lambda: platform.final)
        assert people.number() == 4, "nobody else was selected meanwhile"
    size = len(body())
    given = [
        Contribution(organization="org 1", updates=2, examples=14, size=2 * size),
        Contribution(organization="org 2", updates=1, examples=10, size=size, refusals={"update_not_finite": 1}),
        Contribution(organization="org 3", updates=1, examples=10, size=size, clipped=1),
    ]
    assert without_times(final.contributions) == given
    assert (final.participants, final.reported, final.examples) == (["org 1", "org 2", "org 3"], 4, 34)
    manifest = platform.manifest(final)
    assert manifest["contributions"] == msgspec.to_builtins(final.contributions)
    assert manifest["caps"] == {"clients_per_organization": 2, **caps}
    clipped = {"large": np.full((300, 1000), 600 / np.sqrt(300_000), np.float32), "steps": np.array([2], np.int64)}
    sent = [(weights(1.0), 14), (weights(0.5), 10), (clipped, 10)]
    found, mean = platform.weights(final), weighted_mean(sent)
    assert_same({"large": found["large"]}, {"large": mean["large"]})


async def test_an_abandoned_attempt_is_told_of(world: World) -> None:
    """Who gave something for nothing, and whose update was refused; the next attempt begins without it."""
    await world.launch(plan(goal_count=2, report_timeout=3.0, attempts=2, selectors=1), model())
    async with crowd(world) as people:
        people.come("org 1", 0)
        people.come("org 2", 0)
        await until(lambda: people.number() == 2)
        (one,), (other,) = (people.selected()[f"org {number}"] for number in (1, 2))
        await accepted(one, 1.0, 7)
        for _ in range(2):
            await other.refused("update_malformed", b"")
        await until(lambda: "1.1 abandoned" in world.platform.stages)
    abandoned = next(told for told in world.platform.reports if told.stage == "abandoned")
    assert without_times(abandoned.contributions) == [
        Contribution(organization="org 1", updates=1, examples=7, size=len(body())),
        Contribution(organization="org 2", refusals={"update_malformed": 2}),
    ]
    assert (abandoned.participants, abandoned.examples) == (["org 1"], 7)
    assert not any(told.contributions for told in world.platform.reports if told.stage != "abandoned")


@pytest.mark.parametrize("killed", ["coordinator", "selector"])
async def test_caps_and_contributions_outlive_a_crash(world: World, killed: str) -> None:
    """In the middle of the round: nobody beyond the cap is selected then, and what is told is what is in the sum."""
    await world.launch(plan(goal_count=2, clients_per_organization=1), model())
    async with crowd(world) as people:
        people.come("org 1", 0, 2)
        people.come("org 1", 1, 2)
        people.come("org 2", 1)
        await until(lambda: people.number() == 2)
        (one,), (other,) = people.selected()["org 1"], people.selected()["org 2"]
        await other.fetch(world.digest)  # who has not begun is not waited for, should both be one selector's
        await accepted(one, 1.0, 3)
        await until(lambda: world.platform.reports[-1].reported == 1)  # what nobody heard of is waited for by nobody
        if killed == "coordinator":
            await world.coordinator.kill()
            await world.coordinator.start()
        else:
            home = next(each for each in world.selectors if each.url == one.url)
            await home.kill()
            await home.start()
            await until_again(one)
            await accepted(one, 1.0, 3)
        await until_taken(other)
        final = await until(lambda: world.platform.final)
        assert Counter({name: len(of) for name, of in people.selected().items()}) == {"org 1": 1, "org 2": 1}
    assert [(each.organization, each.updates, each.examples) for each in final.contributions] == [
        ("org 1", 1, 3),
        ("org 2", 1, 1),
    ]


async def until_again(bare: Bare) -> None:
    """Return when the selector asks for the update that it lost."""
    async with asyncio.timeout(30):
        while (await bare.check_in(Fedota_Ticket=bare.ticket))["status"] != "send_again":
            pass


async def until_taken(bare: Bare) -> None:
    """Send an update until it is in a sum."""
    async with asyncio.timeout(30):
        while (await bare.send(body(2.0)))[0] != 200:  # noqa: ASYNC110 - another process has to be ready
            await asyncio.sleep(0.05)
