"""The state as of a position, worked out from the log, and the log asked for parts of it."""

from typing import Any
from uuid import uuid4

import aiohttp
import asyncpg
import msgspec
import pytest

from fedota.kernel.migrations import PROCESSES, PROJECTING
from gateway import reads
from gateway.parts import PARTS

READS = ("", "/files", "/participations", "/infrastructure", "/rounds")


async def body(reply: aiohttp.ClientResponse, status: int = 200) -> Any:
    """The answer, which has this status."""
    answer = await reply.json(content_type=None)
    assert reply.status == status, answer
    return answer


async def test_each_position_shows_what_the_live_reads_showed_there(platform: Any) -> None:
    """For every read: what was answered live at a position is what that position is answered with later."""
    mine, other = str(uuid4()), str(uuid4())
    async with platform.client("operator") as operator:

        async def everything(**params: int) -> list[Any]:
            addresses = ["/api/problems", *(f"/api/problems/{mine}{place}" for place in READS)]
            replies = [await operator.get(address, params=params) for address in addresses]
            assert {reply.status for reply in replies} == {200}
            assert {reply.headers["Fedota-Position"] for reply in replies} == {str(*params.values())}
            return [await reply.json() for reply in replies]

        live: dict[int, Any] = {}
        for data, elsewhere in zip(platform.story(mine), platform.story(other), strict=True):
            for one in (data, elsewhere):
                position = await platform.record(one)
                await platform.projector.catch_up()
                live[position] = await everything(at_least=position)
        for position, seen in live.items():
            assert await everything(at=position) == seen, position
        assert live[1] != live[2] != live[19]
        assert (await platform.rows())["problems"]  # nothing of the past is left, and nothing of now has gone


async def test_the_past_has_its_checkpoints_and_files(platform: Any) -> None:
    """The model is the newest one of then; before the first there is none."""
    problem_id = str(uuid4())
    path = f"/api/problems/{problem_id}"
    first = await platform.record(*platform.story(problem_id))
    second = await platform.record(platform.round(problem_id, 5, "completed", number=2))
    async with platform.client("setter") as setter:
        for at, number in ((first, 1), (second, 2)):
            assert (await body(await setter.get(f"{path}/model", params={"at": at})))["round"] == number
        assert (await body(await setter.get(f"{path}/model", params={"at": first - 1}), 409))["code"] == "problem_state"
        await body(await setter.get(f"{path}/rounds/2/checkpoint", params={"at": first}), 404)
        await body(await setter.get(f"{path}/rounds/2/checkpoint", params={"at": second}))
        await body(await setter.get(f"{path}/files/model.safetensors", params={"at": 1}), 404)
        await body(await setter.get(f"{path}/files/model.safetensors", params={"at": 2}))


async def test_before_the_first_event_there_is_nothing(platform: Any) -> None:
    """Position 0 is empty; a problem is unknown before it was published, and the refusal says when that is."""
    problem_id = str(uuid4())
    await platform.record(*platform.story(str(uuid4()))[:2], platform.story(problem_id)[0])
    async with platform.client("setter") as setter:
        assert await body(await setter.get("/api/problems", params={"at": 0})) == {"problems": [], "next": None}
        for at in (0, 2):
            refusal = await body(await setter.get(f"/api/problems/{problem_id}", params={"at": at}), 404)
            assert refusal["code"] == "problem_not_found" and f"position {at}" in refusal["detail"]
        assert (await body(await setter.get(f"/api/problems/{problem_id}", params={"at": 3})))["state"] == "draft"


@pytest.mark.parametrize(
    ("query", "status", "code", "words"),
    [
        ("at=4", 404, "position_not_reached", "position 3"),
        ("at=99999999999999999", 404, "position_not_reached", "from 0 to 3"),
        ("at=1&at_least=1", 422, "invalid_field", "at_least"),
        ("at=-1", 422, "invalid_field", "whole number"),
        ("at=", 422, "invalid_field", "whole number"),
    ],
)
async def test_a_past_that_is_none_is_refused(platform: Any, query: str, status: int, code: str, words: str) -> None:
    """In words that say how far the log goes, or what does not go together."""
    await platform.record(*platform.story(str(uuid4()))[:3])
    async with platform.client("setter") as setter:
        refusal = await body(await setter.get(f"/api/problems?{query}"), status)
        assert refusal["code"] == code and words in refusal["detail"]


