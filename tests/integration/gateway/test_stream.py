"""The live event stream, against real servers."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from typing import Any
from uuid import uuid4

import aiohttp
import msgspec
import pytest

from fedota.events import orchestrator as infra
from fedota.kernel.projection import Projector
from gateway.projection import PROJECTION
from gateway.stream import Feed, Filter

_STREAM = "/api/events/stream"


async def frames(reply: aiohttp.ClientResponse) -> AsyncIterator[dict[str, str]]:
    """The events of a stream, as a browser takes them apart."""
    frame: dict[str, str] = {}
    async for line in reply.content:
        name, colon, value = line.decode().rstrip("\n").partition(": ")
        if name and colon:
            frame[name] = value
        elif not name and not colon:
            if "data" in frame:
                yield frame
            frame = {}


async def take(reply: aiohttp.ClientResponse, count: int) -> list[dict[str, str]]:
    """The next so many events."""
    found: list[dict[str, str]] = []
    async with asyncio.timeout(10):
        async for frame in frames(reply):
            found.append(frame)
            if len(found) == count:
                break
    return found


async def until(condition: Any) -> None:
    """Return when it holds."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is waited for is on the other side of a socket
            await asyncio.sleep(0.01)


async def test_the_stream_goes_from_the_log_into_what_happens_now(platform: Any) -> None:
    """Events from before and after the connection come once each, in order, of one problem only."""
    mine, other = str(uuid4()), str(uuid4())
    await platform.record(*platform.story(mine)[:3], *platform.story(other)[:2])
    async with platform.client("setter") as setter, setter.get(_STREAM, params={"problem": mine}) as reply:
        assert reply.content_type == "text/event-stream"
        assert reply.headers["X-Accel-Buffering"] == "no"
        before = await take(reply, 3)
        await platform.record(*platform.story(other)[2:4], *platform.story(mine)[3:6])
        after = await take(reply, 3)
    positions = [int(frame["id"]) for frame in before + after]
    assert positions == [1, 2, 3, 8, 9, 10]
    event = msgspec.json.decode(after[-1]["data"])
    assert (after[-1]["event"], event["type"], event["position"]) == ("InfraSpawned", "InfraSpawned", 10)
    assert event["specversion"] == "1.0" and event["data"]["problem_id"] == mine


async def test_a_broken_stream_goes_on_where_it_was(platform: Any) -> None:
    """The browser's Last-Event-ID wins over the address that it opened first."""
    problem_id = str(uuid4())
    await platform.record(*platform.story(problem_id))
    async with platform.client("setter") as setter:
        async with setter.get(_STREAM, params={"after": 2}) as reply:
            assert [frame["id"] for frame in await take(reply, 2)] == ["3", "4"]
        async with setter.get(_STREAM, params={"after": 2}, headers={"Last-Event-ID": "4"}) as reply:
            assert [frame["id"] for frame in await take(reply, 2)] == ["5", "6"]


@pytest.mark.parametrize("nonsense", ["", "x", "-1", "1.5", "²", "9" * 30, "4\t4"])
async def test_a_last_event_id_that_is_none_is_passed_over(platform: Any, nonsense: str) -> None:
    """The address then says where to begin: nothing is left out."""
    await platform.record(*platform.story(str(uuid4()))[:4])
    headers = {"Last-Event-ID": nonsense}
    async with (
        platform.client("setter") as setter,
        setter.get(_STREAM, params={"after": 2}, headers=headers) as reply,
    ):
        assert [frame["id"] for frame in await take(reply, 2)] == ["3", "4"]


async def test_the_stream_is_asked_for_types(platform: Any) -> None:
    """Before and after the connection only those come."""
    problem_id = str(uuid4())
    story = platform.story(problem_id)
    await platform.record(*story[:7])
    params = {"problem": problem_id, "type": "RoundUpdated"}
    async with platform.client("setter") as setter, setter.get(_STREAM, params=params) as reply:
        assert [frame["event"] for frame in await take(reply, 1)] == ["RoundUpdated"]
        await platform.record(story[2], *story[7:])
        assert [frame["id"] for frame in await take(reply, 3)] == ["9", "10", "11"]


async def test_what_the_stream_tells_can_be_read(platform: Any) -> None:
    """Who hears of an event and asks the read model at once finds it there."""
    problem_id = str(uuid4())
    async with platform.client("setter") as setter, setter.get(_STREAM) as reply:
        for number, data in enumerate(platform.story(problem_id), 1):
            await platform.record(data)
            assert [frame["id"] for frame in await take(reply, 1)] == [str(number)]
            assert platform.projector.position >= number


