"""Large bodies, over a real connection."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from fedota.errors import FedotaError
from fedota.process import serving
from fedota.runtime import bodies
from fedota.runtime.bodies import mapped, pieces, read_body, read_reply, send_file
from fedota.runtime.web import problems

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
        target = memoryview(bytearray(4_000_000))
        return web.Response(body=bytes(target[: await read_body(request, target)]))

    async for url in served(handler):
        yield url


def sized(body: bytes) -> dict[str, Any]:
    """A body that says how long it is."""
    return {"data": pieces([memoryview(body)]), "headers": {"Content-Length": str(len(body))}}


def chunked(body: bytes) -> dict[str, Any]:
    """A body that does not."""
    return {"data": pieces([memoryview(body)])}


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
                    await read_reply(reply, target)
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
                await read_reply(reply, memoryview(bytearray(1_000_000)))


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
            reading = asyncio.create_task(read_reply(reply, target))
            async with asyncio.timeout(5):
                while target[499_999] != 1:  # noqa: ASYNC110 - the kernel tells nobody
                    await asyncio.sleep(0.001)
            reading.cancel()
            await asyncio.wait({reading})
            released.set()
            with pytest.raises((aiohttp.ClientError, ConnectionError, FedotaError)):
                await reply.read()
        assert bytes(target[500_000:]) == bytes(500_000)
