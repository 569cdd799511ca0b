"""What coordinator and selector answer when a request does not come to its end."""

import asyncio
import logging
import os
import socket
import struct
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pytest
import structlog.testing
from aiohttp import web

from fedota.process import serving
from fedota.runtime.sending import send_file
from fedota.runtime.web import problems

_SIZE = 256 * 1024**2
_RESET_AT_CLOSE = struct.pack("ii", 1, 0)


async def test_who_goes_away_in_the_middle_is_no_error_of_ours(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A selector that is killed while it fetches the model resets the connection; nothing of that is logged."""
    path = tmp_path / "model"
    path.touch()
    os.truncate(path, _SIZE)
    ended: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()

    async def handler(request: web.Request) -> web.StreamResponse:
        try:
            response = await send_file(request, path)
        except BaseException as error:
            ended.set_result(error)
            raise
        ended.set_result(None)
        return response

    app = web.Application(middlewares=[problems])
    app.router.add_get("/", handler)
    with caplog.at_level(logging.INFO):
        async with serving(app, "127.0.0.1", 0) as url:
            reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(url).port)
            writer.write(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
            assert await reader.readexactly(15) == b"HTTP/1.1 200 OK"
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)
            writer.transport.abort()
            assert isinstance(await asyncio.wait_for(ended, 30), ConnectionError)
    assert not caplog.records


async def test_another_connection_that_broke_is_told_in_the_log() -> None:
    """Only the client's own one is no error of ours."""

    async def handler(_: web.Request) -> web.Response:
        raise ConnectionResetError("the store")

    app = web.Application(middlewares=[problems])
    app.router.add_get("/", handler)
    with structlog.testing.capture_logs() as logs:
        async with serving(app, "127.0.0.1", 0) as url, aiohttp.ClientSession() as http, http.get(url) as reply:
            assert (reply.status, (await reply.json(content_type=None))["code"]) == (500, "internal_error")
    assert [line["event"] for line in logs] == ["request failed"]
