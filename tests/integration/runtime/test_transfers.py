"""Bodies that break off and are gone on with, and the memory of a selector that many large ones come to."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec
import numpy as np
import pytest
import safetensors.numpy

from fedota.contracts.kit import Kit
from fedota.events.problems import Plan
from tests.integration.runtime.conftest import (
    Component,
    Participant,
    Weights,
    World,
    assert_same,
    expected_after,
    running,
    until,
    weighted_mean,
)

MEGABYTE = 1_000_000
_SPARE = 8  # megabytes for what is on its way in 8 connections, and for pieces that are worked on


def model(megabytes: float = 2) -> Weights:
    """So large, in two tensors."""
    count = int(megabytes * MEGABYTE) // 4
    values = np.arange(count, dtype=np.float32) % 1000
    return {"large": values[: count - 10].copy(), "small": values[count - 10 :].copy()}


def body(value: float, megabytes: float = 2) -> bytes:
    """An update with this value everywhere."""
    return safetensors.numpy.save({name: np.full_like(values, value) for name, values in model(megabytes).items()})


def plan(**changes: Any) -> Plan:
    """Two clients a round, both needed."""
    usual: dict[str, Any] = {"rounds": 1, "goal_count": 2, "minimum_fraction": 1.0, "selectors": 1}
    return Plan(**{**usual, **changes})


class Reply:
    """What a selector answered."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.json: Any = json.loads(body) if body else None

    @property
    def offset(self) -> int:
        """The bytes that it has."""
        return int(self.headers["upload-offset"])


