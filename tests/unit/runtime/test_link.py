"""A selector and a coordinator that does not answer as it should."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import msgspec
import pytest
from aiohttp import web

from fedota.errors import FedotaError
from fedota.process import serving
from fedota.runtime.coordinator.rounds import COLLECTING, LEASE
from fedota.runtime.protocol import MODELS, OFFSET, PARTIALS, STATES, SUM, Meta, ModelRef, Told
from fedota.runtime.selector import link as module
from fedota.runtime.selector import selecting
from fedota.runtime.selector.link import Link

BODY = bytes(range(256)) * 4096
MODEL = ModelRef(sha256=hashlib.sha256(BODY).hexdigest(), size=len(BODY))
TOLD = Told(name="selector-0", life="life", waiting=0)


class Coordinator:
    """Takes requests in. `heard` counts them; only once `answers` is set they are answered."""

    def __init__(self) -> None:
        self.heard = 0
        self.answers = asyncio.Event()
        self.pause = 0.0

    def app(self) -> web.Application:
        """Its HTTP side."""
        app = web.Application(client_max_size=2**30)
        app.router.add_post(STATES, self._take)
        app.router.add_put(PARTIALS, self._take)
        app.router.add_head(PARTIALS, self._has)
        app.router.add_get(MODELS, self._give)
        return app

    async def _take(self, request: web.Request) -> web.Response:
        await request.read()
        self.heard += 1
        await self.answers.wait()
        return web.Response(status=204)

    async def _has(self, _: web.Request) -> web.Response:
        return web.Response(status=204, headers={OFFSET: "0"})

    async def _give(self, request: web.Request) -> web.StreamResponse:
        self.heard += 1
        await self.answers.wait()
        response = web.StreamResponse(headers={"Content-Length": str(len(BODY))})
        await response.prepare(request)
        for start in range(0, len(BODY), 1 << 17):
            await response.write(BODY[start : start + (1 << 17)])
            await asyncio.sleep(self.pause)
        return response


@pytest.fixture
async def coordinator() -> AsyncIterator[tuple[Coordinator, Link]]:
    """One, and the way to it."""
    there = Coordinator()
    async with serving(there.app(), "127.0.0.1", 0) as url:
        link = Link(url, "key", "selector-0", "life")
        async with link.open():
            yield there, link
        there.answers.set()


def sooner(timeout: aiohttp.ClientTimeout, kind: str) -> aiohttp.ClientTimeout:
    """A hundredth of one of its limits."""
    return aiohttp.ClientTimeout(**{kind: getattr(timeout, kind) / 100})


async def unanswered(link: Link, what: str, directory: Path) -> None:
    """Something is asked of a coordinator that never answers it."""
    async with asyncio.timeout(5):
        with pytest.raises(FedotaError, match=r"unavailable: The coordinator does not answer"):
            if what == "fetch":
                await link.fetch(MODEL, directory / "model.safetensors")
            else:
                await link.hand_over(Meta(cohort="k", life="life", collection="c", accepted=[]), memoryview(BODY))


@pytest.mark.parametrize("what", ["fetch", "hand_over"])
async def test_an_answer_that_never_comes_is_given_up(
    coordinator: tuple[Coordinator, Link], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The connection may be dead; there is time for another try before a collection ends."""
    there, link = coordinator
    assert module._LONG.sock_read is not None and module._LONG.sock_read < COLLECTING
    monkeypatch.setattr(module, "_LONG", sooner(module._LONG, "sock_read"))
    await unanswered(link, what, tmp_path)
    assert there.heard == 1


async def test_a_sum_that_nobody_reads_can_be_kept_back() -> None:
    """Orders change while it is being sent: the connection ends, and another one is as good as ever."""
    gone = asyncio.Event()

    class Deaf(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.Transport)
            self._transport = transport
            transport.pause_reading()
            asyncio.get_running_loop().call_later(0.3, transport.resume_reading)

        def connection_lost(self, exc: Exception | None) -> None:
            gone.set()

    server = await asyncio.get_running_loop().create_server(Deaf, "127.0.0.1", 0)
    link = Link(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "key", "selector-0", "life")
    meta = Meta(cohort="k", life="life", collection="c", accepted=[])
    async with server, link.open(), asyncio.timeout(10):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await link.hand_over(meta, memoryview(BODY * 64))
        await gone.wait()


