"""Whom a client tells what."""

import asyncio
import gc
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import aiohttp
import msgspec
import numpy as np
import pytest
from aiohttp import web

from fedota.client import selectors as module
from fedota.client.errors import ClientError
from fedota.client.selectors import NoAnswerError, Selectors, bounded
from fedota.client.train import Update
from fedota.contracts.kit import Kit
from fedota.contracts.runtime import Listening
from fedota.errors import FedotaError
from fedota.events import to_json
from fedota.process import serving_at
from fedota.runtime import bodies, receiving
from fedota.runtime.places import Memory
from fedota.runtime.protocol import CHECK_IN, MODELS, OFFSET, UPDATES, Finished, ModelRef
from fedota.runtime.receiving import invite, read_body, unhurried
from fedota.runtime.tensors import Layout, Tensor
from fedota.runtime.web import problem_response, problems
from fedota.tls import server_context
from services.orchestrator.launchers.authority import Authority


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


async def test_who_cannot_be_reached_is_said_in_our_words() -> None:
    """Nothing of TLS where there is none."""
    async with Selectors.of(_kit("http://127.0.0.1:1"), 60) as selectors:
        with pytest.raises(NoAnswerError, match=r"^127\.0\.0\.1:1 cannot be reached: Connection refused$"):
            await selectors.check_in(None)
    async with Selectors.of(_kit("http://nowhere.invalid:1"), 60) as selectors:
        with pytest.raises(NoAnswerError, match=r"^nowhere\.invalid:1 cannot be reached: [A-Z][a-z ]+"):
            await selectors.check_in(None)


@asynccontextmanager
async def _secure(directory: Path, authority: Authority) -> AsyncIterator[str]:
    """A selector that answers by TLS, with a certificate of this authority; its URL."""
    path = directory / f"{id(authority)}.pem"
    path.write_bytes(authority.issue("server", ["127.0.0.1"]))

    async def check_in(_: web.Request) -> web.Response:
        return web.Response(body=to_json(Finished(reason="done")))

    app = web.Application()
    app.router.add_post(CHECK_IN, check_in)
    async with serving_at(Listening(certificate=str(path)), app) as url:
        yield url


@pytest.mark.parametrize("all_wrong", [True, False])
async def test_certificates_of_another_authority_end_a_client_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, all_wrong: bool
) -> None:
    """Where no selector has one that is good; one that is right is enough, and one that is down may be right."""
    monkeypatch.setattr(module, "_DISTRUST", 0.3)
    ours, another = (Authority.of(tmp_path / name) for name in ("ours", "another"))
    async with AsyncExitStack() as stack:
        urls = [await stack.enter_async_context(_secure(tmp_path, another)) for _ in range(2)]
        urls += [] if all_wrong else ["https://127.0.0.1:1"]
        selectors = await stack.enter_async_context(
            Selectors.of(msgspec.structs.replace(_kit(*urls), authority=ours.pem), 3.0)
        )
        began, tries = monotonic(), 0
        with pytest.raises(ClientError) as raised:
            while True:
                tries += 1
                with suppress(NoAnswerError):
                    await selectors.check_in(None)
        assert ("No selector can be trusted: the certificate" in str(raised.value)) is all_wrong
        assert tries > 2 and (monotonic() - began < 3.0) is all_wrong


_BODY = bytes(100_000)


def _update(size: int = len(_BODY)) -> Update:
    """One that is long enough for the selector to be waited for."""
    values = np.zeros(size, np.uint8)
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
    monkeypatch.setattr(receiving, "_UNASKED", 0.2)
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


_HUGE = 1 << 25  # bytes; more than waits between two sockets


@asynccontextmanager
async def _asking(
    then: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]], secure: ssl.SSLContext | None = None
) -> AsyncIterator[str]:
    """A selector that asks for an update's body; the rest is up to `then`."""

    async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            await then(reader, writer)
        writer.close()

    server = await asyncio.start_server(hear, "127.0.0.1", 0, ssl=secure)
    async with server:
        yield f"{'https' if secure else 'http'}://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize("takes", [True, False])
