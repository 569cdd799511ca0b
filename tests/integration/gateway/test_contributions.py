"""What organizations contributed: to whom it is shown, and how much of it at once."""

import re
from typing import Any
from uuid import uuid4

import aiohttp
import msgspec
import pytest

from fedota.client.api import Api
from fedota.events.rounds import Contribution
from fedota.kernel.database import Pool
from gateway import queries
from gateway.reads import Questions
from tests.integration.gateway.conftest import GIVEN, TOKENS
from tests.integration.gateway.test_stream import take

ALL = ["Clinic A", "Clinic B", "Clinic C"]


async def told(client: aiohttp.ClientSession, path: str, **params: Any) -> Any:
    """The answer's body."""
    reply = await client.get(path, params=params)
    assert reply.status == 200, await reply.text()
    return await reply.json()


def names(body: Any) -> list[str]:
    """Whose contributions there are."""
    return [row["organization"] for row in body["contributions"]]


async def test_each_organization_sees_its_own_and_setters_see_all(platform: Any) -> None:
    """In the answer of their route; who acts for one cannot ask for another."""
    problem_id = str(uuid4())
    path = f"/api/problems/{problem_id}/contributions"
    at = {"at_least": await platform.record(*platform.story(problem_id))}
    async with platform.client("clinic") as clinic, platform.client("setter") as setter:
        for role in ("setter", "operator", "organization"):  # the last may act for any
            async with platform.client(role) as client:
                assert names(await told(client, path, **at)) == ALL
        mine = await told(clinic, path, **at)
        assert names(mine) == ["Clinic A"] and mine["run"] == 1 and mine["next"] is None
        (row,) = mine["contributions"]
        assert row.pop("changed")
        assert row == {
            "run": 1,
            "round": 1,
            "attempt": 1,
            "stage": "completed",
            "organization": "Clinic A",
            "updates": 1,
            "examples": 300,
            "share": 0.75,
            "size": 4000,
            "seconds": 1.5,
            "clipped": 1,
            "refusals": {},
        }
        assert names(await told(clinic, path, organization="Clinic A")) == ["Clinic A"]
        for other in ("Clinic B", "Nobody"):
            reply = await clinic.get(path, params={"organization": other})
            assert (reply.status, (await reply.json(content_type=None))["code"]) == (403, "forbidden")
        (refused,) = (await told(setter, path, organization="Clinic C"))["contributions"]
        assert (refused["updates"], refused["share"], refused["refusals"]) == (0, 0, {"update_not_finite": 2})
        assert names(await told(setter, path, organization="Nobody")) == []
        assert names(await told(setter, path, run=2)) == []
        reply = await setter.get(path, params={"organization": "no\0body"})
        assert (reply.status, (await reply.json(content_type=None))["code"]) == (422, "invalid_field")


async def test_no_event_tells_what_the_route_does_not(platform: Any) -> None:
    """The log's page, one event of it and the live stream show an organization its own, and the rest of the event."""
    problem_id = str(uuid4())
    story = platform.story(problem_id)
    position = await platform.record(*story)
    for name, expected in (("clinic", ALL[:1]), ("organization", ALL), ("setter", ALL), ("operator", ALL)):
        async with platform.client(name) as client:
            page = await told(client, "/api/events", problem=problem_id, limit=1000)
            one = await told(client, f"/api/events/{position}")
            async with client.get(f"/api/events/stream?problem={problem_id}") as reply:
                live = [msgspec.json.decode(frame["data"]) for frame in await take(reply, len(story))]
        assert live == page["events"] and live[-1] == one
        assert names(one["data"]) == expected
        assert {**one["data"], "contributions": []} == {
            **msgspec.to_builtins(story[-1]),
            "contributions": [],
        }


