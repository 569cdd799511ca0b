"""Large bodies, over a real connection."""

import asyncio
import errno
import os
import ssl
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import aiohttp
import pytest
from aiohttp import web

from fedota.contracts.runtime import Listening
from fedota.errors import FedotaError
from fedota.process import serving, serving_at
from fedota.runtime import bodies, receiving, sending
from fedota.runtime.places import Memory, Spooled
from fedota.runtime.portions import Portions
from fedota.runtime.receiving import _Staged, read_body, read_reply, unhurried
from fedota.runtime.sending import Parts, mapped, send_file
from fedota.runtime.web import problems
from fedota.tls import client_context
from services.orchestrator.launchers.authority import Authority

SIZES = [0, 1, 1000, 2**18 - 1, 2**18, 3_000_001]


def content(size: int) -> bytes:
    """Bytes that show whether any is missing or in another place."""
    return (b"".join(number.to_bytes(4, "big") for number in range(size // 4 + 1)))[:size]


async def served(handler: Any) -> AsyncIterator[str]:
    """The URL of a server with this one handler."""
    app = web.Application(middlewares=[problems])
    app.router.add_route("*", "/", handler)
    async with serving(app, "127.0.0.1", 0) as url:
        yield url


@pytest.fixture
async def echo() -> AsyncIterator[str]:
    """Reads up to 4 MB and sends back what it read."""

    async def handler(request: web.Request) -> web.Response:
        place = Memory(memoryview(bytearray(4_000_000)))
        await read_body(request, place)
        return web.Response(body=bytes(place.read(0, place.received)))

    async for url in served(handler):
        yield url


def sized(body: bytes) -> dict[str, Any]:
    """A body that says how long it is."""
    return {"data": Parts([memoryview(body)])}


def chunked(body: bytes) -> dict[str, Any]:
    """A body that does not."""

    async def unsized() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 100_000):
            yield body[start : start + 100_000]

    return {"data": unsized()}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", [sized, chunked])
async def test_what_is_sent_arrives(echo: str, size: int, shape: Callable[[bytes], dict[str, Any]]) -> None:
    """Past aiohttp or through it; and the same client may ask again."""
    async with aiohttp.ClientSession() as http:
        for _ in range(3):
            async with http.post(echo, **shape(content(size))) as reply:
                assert await reply.read() == content(size)


@pytest.mark.parametrize("shape", [sized, chunked])
async def test_what_is_too_large_is_refused(echo: str, shape: Callable[[bytes], dict[str, Any]]) -> None:
    """Without being read, or as soon as it is more."""
    async with aiohttp.ClientSession() as http, http.post(echo, **shape(content(4_000_001))) as reply:
        assert reply.status == 413
        assert (await reply.json(content_type=None))["code"] == "update_too_large"


@pytest.mark.parametrize("size", SIZES[1:])
async def test_a_file_is_received_whole(tmp_path: Path, size: int) -> None:
    """Straight into the memory that was made for it."""
    path = tmp_path / "file"
    path.write_bytes(content(size))
    assert mapped(path) == content(size)

    async def handler(request: web.Request) -> web.StreamResponse:
        return await send_file(request, path)

    async for url in served(handler):
        async with aiohttp.ClientSession() as http:
            for _ in range(2):
                target = memoryview(bytearray(size))
                async with http.get(url) as reply:
                    await read_reply(reply, Memory(target))
                assert target == content(size)


@pytest.mark.parametrize("beginning", [0, 100, 300_000])
async def test_a_body_that_stalls_is_cut_off(echo: str, monkeypatch: pytest.MonkeyPatch, beginning: int) -> None:
    """And its connection closed: nothing may be written where it was read to any more."""
    monkeypatch.setattr(bodies, "STALL", 0.1)
    never = asyncio.Event()

    async def stalling() -> AsyncIterator[bytes]:
        yield content(beginning) or b"0"
        await never.wait()

    async with aiohttp.ClientSession() as http:
        request = http.post(echo, data=stalling(), headers={"Content-Length": "400000"})
        async with request as reply:
            answer = await reply.json(content_type=None)
    assert answer["code"] == "timeout"
    assert f": {beginning or 1} bytes of it are here after" in answer["detail"], "what came with the headers, too"


async def test_a_reply_that_breaks_off_is_no_reply() -> None:
    """It raises, and the target is no one's to write to."""

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000000"})
        await response.prepare(request)
        await response.write(content(500_000))
        assert request.transport is not None
        request.transport.close()
        return response

    async for url in served(handler):
        async with aiohttp.ClientSession() as http, http.get(url) as reply:
            with pytest.raises((ConnectionResetError, aiohttp.ClientError)):
                await read_reply(reply, Memory(memoryview(bytearray(1_000_000))))


async def test_a_reader_that_is_cancelled_leaves_the_target_alone(echo: str) -> None:
    """What comes later is not written to memory that another body is in by then."""
    released = asyncio.Event()
    target = memoryview(bytearray(1_000_000))

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000000"})
        await response.prepare(request)
        await response.write(b"\x01" * 500_000)
        await released.wait()
        await response.write(b"\x02" * 500_000)
        return response

    async for url in served(handler):
        async with aiohttp.ClientSession() as http, http.get(url) as reply:
            reading = asyncio.create_task(read_reply(reply, Memory(target)))
            async with asyncio.timeout(5):
                while target[499_999] != 1:  # noqa: ASYNC110 - the kernel tells nobody
                    await asyncio.sleep(0.001)
            reading.cancel()
            await asyncio.wait({reading})
            released.set()
            with pytest.raises((aiohttp.ClientError, ConnectionError, FedotaError)):
                await reply.read()
        assert bytes(target[500_000:]) == bytes(500_000)


@pytest.mark.parametrize("start", [0, 1, 5, 399_999, 400_000, 2_000_007, 3_000_001])
async def test_a_body_is_sent_from_anywhere(echo: str, start: int) -> None:
    """What the other side has already is left out, also in the middle of a part."""
    body = memoryview(content(3_000_001))
    parts = [body[:5], body[5:5], body[5:400_000], body[400_000:]]
    async with aiohttp.ClientSession() as http, http.post(echo, data=Parts(parts, start)) as reply:
        assert await reply.read() == body[start:]


RANGES = [
    ("bytes=0-", slice(0, None)),
    ("bytes=1000000-", slice(1_000_000, None)),
    ("bytes=2999999-", slice(2_999_999, None)),
    ("bytes=10-19", slice(10, 20)),
    ("bytes=10-99999999", slice(10, None)),
    ("bytes=-7", slice(-7, None)),
]


@pytest.fixture
async def file_of(tmp_path: Path) -> AsyncIterator[str]:
    """The URL of a file of three megabytes."""
    path = tmp_path / "file"
    path.write_bytes(content(3_000_000))

    async def handler(request: web.Request) -> web.StreamResponse:
        return await send_file(request, path, "its digest")

    async for url in served(handler):
        yield url


@pytest.mark.parametrize(("asked", "wanted"), RANGES)
async def test_a_part_of_a_file(file_of: str, asked: str, wanted: slice) -> None:
    """As RFC 9110 says; the connection can be used again."""
    start, stop, _ = wanted.indices(3_000_000)
    async with aiohttp.ClientSession() as http:
        for _ in range(2):
            async with http.get(file_of, headers={"Range": asked}) as reply:
                assert reply.status == 206
                assert reply.headers["Content-Range"] == f"bytes {start}-{stop - 1}/3000000"
                assert reply.headers["ETag"] == '"its digest"'
                assert await reply.read() == content(3_000_000)[wanted]


async def test_a_file_without_a_range_or_with_one_that_it_does_not_have(file_of: str) -> None:
    """The whole of it, or 416; what is not understood is ignored."""
    async with aiohttp.ClientSession() as http:
        for asked in ("", "lines=1-2", "bytes=5-2"):
            async with http.get(file_of, headers={"Range": asked} if asked else {}) as reply:
                assert (reply.status, reply.headers["Accept-Ranges"]) == (200, "bytes")
                assert await reply.read() == content(3_000_000)
        for tag, status in (('"its digest"', 206), ('"another"', 200), ('W/"its digest"', 200)):
            async with http.get(file_of, headers={"Range": "bytes=5-", "If-Range": tag}) as reply:
                assert (reply.status, len(await reply.read())) == (status, 3_000_000 - (5 if status == 206 else 0))
        async with http.get(file_of, headers={"Range": "bytes=3000000-"}) as reply:
            assert (reply.status, reply.headers["Content-Range"]) == (416, "bytes */3000000")
        async with http.head(file_of) as reply:
            assert (reply.status, reply.headers["Content-Length"]) == (200, "3000000")


async def test_a_reply_is_gone_on_with_where_it_broke_off(file_of: str) -> None:
    """What has come once is not sent again."""
    place = Memory(memoryview(bytearray(3_000_000)))
    place.view[:1_234_567] = content(1_234_567)
    place.took(1_234_567)
    headers = {"Range": f"bytes={place.received}-"}
    async with aiohttp.ClientSession() as http, http.get(file_of, headers=headers) as reply:
        assert reply.content_length == 3_000_000 - 1_234_567
        await read_reply(reply, place)
    assert place.view == content(3_000_000)


async def test_a_reader_that_goes_away_ends_the_sending(tmp_path: Path) -> None:
    """Nobody goes on writing to a connection that is closed."""
    path, ended = tmp_path / "file", asyncio.Event()
    path.write_bytes(bytes(50_000_000))

    async def handler(request: web.Request) -> web.StreamResponse:
        try:
            return await send_file(request, path)
        except ConnectionError:
            ended.set()
            raise

    async for url in served(handler):
        async with aiohttp.ClientSession() as http, http.get(url) as reply:
            await reply.content.readexactly(1000)
        await asyncio.wait_for(ended.wait(), 10)


@pytest.mark.parametrize("size", [1000, 3_000_001])
@pytest.mark.parametrize("shape", [sized, chunked])
async def test_a_body_into_a_file(tmp_path: Path, size: int, shape: Callable[[bytes], dict[str, Any]]) -> None:
    """It takes no memory of its own."""

    async def handler(request: web.Request) -> web.Response:
        place = Spooled.unlinked(tmp_path, 4_000_000)
        await read_body(request, place)
        body = bytes(place.read(0, place.received))
        place.close()
        return web.Response(body=body)

    async for url in served(handler):
        async with aiohttp.ClientSession() as http, http.post(url, **shape(content(size))) as reply:
            assert await reply.read() == content(size)


@pytest.mark.parametrize("size", [1000, 3_000_001])
async def test_behind_tls_all_goes_through_the_transport(tmp_path: Path, size: int) -> None:
    """Both ways; nothing is written past what encrypts."""
    authority, certificate, path = Authority.of(tmp_path), tmp_path / "server.pem", tmp_path / "file"
    certificate.write_bytes(authority.issue("server", ["127.0.0.1"]))
    path.write_bytes(content(size))

    async def give(request: web.Request) -> web.StreamResponse:
        return await send_file(request, path)

    async def take(request: web.Request) -> web.Response:
        place = Memory(memoryview(bytearray(4_000_000)))
        await read_body(request, place)
        return web.Response(body=bytes(place.read(0, place.received)))

    app = web.Application(middlewares=[problems])
    app.router.add_get("/", give)
    app.router.add_post("/", take)
    connector = aiohttp.TCPConnector(ssl=client_context(authority.pem))
    async with (
        serving_at(Listening(certificate=str(certificate)), app) as url,
        aiohttp.ClientSession(connector=connector) as http,
    ):
        for _ in range(2):
            target = Memory(memoryview(bytearray(size)))
            async with http.get(url) as reply:
                await read_reply(reply, target)
            assert target.view == content(size)
            async with http.post(url, **sized(content(size))) as reply:
                assert await reply.read() == content(size)


class _Disk:
    """`os.pwrite` that waits until it is let go, which only a free event loop can do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loop = asyncio.get_running_loop()
        self.asked, self.go_on = asyncio.Event(), threading.Event()
        self._write = os.pwrite
        monkeypatch.setattr(os, "pwrite", self)

    def __call__(self, descriptor: int, data: memoryview, offset: int) -> int:
        self.loop.call_soon_threadsafe(self.asked.set)
        if not self.go_on.wait(5):
            raise TimeoutError("the event loop waits for the disk")
        return self._write(descriptor, data, offset)


@pytest.mark.parametrize("shape", [sized, chunked])
async def test_a_slow_disk_does_not_hold_up_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: Callable[[bytes], dict[str, Any]]
) -> None:
    """Heartbeats go on meanwhile, and no byte is lost."""

    async def handler(request: web.Request) -> web.Response:
        place = Spooled.unlinked(tmp_path, 4_000_000)
        await read_body(request, place)
        body = bytes(place.read(0, place.received))
        place.close()
        return web.Response(body=body)

    disk = _Disk(monkeypatch)
    async for url in served(handler):
        async with aiohttp.ClientSession() as http:
            sending = asyncio.create_task(_sent(http, url, shape(content(3_000_001))))
            await asyncio.wait_for(disk.asked.wait(), 4)
            disk.go_on.set()
            assert await sending == content(3_000_001)


async def _sent(http: aiohttp.ClientSession, url: str, arguments: dict[str, Any]) -> bytes:
    async with http.post(url, **arguments) as reply:
        return await reply.read()


@pytest.mark.parametrize("breaks", ["the connection", "the disk"])
async def test_what_came_before_a_body_broke_off_is_in_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, breaks: str
) -> None:
    """Without a gap; and nothing is written there any more once that is told."""
    told: asyncio.Future[tuple[Spooled, BaseException]] = asyncio.get_running_loop().create_future()

    async def handler(request: web.Request) -> web.Response:
        place = Spooled.unlinked(tmp_path, 4_000_000)
        try:
            await read_body(request, place)
        except BaseException as error:
            told.set_result((place, error))
            raise
        return web.Response()

    disk = _Disk(monkeypatch)
    async for url in served(handler):
        port = int(url.rsplit(":", 1)[1])
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3000001\r\n\r\n")
        await writer.drain()
        sent = content(1_000_000)
        writer.write(sent)
        await asyncio.wait_for(disk.asked.wait(), 4)
        if breaks == "the disk":
            monkeypatch.setattr(os, "pwrite", _full)
        else:
            await writer.drain()
            writer.close()
        disk.go_on.set()
        place, error = await asyncio.wait_for(told, 10)
        if breaks == "the disk":
            assert isinstance(error, FedotaError) and error.problem.code == "unavailable"
        else:
            assert isinstance(error, ConnectionError) and place.received == len(sent)
        assert place.received > 0 and place.read(0, place.received) == sent[: place.received]
        place.close()
        writer.close()


@pytest.mark.parametrize("line", ["stays", "is gone"])
async def test_a_body_that_has_come_is_whole_however_long_the_disk_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    """Were it told as broken off, its sender would hear that all of it is here, and take it for counted."""
    told: asyncio.Future[tuple[Spooled, BaseException | None]] = asyncio.get_running_loop().create_future()

    async def handler(request: web.Request) -> web.Response:
        place, failed = Spooled.unlinked(tmp_path, size), None
        try:
            await read_body(request, place)
        except Exception as error:
            failed = error
        told.set_result((place, failed))
        return web.Response()

    async def settled(self: _Staged) -> None:
        disk.go_on.set()
        await own(self)

    size, own = bodies.SMALL, _Staged.settled
    monkeypatch.setattr(_Staged, "settled", settled)
    monkeypatch.setattr(bodies, "STALL", 1.0)
    disk = _Disk(monkeypatch)
    async for url in served(handler):
        _, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        writer.write(f"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n".encode())
        await writer.drain()
        writer.write(content(size))
        await writer.drain()
        if line == "is gone":
            await asyncio.wait_for(disk.asked.wait(), 4)
            writer.close()
        place, failed = await asyncio.wait_for(told, 10)
        assert (failed, place.received) == (None, size)
        assert place.read(0, size) == content(size)
        place.close()
        writer.close()


async def test_who_is_cancelled_leaves_nothing_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One write begins the next: whoever goes on with the file would write there at the same time."""
    gates, begun, written = [threading.Event(), threading.Event()], list[int](), list[int]()
    loop, second = asyncio.get_running_loop(), asyncio.Event()

    def slowly(_: Spooled, source: memoryview) -> None:
        begun.append(len(source))
        if len(begun) == 2:
            loop.call_soon_threadsafe(second.set)
        gates[len(begun) - 1].wait(10)
        written.append(len(source))

    monkeypatch.setattr(Spooled, "copy", slowly)
    place = Spooled.unlinked(tmp_path, 1000)
    staged = _Staged(None, create_autospec(asyncio.Transport), place, 100)
    staged.buffer_updated(10)
    staged.buffer_updated(20)  # while the first is being written
    settling = asyncio.create_task(staged.settled())
    await asyncio.sleep(0)
    settling.cancel()
    gates[0].set()
    await asyncio.wait_for(second.wait(), 5)
    assert not settling.done()
    gates[1].set()
    with pytest.raises(asyncio.CancelledError):
        await settling
    assert written == [10, 20]
    place.close()


def _full(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@asynccontextmanager
async def _given_by_tls(tmp_path: Path, size: int) -> AsyncIterator[tuple[int, ssl.SSLContext, asyncio.Event]]:
    """The port of a server that gives a file, what trusts it, and what is set once the sending has broken off."""
    authority, certificate, path = Authority.of(tmp_path), tmp_path / "server.pem", tmp_path / "file"
    certificate.write_bytes(authority.issue("server", ["127.0.0.1"]))
    path.write_bytes(content(size))
    given_up = asyncio.Event()

    async def give(request: web.Request) -> web.StreamResponse:
        try:
            return await send_file(request, path)
        except ConnectionError:
            given_up.set()
            raise

    app = web.Application(middlewares=[problems])
    app.router.add_get("/", give)
    async with serving_at(Listening(certificate=str(certificate)), app) as url:
        yield int(url.rsplit(":", 1)[1]), client_context(authority.pem), given_up


async def test_a_deaf_reader_is_given_up_also_behind_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is kept for it in memory meanwhile is little."""
    monkeypatch.setattr(sending, "_DEAF", 0.3)
    async with _given_by_tls(tmp_path, 30_000_000) as (port, context, given_up):
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, limit=1000)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await asyncio.wait_for(given_up.wait(), 10)
        writer.transport.abort()


async def test_only_so_many_files_go_through_tls_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes memory: who comes when it is taken is asked to come again, and then gets the file."""
    monkeypatch.setattr(sending, "_THROUGH_TLS", Portions(1))
    async with _given_by_tls(tmp_path, 30_000_000) as (port, context, given_up):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, limit=1000)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as http:
            async with http.get(f"https://127.0.0.1:{port}/") as reply:
                assert (reply.status, (await reply.json(content_type=None))["code"]) == (503, "unavailable")
            writer.transport.abort()
            await asyncio.wait_for(given_up.wait(), 10)
            async with http.get(f"https://127.0.0.1:{port}/") as reply:
                assert await reply.read() == content(30_000_000)


class _Full:
    """A transport some of whose bytes nobody takes; it counts how often it is asked."""

    asked = 0

    def get_write_buffer_size(self) -> int:
        """A few."""
        self.asked += 1
        return 1000

    def is_closing(self) -> bool:
        """It is not."""
        return False


async def test_who_takes_nothing_of_the_headers_costs_no_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is it waited for without an end."""
    monkeypatch.setattr(sending, "_DEAF", 0.3)
    transport = _Full()
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(sending._emptied(transport), 5)
    assert transport.asked < 60, "some a moment, not as often as the loop turns"


@pytest.mark.parametrize("range_", ["", "bytes=1000000-"])
async def test_a_file_that_is_unlinked_while_it_is_asked_for_is_sent(tmp_path: Path, range_: str) -> None:
    """A sweep may come between its being opened and its being sent; a file that is gone before is not found."""
    path = tmp_path / "file"
    path.write_bytes(content(3_000_001))

    async def handler(request: web.Request) -> web.StreamResponse:
        return await send_file(request, path, gone="It was swept away.")

    async def sweep(*_: object) -> None:
        path.unlink(missing_ok=True)

    app = web.Application(middlewares=[problems])
    app.router.add_get("/", handler)
    app.on_response_prepare.append(sweep)
    async with asyncio.timeout(10), serving(app, "127.0.0.1", 0) as url, aiohttp.ClientSession() as http:
        async with http.get(url, headers={"Range": range_} if range_ else {}) as reply:
            assert await reply.read() == content(3_000_001)[1_000_000 if range_ else 0 :]
        async with http.get(url) as reply:
            problem = await reply.json(content_type=None)
    assert (problem["code"], problem["detail"]) == ("not_found", "It was swept away.")


@pytest.mark.parametrize(("comes", "status"), [(b"", 417), (b"01234", 200)])
async def test_a_body_that_http_1_0_cannot_ask_for_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, comes: bytes, status: int
) -> None:
    """Unless it comes anyhow: the handler, which takes a turn for it, is not even called."""
    monkeypatch.setattr(receiving, "_UNASKED", 0.3)
    bodies_read = list[bytes]()

    async def handler(request: web.Request) -> web.Response:
        place = Memory(memoryview(bytearray(100)))
        await read_body(request, place)
        bodies_read.append(bytes(place.read(0, place.received)))
        return web.Response()

    app = web.Application(middlewares=[problems])
    app.router.add_post("/", handler, expect_handler=unhurried)
    async with serving(app, "127.0.0.1", 0) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        writer.write(b"POST / HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n")
        await writer.drain()
        writer.write(comes)
        answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        writer.close()
    assert comes or b"keep-alive" not in answer  # else what comes next would be taken for the body
    assert int(answer.split()[1]) == status and bodies_read == [comes] * bool(comes)
