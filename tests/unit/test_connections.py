"""Connections on which nothing is asked, on real sockets."""

import asyncio
import gzip
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from aiohttp import web

from fedota import process
from fedota.contracts.runtime import Listening
from fedota.process import serving_at
from fedota.tls import client_context
from services.orchestrator.launchers.authority import Authority

POLL = b"GET /poll HTTP/1.1\r\nHost: x\r\n\r\n"
SHORT = b"GET /short HTTP/1.1\r\nHost: x\r\n\r\n"
HALF = b"GET /short HTTP/1.1\r\nHost: x\r\nX-Long: "


class Server(NamedTuple):
    """One that answers `/short` at once and `/poll` when it is told to."""

    port: int
    tell: asyncio.Event
    context: ssl.SSLContext | None

    async def connect(self, first: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection on which this much is said."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=self.context)
        writer.write(first)
        return reader, writer


@pytest.fixture(params=["HTTP", "TLS"])
async def server(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Server]:
    """It has little patience."""
    monkeypatch.setattr(process, "_IDLE", 0.4)
    tell, listening, context = asyncio.Event(), Listening(), None
    if request.param == "TLS":
        authority, path = Authority.of(tmp_path), tmp_path / "tls.pem"
        path.write_bytes(authority.issue("server", ["127.0.0.1"]))
        listening, context = Listening(certificate=str(path)), client_context(authority.pem)

    async def poll(_: web.Request) -> web.Response:
        await tell.wait()
        return web.Response(text="something to do")

    async def short(_: web.Request) -> web.Response:
        return web.Response(text="here")

    app = web.Application()
    app.router.add_get("/poll", poll)
    app.router.add_get("/short", short)
    async with serving_at(listening, app) as url:
        yield Server(int(url.rpartition(":")[2]), tell, context)


async def closed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, dribble: bytes = b"") -> None:
    """Return when the server closes the connection, on which a little is said all the time."""
    try:
        while True:
            try:
                assert await asyncio.wait_for(reader.read(), 0.05) == b""
                return
            except TimeoutError:
                writer.write(dribble)
    except ConnectionError:
        return
    finally:
        writer.transport.abort()


@asynccontextmanager
async def polling(server: Server) -> AsyncIterator[None]:
    """A long poll that is answered at the end."""
    reader, writer = await server.connect(POLL)
    yield
    server.tell.set()
    assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
    writer.close()


@pytest.mark.parametrize(("said", "more"), [(b"", b""), (HALF, b""), (HALF, b"a"), (b"\r\n", b"\r\n")])
async def test_who_asks_nothing_is_shown_out(server: Server, said: bytes, more: bytes) -> None:
    """Whether it is silent, says half of a request or dribbles; who waits for an answer is left in peace."""
    async with asyncio.timeout(20), polling(server):
        await closed(*await server.connect(said), more)


async def test_who_has_asked_once_is_shown_out_too(server: Server) -> None:
    """It may be a stranger all the same, who asked whether we are well."""
    async with asyncio.timeout(20), polling(server):
        reader, writer = await server.connect(SHORT)
        await reader.readuntil(b"here")
        writer.write(HALF)
        await closed(reader, writer, b"a")


def test_who_asks_nothing_is_not_held_for_an_hour() -> None:
    """As aiohttp would; but longer than a proxy keeps a connection to use it again."""
    assert 60 < process._IDLE <= 120


@pytest.mark.parametrize("packed", [gzip.compress(b"what it was"), b"no gzip at all"])
async def test_a_body_that_says_it_is_packed_stays_as_it_is(packed: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """Unpacked by itself a stranger's 300 KB are 300 MB, on the event loop; and garbage is no error of ours."""

    async def echo(request: web.Request) -> web.Response:
        return web.Response(body=await request.read())

    app = web.Application()
    app.router.add_post("/", echo)
    async with serving_at(Listening(), app) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        head = f"POST / HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\nContent-Length: {len(packed)}\r\n\r\n"
        writer.write(head.encode() + packed)
        assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)).startswith(b"HTTP/1.1 200 ")
        assert await asyncio.wait_for(reader.readexactly(len(packed)), 5) == packed
        writer.close()
    assert not caplog.records