class Line:
    """One request on a connection of its own, sent bit by bit."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        """Some more of it."""
        self.writer.write(data)
        await self.writer.drain()

    async def reply(self) -> Reply:
        """Wait for the answer."""
        async with asyncio.timeout(30):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:-2])}
            length = 0 if head[0].startswith("HTTP/1.1 204") else int(headers.get("content-length", 0))
            return Reply(int(head[0].split()[1]), headers, await self.reader.readexactly(length))

    def close(self) -> None:
        """Break it off."""
        self.writer.close()


class Sender:
    """A selected client that holds the line itself."""

    def __init__(self, selector: Component, token: str, name: str) -> None:
        self._address = urlsplit(selector.url)
        self._headers = {"Authorization": f"Bearer {token}", "Fedota-Client": name}
        self._lines: list[Line] = []
        self.answer: dict[str, Any] = {}

    def close(self) -> None:
        """Break off what is still open."""
        for line in self._lines:
            line.close()

    async def check_in(self) -> None:
        """Wait to be selected."""
        line = await self.line("POST", "/v1/check-in", {"Content-Length": "0"})
        self.answer = (await line.reply()).json
        line.close()
        assert self.answer["status"] == "selected"
        self._headers |= {"Fedota-Ticket": self.answer["ticket"], "Fedota-Examples": "1"}

    async def line(self, method: str, path: str = "/v1/updates", headers: dict[str, str] | None = None) -> Line:
        """A request whose headers are sent."""
        assert self._address.hostname and self._address.port
        line = Line(*await asyncio.open_connection(self._address.hostname, self._address.port))
        self._lines.append(line)
        lines = [f"{name}: {value}" for name, value in {"Host": "s", **self._headers, **(headers or {})}.items()]
        await line.send("\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode())
        return line

    async def post(self, size: int, begun: bytes) -> Line:
        """An update of which only the beginning is sent."""
        line = await self.line("POST", headers={"Content-Length": str(size)})
        await line.send(begun)
        return line

    async def patch(self, offset: int, rest: bytes, **more: str) -> Reply:
        """The rest of an update."""
        named = {name.replace("_", "-"): value for name, value in more.items()}
        headers = {"Upload-Offset": str(offset), "Content-Length": str(len(rest)), **named}
        line = await self.line("PATCH", headers=headers)
        with suppress(ConnectionError):  # a refusal may come before all is sent
            await line.send(rest)
        reply = await line.reply()
        line.close()
        return reply

    async def head(self) -> Reply:
        """What the selector has of the update."""
        line = await self.line("HEAD")
        reply_ = await line.reader.readuntil(b"\r\n\r\n")
        line.close()
        head = reply_.decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (one.partition(":") for one in head[1:-2])}
        return Reply(int(head[0].split()[1]), headers, b"")

    async def has(self, count: int) -> None:
        """Wait until the selector has so many bytes and nothing is on its way."""
        async with asyncio.timeout(20):
            while (reply := await self.head()).status != 204 or reply.offset != count:  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.02)


@asynccontextmanager
async def selected(world: World, plan_: Plan, megabytes: float = 2) -> AsyncIterator[list[Sender]]:
    """As many clients as the plan wants, each with a ticket."""
    await world.launch(plan_, model(megabytes))
    senders = [
        Sender(world.selectors[0], world.token(f"org {1 + (number - 1) % 50}"), f"client-{number}")
        for number in range(1, plan_.goal_count + 1)
    ]
    try:
        await asyncio.gather(*(one.check_in() for one in senders))
        yield senders
    finally:
        for one in senders:
            one.close()


def constant(value: float, megabytes: float = 2) -> Weights:
    """The model with this value everywhere."""
    return {name: np.full_like(values, value) for name, values in model(megabytes).items()}


async def test_an_update_is_gone_on_with_where_it_broke_off(world: World) -> None:
    """Several times, also in small pieces; in the end it counts as if it had come at once."""
    async with selected(world, plan()) as (one, other):
        assert (await other.patch(0, body(5.0))).status == 200, "from its beginning it is as good as a POST"
        whole = body(1.0)
        assert (await one.head()).offset == 0
        line = await one.post(len(whole), whole[:700_000])
        line.close()
        await one.has(700_000)
        line = await one.line("PATCH", headers={"Upload-Offset": "700000", "Upload-Length": str(len(whole))})
        line.close()
        await one.has(700_000)
        wrong = await one.patch(600_000, whole[600_000:])
        assert (wrong.status, wrong.json["code"], wrong.offset) == (409, "offset_mismatch", 700_000)
        part = await one.patch(700_000, whole[700_000:700_010], Upload_Length=str(len(whole)))
        assert (part.status, part.offset) == (204, 700_010)
        last = await one.patch(700_010, whole[700_010:], Upload_Length=str(len(whole)))
        assert (last.status, last.json) == (200, {"round": 1, "attempt": 1})
        final = await until(lambda: world.platform.final)
    assert_same(world.platform.weights(final), weighted_mean([(constant(1.0), 1), (constant(5.0), 1)]))
    assert final.refusals == [], "that a line broke is no refusal"


async def test_a_fresh_update_discards_what_was_kept(world: World) -> None:
    """The client may have made another one."""
    async with selected(world, plan()) as (one, other):
        assert (await other.patch(0, body(5.0))).status == 200
        old, new = body(9.0), body(1.0)
        (await one.post(len(old), old[:1_000_000])).close()
        await one.has(1_000_000)
        line = await one.post(len(new), new)
        assert (await line.reply()).status == 200
        assert (await one.head()).status == 409
        final = await until(lambda: world.platform.final)
    assert_same(world.platform.weights(final), weighted_mean([(constant(1.0), 1), (constant(5.0), 1)]))


async def test_what_is_gone_on_with_is_checked_as_a_whole(world: World) -> None:
    """A part that is spoiled spoils all; the update may then be sent again."""
    async with selected(world, plan()) as (one, other):
        assert (await other.patch(0, body(5.0))).status == 200
        spoiled, good = body(float("nan")), body(1.0)
        (await one.post(len(good), good[:1_000_000])).close()
        await one.has(1_000_000)
        refused = await one.patch(1_000_000, spoiled[1_000_000:])
        assert (refused.status, refused.json["code"]) == (422, "update_not_finite")
        large = await one.patch(0, b"", Upload_Length="99999999")
        assert (large.status, large.json["code"]) == (413, "update_too_large")
        for offset in ("", "-1", "x"):
            line = await one.line("PATCH", headers={"Upload-Offset": offset, "Content-Length": "0"})
            assert (await line.reply()).json["code"] == "invalid_field"
        assert (await one.patch(0, good)).status == 200
        final = await until(lambda: world.platform.final)
    assert_same(world.platform.weights(final), weighted_mean([(constant(1.0), 1), (constant(5.0), 1)]))


async def test_a_newer_connection_wins_over_one_that_stalls(world: World) -> None:
    """A client whose line broke without a word does not wait until the selector has noticed."""
    async with selected(world, plan()) as (one, other):
        assert (await other.patch(0, body(5.0))).status == 200
        whole = body(1.0)
        stalled = await one.post(len(whole), whole[:1_500_000])
        async with asyncio.timeout(10):
            # the selector may not have seen it yet, and then it has not been silent for long enough
            while (reply := await one.head()).status == 409 or not reply.offset:
                pass
        offset = reply.offset
        assert reply.status == 204 and 0 < offset <= 1_500_000
        assert (await one.patch(offset, whole[offset:])).status == 200
        with suppress(ConnectionError):
            assert await stalled.reader.read() == b""
        stalled.close()
        final = await until(lambda: world.platform.final)
    assert_same(world.platform.weights(final), weighted_mean([(constant(1.0), 1), (constant(5.0), 1)]))


async def test_of_more_than_so_many_updates_at_once_each_has_its_turn(world: World) -> None:
    """Also the one that does not hold its body back, though others are before it."""
    count = 65
    async with selected(world, plan(goal_count=count), 0.01) as senders:
        whole = body(1.0, 0.01)
        lines = [await one.post(len(whole), whole[:1000]) for one in senders[:-1]]
        async with asyncio.timeout(20):
            while (await world.metrics(world.selectors[0]))["fedota_uploads"] < count - 1:  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.02)
        last = await senders[-1].post(len(whole), whole)
        for line in lines:
            await line.send(whole[1000:])
        assert {(await line.reply()).status for line in [*lines, last]} == {200}
        final = await until(lambda: world.platform.final)
    assert final.reported == count


class Cutter:
    """Stands before a server and breaks connections off after so many bytes, in one direction or the other.

    `swallows` loses one answer: that to whoever has brought so many bytes. Unless it is `open`, nobody gets through.
    """

    def __init__(self, url: str) -> None:
        self._to = urlsplit(url)
        self.url = ""
        self.cuts: dict[str, list[int]] = {"up": [], "down": []}
        self.carried = {"up": 0, "down": 0}
        self.swallows = 0
        self.open = True
        self.shuts = False  # with the next cut

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert self._to.hostname and self._to.port
        if not self.open:
            writer.transport.abort()
            return
        there_reader, there_writer = await asyncio.open_connection(self._to.hostname, self._to.port)
        carried = {"up": 0, "down": 0}
        ways = [
            asyncio.ensure_future(self._carry("up", reader, there_writer, carried)),
            asyncio.ensure_future(self._carry("down", there_reader, writer, carried)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            for one in (writer, there_writer):
                one.close()

    async def _carry(
        self, way: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, carried: dict[str, int]
    ) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65_536):
                if way == "down" and 0 < self.swallows <= carried["up"]:
                    self.swallows = 0
                    return
                writer.write(data)
                await writer.drain()
                carried[way] += len(data)
                self.carried[way] += len(data)
                if self.cuts[way] and carried[way] >= self.cuts[way][0]:
                    self.cuts[way].pop(0)
                    self.open = not self.shuts
                    return

    @asynccontextmanager
    async def standing(self) -> AsyncIterator["Cutter"]:
        """At work within this."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server:
            yield self


