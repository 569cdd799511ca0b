"""Whom a client tells what."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest
from aiohttp import web

from fedota.client import selectors as module
from fedota.client.selectors import NoAnswerError, Selectors
from fedota.client.train import Update
from fedota.contracts.kit import Kit
from fedota.contracts.runtime import Listening
from fedota.events import to_json
from fedota.process import serving_at
from fedota.runtime import bodies
from fedota.runtime.bodies import invite, read_body, unhurried
from fedota.runtime.places import Memory
from fedota.runtime.protocol import CHECK_IN, MODELS, UPDATES, Finished, ModelRef
from fedota.runtime.tensors import Layout, Tensor
from fedota.runtime.web import problems


def _kit(*urls: str) -> Kit:
    return Kit(problem_id="p", name="n", organization="o", token="secret", selectors=[*urls], expires=2_000_000_000)


@asynccontextmanager
async def _proxy(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[bytearray]:
    """What a proxy hears that the environment names for everything; it passes nothing on."""
    heard = bytearray()

    async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.extend(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(hear, "127.0.0.1", 0)
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    async with server:
        yield heard


@asynccontextmanager
async def _selector() -> AsyncIterator[str]:
    """One that says that it is all over."""

    async def check_in(request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == "Bearer secret"
        return web.Response(body=to_json(Finished(reason="done")))

    app = web.Application()
    app.router.add_post(CHECK_IN, check_in)
    async with serving_at(Listening(), app) as url:
        yield url


async def test_a_token_is_not_told_to_a_proxy_in_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is spoken without TLS is for this machine alone, whatever proxy stands in the environment."""
    async with _proxy(monkeypatch) as heard, _selector() as url, Selectors.of(_kit(url), 1) as selectors:
        assert isinstance(await selectors.check_in(None), Finished)
        assert not heard


@pytest.mark.parametrize("beside", [(), ("http://127.0.0.1:1",)])
async def test_a_proxy_is_asked_for_a_way_to_tls_alone(monkeypatch: pytest.MonkeyPatch, beside: tuple[str]) -> None:
    """By CONNECT, and with nothing that is said there; not at all where something else is in the kit too."""
    async with _proxy(monkeypatch) as heard, Selectors.of(_kit("https://127.0.0.1:1", *beside), 60) as selectors:
        for _ in range(1 + len(beside)):
            with pytest.raises(NoAnswerError):
                await selectors.check_in(None)
        assert b"secret" not in heard
        assert heard.startswith(b"CONNECT 127.0.0.1:1 ") is not bool(beside)


_BODY = bytes(100_000)


def _update() -> Update:
    """One that is long enough for the selector to be waited for."""
    values = np.frombuffer(_BODY, np.uint8)
    tensor = Tensor("w", values.dtype, values.shape, 0, values.size)
    return Update(Layout(b"", (tensor,)), [values], 1, "{}")


class _Selector:
    """Takes updates as the real one does, and notes which of them waited to be asked for."""

    def __init__(self) -> None:
        self.waited: list[bool] = []
        self.taken = 0

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        """Its URL."""
        app = web.Application(middlewares=[problems])
        app.router.add_post(UPDATES, self._update, expect_handler=unhurried)
        async with serving_at(Listening(), app) as url:
            yield url

    async def _update(self, request: web.Request) -> web.Response:
        self.waited.append("Expect" in request.headers)
        place = Memory(memoryview(bytearray(len(_BODY))))
        await invite(request)
        await read_body(request, place)
        self.taken += 1
        return web.Response(body=b"{}")


@asynccontextmanager
async def _between(url: str, version: bytes) -> AsyncIterator[str]:
    """Something that passes on all that is said, but `100 Continue`; it speaks HTTP of this version to the selector."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, what: bytes, into: bytes) -> None:
        while piece := await reader.read(1 << 16):
            writer.write(piece.replace(what, into))
        writer.close()

    async def both(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        back = asyncio.create_task(pump(there_reader, writer, b"HTTP/1.1 100 Continue\r\n\r\n", b""))
        await pump(reader, there_writer, b" HTTP/1.1\r\n", b" " + version + b"\r\n")
        await back

    server = await asyncio.start_server(both, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize(("version", "waited"), [(b"HTTP/1.1", [True, False, False]), (b"HTTP/1.0", [False, False])])
async def test_an_update_arrives_through_what_swallows_that_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, version: bytes, waited: list[bool]
) -> None:
    """It is found out once, and by HTTP/1.0 without taking anybody's turn."""
    monkeypatch.setattr(bodies, "STALL", 0.2)
    monkeypatch.setattr(bodies, "_UNASKED", 0.2)
    selector = _Selector()
    async with (
        asyncio.timeout(20),
        selector.serving() as url,
        _between(url, version) as between,
        Selectors.of(_kit(between), 60) as selectors,
    ):
        for _ in range(2):
            await selectors.send("t", _update(), 60)
    assert (selector.waited, selector.taken) == (waited, 2)


async def test_a_selector_that_never_asks_is_left_and_later_sent_to_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be dead, or unheard; once it has taken an update it is waited for again."""
    monkeypatch.setattr(module, "_ASKED", 0.2)
    heard, silent = list[bool](), True

    async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        heard.append(b"100-continue" in head)
        if heard[-1] and silent:
            await reader.read()
        else:
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n" if heard[-1] else b"")
            await reader.readexactly(len(_BODY))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
        writer.close()

    server, selector = await asyncio.start_server(hear, "127.0.0.1", 0), _Selector()
    mute = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with asyncio.timeout(20), server, selector.serving() as url, Selectors.of(_kit(mute), 60) as selectors:
        selectors._urls.append(url)
        with pytest.raises(NoAnswerError, match="did not ask for the update"):
            await selectors._send_rest("t", _update(), 0, 60)
        await selectors.send("t", _update(), 60)
        assert (selector.waited, heard) == ([True], [True]), "another one is asked, and asks"
        selectors.turn()
        await selectors.send("t", _update(), 60)
        silent = False
        await selectors.send("t", _update(), 60)
    assert heard == [True, False, True]


async def test_a_model_that_somebody_keeps_stays_as_it_is() -> None:
    """The memory of one that nobody keeps is used for the next."""
    bodies_ = {name: bytes([number]) * 400_000 for number, name in enumerate("abc")}

    async def model(request: web.Request) -> web.Response:
        return web.Response(body=bodies_[request.match_info["sha256"]])

    app = web.Application()
    app.router.add_get(MODELS, model)
    async with serving_at(Listening(), app) as url, Selectors.of(_kit(url), 60) as selectors:
        kept = np.frombuffer(await selectors.fetch(ModelRef(sha256="a", size=400_000)), np.uint8)
        other = np.frombuffer(await selectors.fetch(ModelRef(sha256="b", size=400_000)), np.uint8)
        address = kept.ctypes.data
        assert address != other.ctypes.data
        assert (kept == 0).all() and (other == 1).all()
        del kept
        again = np.frombuffer(await selectors.fetch(ModelRef(sha256="c", size=400_000)), np.uint8)
        assert again.ctypes.data == address and (again == 2).all()