async def test_the_stream_does_not_run_ahead_of_the_read_model(platform: Any) -> None:
    """What is in the log already and not yet in the read model comes later, from the past and from what is new."""
    projector = Projector(PROJECTION, platform.projector._pool, platform.feed._log, platform.projector._bus)
    feed = Feed(platform.feed._log, projector)  # behind a read model that stands where the test says
    await platform.record(*platform.story(str(uuid4()))[:4])
    await projector._move(1)
    batches = feed.follow(Filter(), 0, 0.2)
    seen: list[list[int]] = []

    async def next_batch() -> None:
        seen.append([item.position for item in await anext(batches)])

    running = asyncio.create_task(feed.run())
    async with aclosing(batches), asyncio.timeout(10):
        for _ in range(3):
            await next_batch()
        for position in (3, 4):
            await projector._move(position)
            while not seen[-1] or seen[-1][-1] < position:
                await next_batch()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert seen[:3] == [[], [1], []]
    assert [positions for positions in seen if positions] == [[1], [2, 3], [4]]


async def test_logs_of_the_infrastructure_are_not_for_organizations(platform: Any) -> None:
    """The same event, without what the processes wrote."""
    failed = infra.InfraFailed(problem_id=str(uuid4()), run=1, namespace="n", reason="r", log=["secret"])
    await platform.record(failed)
    for role, log in (("organization", []), ("setter", ["secret"]), ("operator", ["secret"])):
        async with platform.client(role) as client, client.get(_STREAM) as reply:
            (frame,) = await take(reply, 1)
            assert msgspec.json.decode(frame["data"])["data"]["log"] == log


async def test_a_quiet_stream_shows_that_it_is_alive_and_a_reader_that_has_gone_is_noticed(platform: Any) -> None:
    """Comments come while nothing happens; afterwards nothing of the reader is left."""
    feed = platform.feed
    async with platform.client("setter") as setter:
        reply = await setter.get(_STREAM)
        async with asyncio.timeout(5):
            assert await reply.content.readuntil(b": alive\n\n")
        assert feed.watchers == 1
        reply.close()
        await until(lambda: feed.watchers == 0)


async def test_a_slow_reader_loses_nothing(platform: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """When more waits for it than it may keep, it reads the log again."""
    monkeypatch.setattr("gateway.stream._QUEUE", 3)
    problem_id = str(uuid4())
    feed = platform.feed
    batches = feed.follow(Filter(problem_id), 0, 5.0)
    await anext(batches)
    await platform.record(platform.story(problem_id)[0])
    found = [item.position for item in await anext(batches)]
    more = [platform.round(problem_id, number, "completed", number) for number in range(1, 21)]
    last = await platform.record(*more)
    await platform.projector.wait_for(last)
    async with asyncio.timeout(10):
        async for items in batches:
            found += [item.position for item in items]
            if found[-1] == last:
                break
    await batches.aclose()
    assert found == list(range(1, last + 1))


async def test_a_reader_that_takes_nothing_is_let_go(platform: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full connection is cut after a while: neither its place nor its memory is kept for ever."""
    monkeypatch.setattr("gateway.stream._WRITE_SECONDS", 0.3)
    problem_id, feed = str(uuid4()), platform.feed
    said = infra.InfraDegraded(
        problem_id=problem_id, run=1, namespace="n", component="selector-0", reason="r", log=["x" * 900_000]
    )
    host, port = platform.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
    writer.write(f"GET {_STREAM} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer fdt_setter_made_up\r\n\r\n".encode())
    await until(lambda: feed.watchers == 1)
    await platform.record(*[said] * 20)
    await until(lambda: feed.watchers == 0)
    received = 0
    with suppress(ConnectionError):
        async with asyncio.timeout(10):
            while chunk := await reader.read(65536):
                received += len(chunk)
    assert received < 20 * 900_000
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


async def test_too_many_streams_are_refused(platform: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal is an ordinary answer that says when to come back."""
    monkeypatch.setattr("gateway.stream._WATCHERS", 1)
    async with platform.client("setter") as setter, setter.get(_STREAM):
        reply = await setter.get(_STREAM)
        assert (reply.status, reply.headers["Retry-After"]) == (503, "60")


async def test_a_stop_ends_streams_at_once(platform: Any) -> None:
    """Nobody waits for a stream that would never end by itself."""
    async with platform.client("setter") as setter, setter.get(_STREAM) as reply:
        await platform.app.shutdown()
        async with asyncio.timeout(10):
            await reply.content.read()


async def test_many_watchers_get_everything_in_order(platform: Any) -> None:
    """However many watch while it is written, each sees the whole story."""
    problem_id = str(uuid4())
    async with platform.client("setter") as setter:
        replies = [await setter.get(_STREAM, params={"problem": problem_id}) for _ in range(20)]
        writing = asyncio.create_task(
            platform.record(*(platform.round(problem_id, number, "completed", number) for number in range(1, 101)))
        )
        seen = await asyncio.gather(*(take(reply, 100) for reply in replies))
        await writing
        assert all([int(frame["id"]) for frame in one] == list(range(1, 101)) for one in seen)
        for reply in replies:
            reply.close()