async def test_a_client_goes_on_where_its_connections_broke(world: World, tmp_path: Path) -> None:
    """With the model and with its update: little is sent twice."""
    size = 12 * MEGABYTE
    await world.launch(plan(), model(12))
    async with Cutter(world.selectors[0].url).standing() as cutter:
        cutter.cuts = {"up": [4 * MEGABYTE, 3 * MEGABYTE], "down": [5 * MEGABYTE, 3 * MEGABYTE]}
        first, second = Participant(1, free=True), Participant(2, free=True)
        kit: Kit = msgspec.structs.replace(world.kit(first.organization), selectors=[cutter.url])
        other = second.run(world.kit(second.organization), tmp_path)
        async with running(first.run(kit, tmp_path), other):
            final = await until(lambda: world.platform.final)
        assert cutter.cuts == {"up": [], "down": []}
        for way in ("up", "down"):
            assert size < cutter.carried[way] < 1.2 * size, cutter.carried
    assert_same(world.platform.weights(final), expected_after(model(12), 1, first, second))


async def test_a_selector_goes_on_where_its_model_broke_off(world: World, tmp_path: Path) -> None:
    """From the coordinator it asks for the rest."""
    world.prepare(plan(), model(12))
    await world.coordinator.start()
    async with Cutter(world.coordinator.url).standing() as cutter:
        cutter.cuts["down"] = [5 * MEGABYTE]
        direct, world.coordinator.url = world.coordinator.url, cutter.url
        await world.selectors[0].start()
        clients = [Participant(number, free=True) for number in (1, 2)]
        async with running(*(one.run(world.kit(one.organization), tmp_path) for one in clients)):
            final = await until(lambda: world.platform.final)
        world.coordinator.url = direct
        assert not cutter.cuts["down"]
        assert cutter.carried["down"] < 2 * 13.5 * MEGABYTE, "the model before and after the round, and no third time"
    assert_same(world.platform.weights(final), expected_after(model(12), 1, *clients))