async def test_pages_go_over_rounds(platform: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds without one's own contribution end nothing, and an attempt that was abandoned is told too."""
    problem_id = str(uuid4())
    path = f"/api/problems/{problem_id}/contributions"
    gifts = {number: [Contribution(organization="Clinic A", updates=1, examples=number)] for number in (3, 6, 8)}
    rounds = [
        msgspec.structs.replace(
            platform.round(problem_id, number, "completed" if number < 8 else "abandoned", number),
            contributions=gifts.get(number, []),
        )
        for number in range(1, 9)
    ]
    position = await platform.record(*platform.story(problem_id)[:6], *rounds)
    monkeypatch.setattr(queries, "_MOST_OWN", 2)
    async with platform.client("clinic") as clinic:
        first = await told(clinic, path, at_least=position)
        assert (names(first), first["next"]) == ([], 2)
        second = await told(clinic, path, after=2, limit=1)
        assert ([row["examples"] for row in second["contributions"]], second["next"]) == ([3], 3)
        assert (await told(clinic, path, after=6))["next"] is None
        assert (await told(clinic, path, limit=7))["next"] == 2, "there is a largest page"
    async with Api.open(platform.url, TOKENS["clinic"]) as api:
        api.saw(position)
        found = await api.contributions(problem_id)
        assert [(row["round"], row["stage"], row["share"]) for row in found] == [
            (3, "completed", 3 / 400),
            (6, "completed", 6 / 400),
            (8, "abandoned", 0),
        ]
    async with platform.client("setter") as setter:
        monkeypatch.setattr(queries, "_MOST_GIVEN", 3)
        assert (await told(setter, path, limit=7))["next"] == 3, "what is of all is a page of its own size"
        assert (await told(setter, path, organization="Clinic A"))["next"] == 2
    async with Api.open(platform.url, TOKENS["setter"]) as api:
        assert await api.contributions(problem_id, "Clinic A") == found
        assert await api.contributions(problem_id, "Clinic B") == []


class Explaining:
    """Asks PostgreSQL how it would find the answer, and what it has to look at on the way."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def fetch(self, query: str, *arguments: object) -> Any:
        """The plan instead of the rows."""
        return await self._pool.fetch(f"explain (analyze, format json) {query}", *arguments)


async def test_one_organization_s_contributions_are_found_among_all(platform: Any) -> None:
    """Without looking at those of the others: there are as many of them for each round."""
    pool, problem_id = platform.pool, str(uuid4())
    rounds = "select $1, 1, n, 1, 'completed', 1, 1, 0, 0, 0, '[]', '[]', 1, '{}', 1, null, false, '', now(), n"
    given = "select $1, 1, n, 1, 'org ' || o, 1, 1, 1, 1, 0, '{}'"
    numbers = "generate_series(1, 100) n"
    await pool.execute(f"insert into rounds {rounds} from {numbers}", problem_id)
    await pool.execute(
        f"insert into contributions {given} from {numbers}, generate_series(1, 200) o where o > 1 or n < 20", problem_id
    )
    await pool.execute("analyze")
    explaining = Questions(Explaining(pool), 0)  # type: ignore[arg-type]
    for found in (
        await explaining.last_contributions(problem_id, 1, "org 1", 60),
        await explaining.contributions(problem_id, 1, "org 1", after=0, limit=100),
    ):
        text = found[0]["QUERY PLAN"]
        assert '"Index Name": "contributions_of"' in text and not re.search('Removed by Filter": [1-9]', text)


async def test_the_past_has_its_contributions(platform: Any) -> None:
    """Before an attempt ended nothing was told of it."""
    problem_id = str(uuid4())
    path = f"/api/problems/{problem_id}/contributions"
    position = await platform.record(*platform.story(problem_id))
    async with platform.client("setter") as setter, platform.client("clinic") as clinic:
        assert names(await told(setter, path, at=position - 1)) == []
        assert names(await told(setter, path, at=position)) == ALL
        assert names(await told(clinic, path, at=position)) == ALL[:1]


async def test_the_page_shows_what_the_route_does(platform: Any) -> None:
    """An organization finds its own on the problem's page, and nothing of the others."""
    problem_id = str(uuid4())
    await platform.record(*platform.story(problem_id))
    await platform.projector.catch_up()
    assert [one.organization for one in GIVEN] == ALL
    for name, heading, shown in (("clinic", "Contributions of Clinic A", False), ("setter", "Contributions", True)):
        async with platform.client(name) as client:
            page = await (await client.get(f"/problems/{problem_id}")).text()
        part = page.partition('data-part="contributions"')[2].partition("</section>")[0]
        assert f"<h2>{heading}</h2>" in part and "75.0 %" in part and "1 clipped" in part
        assert ("update_not_finite" in part) is shown and ("Clinic B" in part) is shown