async def test_a_model_that_comes_slowly_is_waited_for(
    coordinator: tuple[Coordinator, Link], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes longer than an answer may."""
    there, link = coordinator
    assert module._LONG.sock_read is not None
    there.pause = module._LONG.sock_read / 200
    there.answers.set()
    monkeypatch.setattr(module, "_LONG", sooner(module._LONG, "sock_read"))
    await link.fetch(MODEL, tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").read_bytes() == BODY and there.heard == 1


@pytest.mark.parametrize("left", [None, BODY[:1000], bytes(1000), bytes(len(BODY)), bytes(len(BODY) + 1)])
async def test_a_damaged_model_is_fetched_again_and_never_had(tmp_path: Path, left: bytes | None) -> None:
    """Whether it comes so or an earlier life's part of it is: neither its file nor what was left says who is right."""
    path, asked, bodies_ = tmp_path / "model.safetensors", list[str](), list[bytes]()
    if left is not None:
        path.write_bytes(bytes(len(BODY)))  # that life had it whole; what a disk has made of it since nobody knows
        path.with_suffix(".new").write_bytes(left)

    async def give(request: web.Request) -> web.Response:
        asked.append(request.headers.get("Range", ""))
        start = int(asked[-1].removeprefix("bytes=").removesuffix("-") or 0)
        return web.Response(status=206 if start else 200, body=bodies_.pop(0)[start:])

    app = web.Application()
    app.router.add_get(MODELS, give)
    async with serving(app, "127.0.0.1", 0) as url:
        link = Link(url, "key", "selector-0", "life")
        async with link.open():
            bodies_ += [BODY[:-1] + b"x", BODY]
            with pytest.raises(FedotaError, match="came damaged"):
                await link.fetch(MODEL, path)
            assert not path.with_suffix(".new").exists()
            bodies_[:] = bodies_[-1:]
            await link.fetch(MODEL, path)
    assert path.read_bytes() == BODY
    here = min(len(left or b""), len(BODY))
    assert asked == [f"bytes={here}-"] * (0 < here < len(BODY)) + [""] * (1 + (here == 0))


async def test_one_message_may_be_swallowed(
    coordinator: tuple[Coordinator, Link], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one comes, and may be slow, before the coordinator takes the selector for dead."""
    there, link = coordinator
    assert module._TELL.total is not None
    assert selecting._HEARTBEAT + 2 * module._TELL.total + 0.3 < LEASE
    monkeypatch.setattr(module, "_TELL", sooner(module._TELL, "total"))
    async with asyncio.timeout(5):
        with pytest.raises(FedotaError, match="unavailable"):
            await link.tell(TOLD)
    there.answers.set()
    await link.tell(TOLD)
    assert there.heard == 2


class Forgetful:
    """A coordinator that takes a part of each sum that comes, and then breaks the connection off."""

    def __init__(self, *parts: int) -> None:
        self.parts = list(parts)
        self.said: list[tuple[str, int]] = []
        self.body = b""
        self.names: set[str] = set()
        self.refuses = 0

    def app(self) -> web.Application:
        """Its HTTP side."""
        app = web.Application(client_max_size=2**30)
        app.router.add_put(PARTIALS, self._take)
        app.router.add_patch(PARTIALS, self._take)
        app.router.add_head(PARTIALS, self._tell)
        return app

    async def _take(self, request: web.Request) -> web.Response:
        self.names.add(request.headers[SUM])
        at = int(request.headers.get(OFFSET, 0))
        self.said.append((request.method, at))
        body = self.body[:at] + await request.read()
        if self.parts:
            self.body = body[: self.parts.pop(0)]
            assert request.transport is not None
            request.transport.close()
        else:
            self.body = body
        return web.Response(status=204)

    async def _tell(self, request: web.Request) -> web.Response:
        self.names.add(request.headers[SUM])
        self.said.append(("HEAD", len(self.body)))
        return web.Response(status=self.refuses or 204, headers={OFFSET: str(len(self.body))})


META = Meta(cohort="k", life="life", collection="c", accepted=[])


@asynccontextmanager
async def linked(there: Forgetful) -> AsyncIterator[Link]:
    """A link to it."""
    async with serving(there.app(), "127.0.0.1", 0) as url:
        link = Link(url, "key", "selector-0", "life")
        async with link.open():
            yield link


async def test_a_sum_is_gone_on_with_where_it_broke_off() -> None:
    """As long as some of it comes through; the next time too. Its beginning is sent once."""
    there = Forgetful(500_000, 700_000, 700_000)
    async with linked(there) as link:
        with pytest.raises(FedotaError, match="unavailable"):  # nothing came: whoever hands it over waits a moment
            await link.hand_over(META, memoryview(BODY))
        await link.hand_over(META, memoryview(BODY))
        first = [("PUT", 0), ("HEAD", 500_000), ("PATCH", 500_000), ("HEAD", 700_000), ("PATCH", 700_000)]
        assert there.said == [*first, ("HEAD", 700_000), ("HEAD", 700_000), ("PATCH", 700_000)]
        head, numbers = there.body[: -len(BODY)], there.body[-len(BODY) :]
        assert numbers == BODY and there.names == {hashlib.sha256(head).hexdigest()}
        there.said.clear()
        await link.hand_over(META, memoryview(BODY))
        assert there.said == [("HEAD", len(there.body))], "only its answer was lost"
        await link.hand_over(msgspec.structs.replace(META, collection="d"), memoryview(BODY))
        assert there.said[1:] == [("PUT", 0)], "for another collection it is another sum"


@pytest.mark.parametrize(("status", "code"), [(409, "round_over"), (503, "unavailable")])
async def test_a_sum_that_is_not_asked_for_is_not_sent(status: int, code: str) -> None:
    """Nor one that is on its way by another connection."""
    there = Forgetful(500_000)
    there.refuses = status
    async with linked(there) as link:
        with pytest.raises(FedotaError, match=code):
            await link.hand_over(META, memoryview(BODY))
    assert there.said == [("PUT", 0), ("HEAD", 500_000)]


async def test_a_coordinator_from_before_gets_the_sum_once_more_as_a_whole() -> None:
    """It knows of no sum that is gone on with: a selector that was started anew beside it must not give up."""
    heard = list[str]()

    async def take(request: web.Request) -> web.Response:
        heard.append(request.method)
        if len(heard) == 1:
            assert request.transport is not None
            request.transport.abort()
        return web.Response(status=204)

    app = web.Application(client_max_size=2**30)
    app.router.add_put(PARTIALS, take)
    async with serving(app, "127.0.0.1", 0) as url:
        link = Link(url, "key", "selector-0", "life")
        async with link.open():
            meta = Meta(cohort="k", life="life", collection="c", accepted=[])
            with pytest.raises(FedotaError, match="does not answer"):
                await link.hand_over(meta, memoryview(BODY))
            await link.hand_over(meta, memoryview(BODY))
    assert heard == ["PUT", "PUT"]