@pytest.mark.parametrize("by_tls", [True, False])
async def test_a_selector_that_dies_without_a_word_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, takes: bool, by_tls: bool
) -> None:
    """While an update is sent to it, or when it has it all: long before the round ends."""
    monkeypatch.setattr(module, "_HEARD", 0.3)
    monkeypatch.setattr(module, "_ADDED", 1e9)
    over, secure, authority = asyncio.Event(), None, Authority.of(tmp_path)
    if by_tls:
        (tmp_path / "it.pem").write_bytes(authority.issue("server", ["127.0.0.1"]))
        secure = server_context(tmp_path / "it.pem")

    async def die(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        if takes:
            await reader.readexactly(_HUGE)
        await over.wait()

    async with asyncio.timeout(20), _asking(die, secure) as url:
        kit = msgspec.structs.replace(_kit(url), authority=authority.pem if by_tls else "")
        async with Selectors.of(kit, 60) as selectors:
            with pytest.raises(NoAnswerError):
                await selectors._send_rest("t", _update(_HUGE), 0, 3600)
        over.set()


async def test_a_selector_that_is_slow_is_not_taken_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of an update takes longer than nothing of it may."""
    monkeypatch.setattr(module, "_HEARD", 1.0)
    monkeypatch.setattr(module, "_ADDED", 1e9)
    began = monotonic()

    async def sip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left = _HUGE
        while left:
            left -= len(await reader.read(1 << 18))
            await asyncio.sleep(0.03 if left > _HUGE // 2 else 0)  # slow, but for what lies in the kernel's buffers
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")

    async with asyncio.timeout(60), _asking(sip) as url, Selectors.of(_kit(url), 60) as selectors:
        await selectors._send_rest("t", _update(_HUGE), 0, 3600)
    assert monotonic() - began > 1.5


async def test_a_selector_has_its_time_to_ask_from_when_it_hears_of_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that held itself back before has not waited for it."""
    monkeypatch.setattr(module, "_ASKED", 0.3)
    selector = _Selector()
    async with asyncio.timeout(20), selector.serving() as url, Selectors.of(_kit(url), 60) as selectors:
        selectors._delay = 1.0  # of which at least half is waited
        await selectors.send("t", _update(), 60)
    assert (selector.waited, selector.taken) == ([True], 1)


def _refusal(code: str) -> web.Response:
    return problem_response(FedotaError(code, "No.").problem)


async def test_what_there_is_of_a_model_outlives_that_a_selector_puts_us_off() -> None:
    """Also two times, and a selector that sends all of it; another model is fetched from its first byte."""
    body, asked = bytes(range(250)) * 4_000, list[str | None]()

    async def model(request: web.Request) -> web.StreamResponse:
        asked.append(request.headers.get("Range"))
        if len(asked) in (2, 3):
            return _refusal("unavailable")
        if len(asked) > 3:
            start = int((asked[-1] or "=0-")[:-1].partition("=")[2])
            return web.Response(status=206 if start else 200, body=body[start:])
        response = web.StreamResponse(headers={"Content-Length": str(len(body))})
        await response.prepare(request)
        await response.write(body[:400_000])
        assert request.transport is not None
        request.transport.close()  # when that is out
        return response

    app = web.Application()
    app.router.add_get(MODELS, model)
    async with asyncio.timeout(20), serving_at(Listening(), app) as url, Selectors.of(_kit(url), 60) as selectors:
        for _ in range(2):
            with pytest.raises(FedotaError, match="unavailable"):
                await selectors.fetch(ModelRef(sha256="a", size=len(body)))
        assert await selectors.fetch(ModelRef(sha256="a", size=len(body))) == body
        assert await selectors.fetch(ModelRef(sha256="b", size=len(body))) == body
    assert asked == [None, "bytes=400000-", "bytes=400000-", "bytes=400000-", None]


async def test_a_model_for_which_there_is_no_memory_is_told_in_a_sentence() -> None:
    """By itself Python would write a traceback."""
    async with Selectors.of(_kit("http://127.0.0.1:1"), 60) as selectors:
        with pytest.raises(ClientError, match=r"The model has 1000000\.0 GB, for which this computer has no memory"):
            await selectors.fetch(ModelRef(sha256="a", size=10**15))


def _says(text: bytes) -> Callable[[], web.Response]:
    return lambda: web.Response(body=text, content_type="application/json")


_ODD = (
    b'{"status":"selected","ticket":"t","round":1,"attempt":1,"seconds":1,"model":{"sha256":"a","size":%s},"config":{}}'
)


@pytest.mark.parametrize(
    "answer",
    [
        *(partial(_refusal, code) for code in ("unavailable", "internal_error", "too_large", "conflict", "forbidden")),
        *map(_says, [b"?", b'{"status":"finished","reason":"\xff"}', b'{"a":' + b"[" * 100_000, _ODD % b"-1"]),
        *map(_says, [_ODD % b"0", _ODD % b"1000000000000001", _ODD % (b"9" * 5000)]),
    ],
)
async def test_a_selector_that_makes_no_sense_of_a_check_in_is_as_one_that_does_not_answer(
    answer: Callable[[], web.Response],
) -> None:
    """Another one is asked; where there is none, it ends with the client's patience."""

    async def check_in(_: web.Request) -> web.Response:
        return answer()

    app = web.Application()
    app.router.add_post(CHECK_IN, check_in)
    async with asyncio.timeout(20), AsyncExitStack() as stack:
        url = await stack.enter_async_context(serving_at(Listening(), app))
        selectors = await stack.enter_async_context(Selectors.of(_kit(url), 0.5))
        with pytest.raises(ClientError, match="No selector answered for"):
            while True:
                with suppress(NoAnswerError):
                    await selectors.check_in(None)
        good = await stack.enter_async_context(_selector())
        two = await stack.enter_async_context(Selectors.of(_kit(url, good), 60))
        two._urls = [url, good]
        with pytest.raises(NoAnswerError):
            await two.check_in(None)
        assert isinstance(await two.check_in(None), Finished)


@pytest.mark.parametrize("said", ["9" * 5000, str(len(_BODY) + 1), "-1", "+1", "\u0661", "", "1e3"])
async def test_a_place_that_is_in_no_update_is_none_to_go_on_from(said: str) -> None:
    """It is sent from its first byte on."""

    async def head(_: web.Request) -> web.Response:
        return web.Response(status=204, headers={OFFSET: said})

    app = web.Application()
    app.router.add_head(UPDATES, head)
    async with asyncio.timeout(20), serving_at(Listening(), app) as url, Selectors.of(_kit(url), 60) as selectors:
        assert await selectors._offset("t", len(_BODY)) == 0


async def test_an_update_that_never_gets_on_ends_with_its_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though there is always a byte more of it than before."""
    monkeypatch.setattr(module, "_LATE", 0.5)
    tries = 0

    async def broken(request: web.Request) -> web.Response:
        nonlocal tries
        tries += 1
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async def head(_: web.Request) -> web.Response:
        return web.Response(status=204, headers={OFFSET: str(tries)})

    app = web.Application()
    app.router.add_post(UPDATES, broken)
    app.router.add_patch(UPDATES, broken)
    app.router.add_head(UPDATES, head)
    async with asyncio.timeout(20), serving_at(Listening(), app) as url, Selectors.of(_kit(url), 60) as selectors:
        with pytest.raises(NoAnswerError):
            await selectors.send("t", _update(), 0)
    assert tries > 1


@pytest.mark.parametrize(("said", "waited"), [(-1, 0), (0, 0), (12.5, 12.5), (1e300, 3600), (float("inf"), 3600)])
def test_nobody_is_sent_away_for_ever(said: float, waited: float) -> None:
    """Nor for less than no time."""
    assert bounded(said) == waited


async def test_a_connection_that_is_gone_before_the_body_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not by asyncio, in a traceback on the terminal of whoever runs the client."""

    async def gone(self: aiohttp.ClientRequest, writer: Any, conn: Any, content_length: int | None = None) -> None:
        conn.close()
        raise aiohttp.ClientConnectionResetError("Cannot write to closing transport")

    monkeypatch.setattr(aiohttp.ClientRequest, "write_bytes", gone)
    complaints: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    selector = _Selector()
    async with asyncio.timeout(20), selector.serving() as url, Selectors.of(_kit(url), 60) as selectors:
        with pytest.raises(NoAnswerError):
            await selectors._send_rest("t", _update(), 0, 60)
    gc.collect()
    assert complaints == []
