"""Participation tokens while a round runs: they expire, they are revoked, and selectors ask nobody about them."""

import asyncio
from typing import Any

import aiohttp

from tests.integration.runtime.conftest import World, assert_same, until, weighted_mean
from tests.integration.runtime.test_updates import Bare, body, model_of, plan, reporting


async def _becomes_refused(one: Bare, digest: str) -> dict[str, Any]:
    """What is said to whoever asks for the model, once it is not given to them any more."""
    async with asyncio.timeout(20):
        while True:
            async with one.http.get(f"{one.url}/v1/models/{digest}", headers=one.headers) as reply:
                if reply.status == 401:
                    answer: dict[str, Any] = await reply.json(content_type=None)
                    return answer
                assert reply.status == 200
                await reply.read()


async def test_a_revocation_is_heard_of_in_a_silent_round(world: World) -> None:
    """Nobody reports anything, and still the organization's update is refused: its first one would else count."""
    async with reporting(world, plan(minimum_fraction=0.5, report_timeout=12.0)) as (one, gone):
        await until(lambda: world.platform.stages[-1:] == ["1.1 reporting"])
        told = len(world.platform.reports)
        world.platform.state.members["org 2"] = False
        answer = await _becomes_refused(gone, world.digest)
        assert answer["code"] == "token_refused" and "The participation of org 2 was revoked" in answer["detail"]
        assert len(world.platform.reports) == told
        await gone.refused("token_refused", body(9.0), "was revoked")
        assert (await one.send(body(1.0)))[0] == 200
        final = await until(lambda: world.platform.final)
    assert (final.reported, final.participants) == (1, ["org 1"])
    assert_same(world.platform.weights(final), model_of(1.0))


async def test_whoever_is_let_in_again_goes_on(world: World) -> None:
    """With the same token and the same ticket."""
    async with reporting(world) as (one, other):
        world.platform.state.members["org 2"] = False
        await _becomes_refused(other, world.digest)
        world.platform.state.members["org 2"] = True
        async with asyncio.timeout(20):
            while (await other.send(body(3.0)))[0] == 401:
                pass
        assert (await one.send(body(1.0)))[0] == 200
        final = await until(lambda: world.platform.final)
    assert final.reported == 2
    assert_same(world.platform.weights(final), weighted_mean([(model_of(1.0), 1), (model_of(3.0), 1)]))


async def test_a_token_expires_in_the_middle_of_a_round(world: World) -> None:
    """The update that comes with it is refused and does not count; with a new token it does, by the same ticket."""
    async with reporting(world) as (one, late):
        await until(lambda: world.platform.stages[-1:] == ["1.1 reporting"])
        late.headers["Authorization"] = f"Bearer {world.token('org 2', seconds=1)}"
        answer = await _becomes_refused(late, world.digest)
        assert answer["code"] == "token_refused" and "has expired. Fetch a new join kit" in answer["detail"]
        await late.refused("token_refused", body(9.0), "has expired")
        assert (await late.check_in())["code"] == "token_refused"
        assert (await world.metrics(world.selectors[0]))["fedota_updates_accepted_total"] == 0
        late.headers["Authorization"] = f"Bearer {world.token('org 2')}"
        for bare, value in ((late, 3.0), (one, 1.0)):
            assert (await bare.send(body(value)))[0] == 200
        final = await until(lambda: world.platform.final)
    assert_same(world.platform.weights(final), weighted_mean([(model_of(3.0), 1), (model_of(1.0), 1)]))


async def test_a_ticket_is_of_no_use_to_anybody_else(world: World) -> None:
    """Neither to another organization under the same client's name, nor with a token of another problem."""
    async with reporting(world) as (one, other):
        thief = Bare(one.http, world.selectors[0], world.token("org 3"), "client-1")
        thief.ticket = one.ticket
        await thief.refused("ticket_refused", body(9.0), "another organization")
        stranger = Bare(one.http, world.selectors[0], world.token("org 1", problem_id="another"), "client-1")
        stranger.ticket = one.ticket
        await stranger.refused("token_refused", body(9.0), "another problem")
        for bare in (one, other):
            assert (await bare.send(body(1.0)))[0] == 200
        final = await until(lambda: world.platform.final)
    assert (final.reported, final.participants) == (2, ["org 1", "org 2"])
    assert_same(world.platform.weights(final), model_of(1.0))


async def test_a_selector_that_is_alone_knows_who_is_who(world: World) -> None:
    """Its coordinator is gone: tokens are told from each other all the same."""
    async with reporting(world) as (one, _):
        await world.coordinator.kill()
        async with aiohttp.ClientSession() as http:
            for token, status in (
                (world.token("org 1"), 200),
                (world.token("org 1", seconds=-1), 401),
                (world.token("org 1", problem_id="another"), 401),
                ("made up", 401),
            ):
                headers = {"Authorization": f"Bearer {token}"}
                async with http.get(f"{one.url}/v1/models/{world.digest}", headers=headers) as reply:
                    assert reply.status == status
