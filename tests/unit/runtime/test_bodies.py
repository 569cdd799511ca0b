"""Large bodies, over a real connection."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from fedota.contracts.runtime import Listening
from fedota.errors import FedotaError
from fedota.process import serving, serving_at
from fedota.runtime import bodies
from fedota.runtime.bodies import Parts, mapped, read_body, read_reply, send_file
from fedota.runtime.places import Memory, Spooled
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
            assert (await reply.json(content_type=None))["code"] == "timeout"


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
