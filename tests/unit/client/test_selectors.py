"""Whom a client tells what."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from fedota.client.selectors import NoAnswerError, Selectors
from fedota.contracts.kit import Kit
from fedota.contracts.runtime import Listening
from fedota.events import to_json
from fedota.process import serving_at
from fedota.runtime.protocol import CHECK_IN, Finished


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
