"""How a coordinator reads the sums that are handed over to it."""

import asyncio
import gc
import hashlib
import struct
import weakref
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import aiohttp
import numpy as np
import pytest
import safetensors.numpy
from aiohttp import web

from fedota.errors import FedotaError
from fedota.events import to_json
from fedota.process import serving
from fedota.runtime.coordinator import collector as places
from fedota.runtime.coordinator import partials as module
from fedota.runtime.coordinator.collector import Collector
from fedota.runtime.coordinator.partials import Partials
from fedota.runtime.coordinator.training import Training
from fedota.runtime.places import Memory, Spooled
from fedota.runtime.protocol import OFFSET, PARTIALS, SUM, Accepted, Meta
from fedota.runtime.selector.link import Link
from fedota.runtime.tensors import layout_of
from fedota.runtime.uploads import Uploads
from fedota.runtime.web import problems
from tests.support.waiting import until

COUNT = 100_000
LAYOUT = layout_of(memoryview(safetensors.numpy.save({"w": np.zeros(COUNT, np.float32)})))
NUMBERS = np.random.default_rng(1).standard_normal(COUNT).tobytes()
HALF = 350_001


class Collecting:
    """A training that wants the sums of some lives."""

    def __init__(self, directory: Path) -> None:
        self.collector: Collector | None = Collector(LAYOUT, directory)
        self.wanted = {"a", "b"}

    def require_wanted(self, meta: Meta) -> Collector:
        """What takes this sum."""
        if self.collector is None or meta.life not in self.wanted:
            raise FedotaError("round_over", f"The sum of {meta.life} is not asked for now.")
        return self.collector

    async def take(self, meta: Meta, numbers: Memory | Spooled) -> None:
        """A sum is whole."""
        await self.require_wanted(meta).take(meta, numbers)

    @property
    def parts(self) -> Uploads:
        """What is on its way."""
        assert self.collector is not None
        return self.collector.parts

    async def total(self) -> bytes:
        """The numbers of all."""
        assert self.collector is not None
        return bytes((await self.collector.close()).numbers)