def _peak(component: Component) -> float:
    """The most memory that a process ever had, in megabytes."""
    status = Path(f"/proc/{component.process.pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024 / MEGABYTE


async def test_a_selectors_memory_does_not_grow_with_its_clients(world: World) -> None:
    """Three times the model beyond what it needs while it waits, though all updates were half here at once."""
    megabytes, count = 40, 8
    async with selected(world, plan(goal_count=count), megabytes) as senders:
        base = _peak(world.selectors[0])
        bodies = [body(float(number), megabytes) for number in range(1, count + 1)]
        half = len(bodies[0]) // 2
        lines = [await one.post(len(whole), whole[:1]) for one, whole in zip(senders, bodies, strict=True)]
        await asyncio.gather(*(line.send(whole[1:half]) for line, whole in zip(lines, bodies, strict=True)))
        await asyncio.gather(*(line.send(whole[half:]) for line, whole in zip(lines, bodies, strict=True)))
        replies = await asyncio.gather(*(line.reply() for line in lines))
        assert {reply.status for reply in replies} == {200}
        final = await until(lambda: world.platform.final)
        peak = _peak(world.selectors[0])
    assert_same(world.platform.weights(final), constant(sum(range(1, count + 1)) / count, megabytes))
    assert peak < base + 3 * megabytes + _SPARE, f"{peak:.0f} MB, of which {base:.0f} MB were needed before"


async def test_clipping_and_weights_are_the_plans(world: World) -> None:
    """A client that tells too many examples, or goes too far, has no more say than the plan gives it."""
    async with selected(world, plan(clip_norm=1.0, examples_per_update=10)) as (one, other):
        begun = model()
        step = {name: values + np.float32(7) for name, values in begun.items()}
        near = {name: values.copy() for name, values in begun.items()}
        near["small"][0] += np.float32(0.5)
        far, close = safetensors.numpy.save(step), safetensors.numpy.save(near)
        assert (await one.patch(0, far, Fedota_Examples="1000000000")).status == 200
        assert (await other.patch(0, close, Fedota_Examples="30")).status == 200
        final = await until(lambda: world.platform.final)
    norm = float(np.sqrt(sum(7.0**2 * values.size for values in begun.values())))
    taken = {name: (values + 7.0 / norm).astype(np.float64) for name, values in begun.items()}
    expected = {name: ((taken[name] + near[name]) / 2).astype(np.float32) for name in begun}
    assert_same(world.platform.weights(final), expected)
    assert final.examples == 20
    assert [(one.organization, one.clipped) for one in final.contributions] == [("org 1", 1), ("org 2", 0)]


@pytest.mark.parametrize("wanted", ["bytes=1000000-", "bytes=0-9"])
async def test_a_model_in_parts(world: World, wanted: str) -> None:
    """Of a selector, and of the coordinator."""
    await world.launch(plan(), model())
    content = safetensors.numpy.save(model())
    first, _, last = wanted.removeprefix("bytes=").partition("-")
    for component in world.components:
        key = "a shared secret" if component is world.coordinator else world.token("org 1")
        headers = {"Authorization": f"Bearer {key}", "Range": wanted}
        url = f"{component.url}/v1/models/{world.digest}"
        async with aiohttp.ClientSession() as http, asyncio.timeout(10):
            while (await _status(http, url, headers)) == 404:  # the selector is still fetching it
                pass
            async with http.get(url, headers=headers) as reply:
                assert (reply.status, reply.headers["ETag"]) == (206, f'"{world.digest}"')
                assert await reply.read() == content[int(first) : int(last) + 1 if last else None]


async def _status(http: aiohttp.ClientSession, url: str, headers: dict[str, str]) -> int:
    async with http.head(url, headers=headers) as reply:
        return reply.status
