"""A selector is killed after it selected its clients: who has no model trains for nobody, and is not waited for."""

import asyncio
import io
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import safetensors.numpy

from fedota.events.problems import Plan
from fedota.events.rounds import RoundUpdated
from tests.integration.runtime.conftest import (
    Component,
    Participant,
    Weights,
    World,
    another_waits,
    assert_same,
    running,
    until,
)

_LARGE = 4_000_000  # elements, 16 MB: more than lies in the buffers of a connection


def model(elements: int = 12) -> Weights:
    """Small weights, or large ones."""
    return {"w": np.zeros(elements, np.float32)}


def plan(**changes: Any) -> Plan:
    """One round of three clients, which may take an hour."""
    usual: dict[str, Any] = {"rounds": 1, "goal_count": 3, "minimum_fraction": 1.0, "report_timeout": 3600.0}
    return Plan(**{**usual, **changes})


class Bare:
    """A client without the SDK, which does one thing at a time."""

    def __init__(self, world: World, http: aiohttp.ClientSession, number: int) -> None:
        token = world.token(f"org {number}")
        self._http = http
        self._headers = {"Authorization": f"Bearer {token}", "Fedota-Client": f"client-{number}"}
        self._model = f"/v1/models/{world.digest}"

    async def check_in(self, selector: Component) -> str:
        """Its ticket."""
        async with self._http.post(f"{selector.url}/v1/check-in", headers=self._headers) as reply:
            answer = await reply.json(content_type=None)
        assert answer["status"] == "selected", answer
        ticket: str = answer["ticket"]
        return ticket

    async def fetch(self, selector: Component, method: str = "GET", **headers: str) -> int:
        """Ask for the model; the status."""
        asked = self._http.request(method, selector.url + self._model, headers={**self._headers, **headers})
        async with asked as reply:
            await reply.read()
            return reply.status

    async def break_off(self, selector: Component) -> None:
        """Go away in the middle of the model."""
        async with self._http.get(selector.url + self._model, headers=self._headers) as reply:
            await reply.content.readexactly(1000)
            assert reply.connection is not None and reply.connection.transport is not None
            reply.connection.transport.abort()

    async def send(self, selector: Component, ticket: str, update: bytes) -> int:
        """Send an update; the status."""
        headers = {**self._headers, "Fedota-Ticket": ticket, "Fedota-Examples": "1"}
        async with self._http.post(f"{selector.url}/v1/updates", data=io.BytesIO(update), headers=headers) as reply:
            return reply.status


def abandoned(world: World) -> RoundUpdated | None:
    """The report of an attempt that came to nothing."""
    return next((one for one in world.platform.reports if one.stage == "abandoned"), None)


async def test_a_round_does_not_wait_for_clients_that_never_got_the_model(world: World, tmp_path: Path) -> None:
    """The attempt is abandoned when the loss is known, and the next one completes; neither takes an hour."""
    await world.launch(plan(), model())
    first, second = world.selectors
    clients = [Participant(number, free=True) for number in (1, 2, 3)]
    async with aiohttp.ClientSession() as http, running(clients[2].run(world.kit("org 3", second), tmp_path)):
        await asyncio.gather(*(Bare(world, http, number).check_in(first) for number in (1, 2)))
        await until(lambda: world.platform.reports[-1].stage == "reporting")
        await first.kill()
        await first.start()
        lost = await until(lambda: abandoned(world), 20)
        async with running(*(one.run(world.kit(one.organization), tmp_path) for one in clients[:2])):
            final = await until(lambda: world.platform.final)
    assert lost.reason == (
        "abandoned: no more than 1 of 3 clients can report; selector-0 was lost, and 2 clients of it had not begun, "
        "at least 3 were needed"
    )
    assert (final.stage, final.attempt, final.reported, final.examples) == ("completed", 2, 3, 6)


async def test_of_a_lost_selector_only_who_has_the_whole_model_is_waited_for(world: World) -> None:
    """Its update is taken by another selector, and with it the round is complete."""
    await world.launch(plan(minimum_fraction=0.6), model(_LARGE))
    first, second = world.selectors
    update = safetensors.numpy.save({"w": np.ones(_LARGE, np.float32)})
    async with aiohttp.ClientSession() as http:
        trains, never, other, late = (Bare(world, http, number) for number in (1, 2, 3, 4))
        ticket, _, others = await asyncio.gather(trains.check_in(first), never.check_in(first), other.check_in(second))
        assert await never.fetch(first, "HEAD") == 200
        assert await never.fetch(first, Range="bytes=0-999") == 206
        assert await never.fetch(first, Range="bytes=999999999-") == 416
        await never.break_off(first)
        assert await trains.fetch(first, Range="bytes=1000-") == 206
        waits = asyncio.create_task(late.check_in(first))
        await another_waits(world)  # its selector tells all it knows at once
        await first.kill()
        await asyncio.gather(waits, return_exceptions=True)
        await first.start()
        assert await other.send(second, others, update) == 200
        await until(lambda: world.platform.reports[-1].reported == 1)
        assert world.platform.reports[-1].stage == "reporting", "the other one trains still"
        async with asyncio.timeout(20):
            while await trains.send(second, ticket, update) == 503:  # noqa: ASYNC110 - the loss may not be known yet
                await asyncio.sleep(0.05)
        final = await until(lambda: world.platform.final)
    assert (final.stage, final.attempt, final.reported) == ("completed", 1, 2)
    assert_same(world.platform.weights(final), {"w": np.ones(_LARGE, np.float32)})