async def test_what_has_no_past_says_so(platform: Any) -> None:
    """A kit is of now, and so are events: they are asked for by position in other words."""
    problem_id = str(uuid4())
    await platform.record(*platform.story(problem_id))
    async with platform.client("organization") as organization:
        for address in (f"/api/problems/{problem_id}/participations/Clinic%20A/kit", "/api/events", "/api/events/1"):
            refusal = await body(await organization.get(address, params={"at": 1}), 422)
            assert list(refusal["fields"]) == ["at"], address


async def test_the_list_in_the_past_is_paged(platform: Any) -> None:
    """Each problem published by then once, newest first, in pages that are bounded."""
    ids = [str(uuid4()) for _ in range(25)]
    for problem_id in ids:
        await platform.record(platform.story(problem_id)[0])
    async with platform.client("setter") as setter:
        found: list[str] = []
        params: dict[str, Any] = {"at": 23, "limit": 1000}
        while params.get("before", 1) is not None:
            page = await body(await setter.get("/api/problems", params=params))
            found += [row["problem_id"] for row in page["problems"]]
            assert len(page["problems"]) <= 20
            params["before"] = page["next"]
            if page["next"] is None:
                break
        assert found == ids[:23][::-1]


async def test_who_looks_into_the_past_does_not_hold_up_who_looks_at_now(
    platform: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the past taken the live reads answer, and one more look into the past is asked to come again."""
    await platform.record(platform.story(str(uuid4()))[0])
    monkeypatch.setattr(reads, "_PAST_WAIT", 0.2)
    past = platform.app[PARTS].reads._past
    for _ in range(2):
        await past.acquire()
    async with platform.client("setter") as setter:
        busy = await setter.get("/api/problems", params={"at": 1})
        assert (busy.status, busy.headers["Retry-After"]) == (503, "5")
        await body(await setter.get("/api/problems"))
        for _ in range(2):
            past.release()
        await body(await setter.get("/api/problems", params={"at": 1}))


async def test_events_are_asked_for_by_time_position_and_actor(platform: Any) -> None:
    """Each filter alone and together; what nothing can lie between is refused in words."""
    mine = str(uuid4())
    await platform.record(*platform.story(str(uuid4()))[:3], *platform.story(mine)[:3])
    async with platform.client("setter") as setter:

        async def ask(**params: Any) -> list[int]:
            page = await body(await setter.get("/api/events", params=params))
            assert page["head"] == 6
            return [event["position"] for event in page["events"]]

        times = [msgspec.json.decode((await platform.feed.event(position)).full)["time"] for position in range(1, 7)]
        assert await ask(since=times[3]) == [4, 5, 6]
        assert await ask(before=times[3]) == [1, 2, 3]
        assert await ask(since=times[1], before=times[4], problem=mine) == [4]
        assert await ask(after=1, until=4) == [2, 3, 4]
        assert await ask(until=2) == [1, 2]
        assert await ask(until=0) == []
        assert await ask(actor="test", until=3) == [1, 2, 3]
        assert await ask(actor="nobody") == []
        assert await ask(type="FilesStored", after=2) == [5]
        for params, field in [
            ({"since": "yesterday"}, "since"),
            ({"since": "2026-11-24T10:00:00"}, "since"),
            ({"since": "9999-12-31T23:59:59.999999-23:00"}, "since"),
            ({"before": "0001-01-01T00:00:00+23:00"}, "before"),
            ({"before": "2026-13-01T00:00:00Z"}, "before"),
            ({"until": "x"}, "until"),
            ({"until": 3, "after": 4}, "until"),
            ({"since": times[4], "before": times[1]}, "before"),
            ({"actor": "a\0b"}, "actor"),
        ]:
            refusal = await body(await setter.get("/api/events", params=params), 422)
            assert list(refusal["fields"]) == [field], params


async def test_pages_of_what_is_rare_go_on_to_the_end(platform: Any) -> None:
    """`next` rises from page to page until it stays the same, and what fits comes once."""
    await platform.record(*platform.story(str(uuid4())), *platform.story(str(uuid4())))
    async with platform.client("setter") as setter:
        found, after = [], 0
        while True:
            params = {"type": "ProblemCreated", "after": after, "limit": 1}
            page = await body(await setter.get("/api/events", params=params))
            found += [event["position"] for event in page["events"]]
            if page["next"] == after:
                break
            after = page["next"]
        assert found == [1, 11] and after == 20


async def test_one_event_by_its_position(platform: Any) -> None:
    """The same as in the list; what is no position, or not reached, is said to be so."""
    await platform.record(*platform.story(str(uuid4()))[:2])
    async with platform.client("organization") as organization:
        listed = (await body(await organization.get("/api/events")))["events"]
        assert [await body(await organization.get(f"/api/events/{n}")) for n in (1, 2)] == listed
        refusal = await body(await organization.get("/api/events/3"), 404)
        assert refusal["code"] == "position_not_reached" and "2" in refusal["detail"]
        for nonsense in ("0", "-1", "x", "²", "9" * 30):
            assert (await body(await organization.get(f"/api/events/{nonsense}"), 404))["code"] == "not_found"


async def test_the_stream_takes_the_filters_that_have_a_meaning_without_an_end(platform: Any) -> None:
    """Actor and time sift what was and what comes; an end is refused."""
    problem_id = str(uuid4())
    await platform.record(*platform.story(problem_id)[:3])
    second = msgspec.json.decode((await platform.feed.event(2)).full, type=dict[str, Any])["time"]
    async with platform.client("setter") as setter:
        for name in ("until", "before", "at"):
            refusal = await body(await setter.get("/api/events/stream", params={name: "1"}), 422)
            assert list(refusal["fields"]) == [name]

        async def first(**params: str) -> Any:
            async with setter.get("/api/events/stream", params=params) as reply:
                async for line in reply.content:
                    if line.startswith(b"id: "):
                        return line[4:].decode().strip()
            raise AssertionError("the stream ended")

        assert await first(since=second) == "2"
        assert await first(since=second, actor="test", type="ParticipationRequested") == "3"
        parted = await setter.get("/api/events/stream", params={"actor": "nobody"})
        await platform.record(*platform.story(problem_id)[3:5])
        await platform.projector.catch_up()
        assert not [line async for line in _some(parted) if line.startswith(b"id: ")]
        parted.close()


async def _some(reply: aiohttp.ClientResponse) -> Any:
    """A stream until it has shown two signs of life."""
    alive = 0
    async for line in reply.content:
        yield line
        alive += line == b": alive\n"
        if alive == 2:
            return


async def test_the_past_can_be_worked_out_where_public_may_nothing(platform: Any) -> None:
    """On a server that was shut for everybody, each process comes in, and makes the tables that it needs."""
    problem_id = str(uuid4())
    position = await platform.record(*platform.story(problem_id))
    admin = await asyncpg.connect(platform.ground.database_url)
    try:
        database = await admin.fetchval("select quote_ident(current_database())")
        await admin.execute(f"revoke all on database {database} from public")
    finally:
        await admin.close()
    async with platform.client("operator") as operator:
        path = f"/api/problems/{problem_id}"
        assert (await body(await operator.get(path, params={"at": position})))["state"] == "running"
    for process in PROCESSES:
        connection = await asyncpg.connect(platform.ground.role_url(process).reveal())
        assert await connection.fetchval(_TEMPORARY) is (process in PROJECTING), process
        await connection.close()


_TEMPORARY = "select has_database_privilege(current_database(), 'temporary')"