@pytest.fixture(params=["small", "large"])
def training(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Collecting:
    """One whose sums are small, or too large for a second one in memory."""
    if request.param == "large":
        monkeypatch.setattr(places, "_LARGE", 0)
    return Collecting(tmp_path)


@pytest.fixture
async def there(training: Collecting, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator["There"]:
    """Where sums are handed over; one has its turn at a time."""
    monkeypatch.setattr(module, "_AT_ONCE", 1)
    app = web.Application(middlewares=[problems])
    partials = Partials(lambda: cast("Training", training))
    app.router.add_routes(partials.routes())
    async with serving(app, "127.0.0.1", 0) as url, aiohttp.ClientSession() as http:
        yield There(url, http, partials)


class Sum:
    """What a selector hands over."""

    def __init__(self, life: str = "a", examples: int = 1) -> None:
        accepted = [Accepted(ticket=f"ticket of {life}", organization="org", examples=examples, metrics={})]
        said = to_json(Meta(cohort="c", life=life, collection="1", accepted=accepted))
        self.head = struct.pack("<Q", len(said)) + said
        self.name = hashlib.sha256(self.head).hexdigest()
        self.body = self.head + NUMBERS
        self.before = len(self.head)


class There:
    """A coordinator's address for sums."""

    def __init__(self, url: str, http: aiohttp.ClientSession, partials: Partials) -> None:
        self.turns = partials._turns
        self._url = url + PARTIALS.format(name="s")
        self._http = http

    async def ask(self, method: str, data: Any = None, **headers: Any) -> tuple[int, str, str]:
        """The status, the code of the error, and the offset."""
        named = {name.replace("_", "-"): str(value) for name, value in headers.items()}
        async with self._http.request(method, self._url, data=data, headers=named) as reply:
            said = await reply.json(content_type=None) if reply.status >= 400 and method != "HEAD" else {}
            return reply.status, said.get("code", ""), reply.headers.get(OFFSET, "")

    async def put(self, sum_: Sum) -> tuple[int, str, str]:
        """Hand it over as a whole."""
        return await self.ask("PUT", sum_.body)

    async def head(self, sum_: Sum) -> tuple[int, str, str]:
        """Ask what is there of it."""
        return await self.ask("HEAD", **{SUM: sum_.name})

    async def patch(self, sum_: Sum, offset: Any, data: bytes | None = None) -> tuple[int, str, str]:
        """Go on with it."""
        rest = sum_.body[offset:] if data is None else data
        return await self.ask("PATCH", rest, **{SUM: sum_.name, OFFSET: offset})

    async def begin(self, sum_: Sum, count: int, *, offset: int = 0) -> asyncio.StreamWriter:
        """Send a part of it on a connection that stays."""
        place = urlsplit(self._url)
        assert place.hostname and place.port
        _, writer = await asyncio.open_connection(place.hostname, place.port)
        goes_on = f"{SUM}: {sum_.name}\r\n{OFFSET}: {offset}\r\n" if offset else ""
        first = f"{'PATCH' if offset else 'PUT'} {place.path} HTTP/1.1\r\nHost: c\r\n{goes_on}"
        writer.write(f"{first}Content-Length: {len(sum_.body) - offset}\r\n\r\n".encode() + sum_.body[offset:][:count])
        await writer.drain()
        return writer


async def breaks_off(there: There, sum_: Sum, count: int, *, offset: int = 0) -> None:
    """A part of it comes, and then the connection is gone."""
    writer = await there.begin(sum_, count, offset=offset)
    writer.close()
    async with asyncio.timeout(10):
        while (await there.head(sum_)) != (204, "", str(offset + count)):
            pass


async def arrives(training: Collecting, life: str, count: int) -> None:
    """So many bytes of its numbers are there."""
    async with asyncio.timeout(10):
        while (upload := training.parts.receiving.get(life)) is None or upload.received < count:  # noqa: ASYNC110
            await asyncio.sleep(0)


def whole(sum_: Sum) -> tuple[int, str, str]:
    """The answer that all of it is there."""
    return 204, "", str(len(sum_.body))


async def test_who_falls_silent_before_a_sum_holds_no_turn(
    there: There, training: Collecting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its request is given up after a while, and the others are answered meanwhile."""
    monkeypatch.setattr(module, "_META_SECONDS", 1.0)
    begun, never = asyncio.Event(), asyncio.Event()

    async def silent() -> AsyncIterator[bytes]:
        yield struct.pack("<Q", 1000) + b"{"
        begun.set()
        await never.wait()

    waiting = asyncio.create_task(there.ask("PUT", silent()))
    await begun.wait()
    assert await there.put(Sum("lost")) == (409, "round_over", "")
    assert await there.put(Sum("a")) == (204, "", "")
    assert not waiting.done()
    assert await waiting == (503, "unavailable", "")
    never.set()


async def test_a_sum_goes_on_where_it_broke_off(there: There, training: Collecting) -> None:
    """Several times; not one bit of it is another, and none counts twice. What is kept holds no turn."""
    one, other = Sum("a"), Sum("b", examples=2)
    assert await there.head(one) == (204, "", "0")
    await breaks_off(there, one, HALF)
    await breaks_off(there, one, 300_000, offset=HALF)
    await breaks_off(there, other, other.before + 100)
    assert await there.patch(one, HALF + 300_000) == (204, "", "")
    assert await there.patch(other, other.before + 100) == (204, "", "")
    total = np.frombuffer(await training.total())
    assert np.array_equal(total, 2 * np.frombuffer(NUMBERS))
    assert training.collector is not None and training.collector.lives == {"a": 1, "b": 1}


async def test_a_sum_that_broke_off_before_its_numbers_goes_on_too(there: There, training: Collecting) -> None:
    """What it is the sum of is known; its bytes are counted, too."""
    one = Sum()
    await breaks_off(there, one, one.before)
    assert await there.patch(one, one.before) == (204, "", "")
    assert await training.total() == NUMBERS


async def test_what_goes_on_elsewhere_is_refused(there: There, training: Collecting) -> None:
    """With the place where it does go on; what is there stays as it is."""
    one, other = Sum("a"), Sum("b")
    await breaks_off(there, one, HALF)
    for offset in (HALF - 1, HALF + 1, 1, len(one.body)):
        assert await there.patch(one, offset) == (409, "offset_mismatch", str(HALF))
    assert await there.patch(other, HALF) == (409, "offset_mismatch", "0")
    assert await there.patch(one, HALF, one.body) == (400, "invalid_request", "")
    assert await there.patch(one, "x", b"") == (400, "invalid_request", "")
    assert await there.patch(one, HALF) == (204, "", "")
    assert await training.total() == NUMBERS


async def test_sums_of_other_updates_are_never_joined(there: There, training: Collecting) -> None:
    """A selector that begins with another one leaves nothing of the first."""
    before, now = Sum(examples=1), Sum(examples=2)
    await breaks_off(there, before, HALF)
    assert await there.head(now) == (204, "", "0")
    assert await there.patch(now, HALF) == (409, "offset_mismatch", "0")
    await breaks_off(there, now, 1000)
    assert await there.head(before) == (204, "", "0")
    assert await there.patch(before, HALF) == (409, "offset_mismatch", "0")
    assert await there.patch(now, 1000) == (204, "", "")
    assert training.collector is not None and training.collector.accepted["ticket of a"].examples == 2
    assert await training.total() == NUMBERS


async def test_a_sum_whose_answer_was_lost_is_not_read_again(there: There, training: Collecting) -> None:
    """It is there, whatever is sent of it again: not even its numbers are waited for."""
    one = Sum()
    assert await there.put(one) == (204, "", "")
    assert await there.head(one) == whole(one)
    for method, headers in (("PUT", {}), ("PATCH", {SUM: one.name, OFFSET: 0})):
        reader, writer = await _raw(there, method, headers, len(one.body))
        writer.write(one.head)
        assert (await asyncio.wait_for(reader.readline(), 5)).startswith(b"HTTP/1.1 204")
        writer.close()
    assert await training.total() == NUMBERS


async def _raw(
    there: There, method: str, headers: dict[str, Any], length: int
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    place = urlsplit(there._url)
    assert place.hostname and place.port
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    lines = [f"{name}: {value}" for name, value in {"Host": "c", "Content-Length": length, **headers}.items()]
    writer.write("\r\n".join([f"{method} {place.path} HTTP/1.1", *lines, "", ""]).encode())
    return reader, writer


async def test_a_newer_connection_wins_over_one_that_stands_still(there: There, training: Collecting) -> None:
    """As long as the older one lives it is the newer that has to wait; never do both write."""
    one = Sum()
    older = await there.begin(one, HALF)
    await arrives(training, "a", HALF - one.before)
    asking = asyncio.create_task(there.put(one))
    for at in range(HALF, HALF + 30):  # it lives
        older.write(one.body[at : at + 1])
        await asyncio.sleep(0.05)
    assert await asking == (503, "unavailable", "")
    here = HALF + 30
    assert await there.head(one) == (204, "", str(here))
    assert await there.patch(one, here) == (204, "", "")
    older.write(b"x" * 1000)  # into nothing
    assert await training.total() == NUMBERS
    older.close()


async def test_two_that_come_after_one_that_is_dead(there: There, training: Collecting) -> None:
    """One of them goes on; the other one does not write into the same place."""
    one = Sum()
    dead = await there.begin(one, HALF)
    await arrives(training, "a", HALF - one.before)
    answers = await asyncio.gather(there.patch(one, HALF), there.patch(one, HALF))
    assert [status for status, _, _ in answers] == [204, 204]
    assert await training.total() == NUMBERS
    dead.close()


async def test_two_that_waited_for_their_turn(there: There, training: Collecting) -> None:
    """They get one at the same time: only one of them goes on."""
    one = Sum()
    await there.turns.acquire()
    asked = [asyncio.create_task(there.put(one)) for _ in range(2)]
    async with asyncio.timeout(10):
        while len(there.turns._waiters or ()) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0)
    there.turns.release()
    there.turns.release()
    assert [status for status, _, _ in await asyncio.gather(*asked)] == [204, 204]
    assert await training.total() == NUMBERS


async def test_what_nobody_waits_for_is_dropped(there: There, training: Collecting) -> None:
    """Of a life that was lost, and of a collection that is over."""
    lost, other = Sum("a"), Sum("b")
    await breaks_off(there, lost, HALF)
    training.wanted = {"b"}
    training.parts.retain(training.wanted)
    assert await there.head(lost) == (409, "", "") and training.parts.received("a") == 0
    assert await there.patch(lost, HALF) == (409, "round_over", "")
    writer = await there.begin(other, HALF)
    await arrives(training, "b", HALF - other.before)
    training.wanted = set()
    training.parts.retain(training.wanted)
    async with asyncio.timeout(10):
        while training.parts.receiving:  # noqa: ASYNC110 - it is broken off
            await asyncio.sleep(0)
    assert list(training.parts.places()) == []
    training.collector = None
    assert await there.head(other) == (409, "", "")
    assert await there.patch(other, HALF) == (409, "offset_mismatch", "0")
    writer.close()


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Nobody looks for circles of references, which in a process that has little to do may take hours."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collection")
async def test_a_sum_that_broke_off_holds_no_memory_when_its_collection_is_over(
    training: Collecting, there: There
) -> None:
    """Neither its own nor that of the total."""
    assert await there.put(Sum("b")) == (204, "", "")
    await breaks_off(there, Sum("a"), HALF)

    async def is_kept() -> bool:
        return bool(training.parts.received("a"))

    await until(is_kept, "what came is kept")
    assert training.collector is not None
    ended = weakref.ref(training.collector)
    training.collector = None

    async def is_gone() -> bool:
        return ended() is None

    await until(is_gone, "nobody holds the collector any more", patience=5)


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("size", [4_000_000, 40_000_000])
async def test_a_selector_holds_no_sum_that_was_not_taken(size: int) -> None:
    """The next cohort's sum would lie beside it."""

    async def resets(request: web.Request) -> web.Response:
        await request.content.readexactly(1_000_000)
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async def is_over(request: web.Request) -> web.Response:
        return web.Response(status=409)

    app = web.Application()
    app.router.add_put(PARTIALS, resets)
    app.router.add_head(PARTIALS, is_over)
    async with serving(app, "127.0.0.1", 0) as url:
        link = Link(url, "k", "s", "a")
        async with link.open():
            numbers = np.zeros(size, np.uint8)
            with pytest.raises(FedotaError):
                await link.hand_over(Meta(cohort="c", life="a", collection="1", accepted=[]), numbers.data)
            held = weakref.ref(numbers)
            del numbers

            async def is_gone() -> bool:
                return held() is None

            await until(is_gone, "nobody holds the sum any more", patience=5)
