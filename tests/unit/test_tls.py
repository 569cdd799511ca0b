"""Who is connected to by TLS, and how."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from cryptography import x509
from structlog.testing import capture_logs

from fedota.contracts.runtime import Listening
from fedota.process import serving_at
from fedota.tls import client_context, is_loopback, origin, renewed, server_context
from services.orchestrator.launchers.authority import Authority


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_this_machine_alone(host: str) -> None:
    """Loopback."""
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "", "localhost.evil.test", "127.0.0.1.evil.test"])
def test_others_too(host: str) -> None:
    """Not loopback, whatever it looks like."""
    assert not is_loopback(host)


def test_an_origin() -> None:
    """An IPv6 address cannot be told from its port without brackets."""
    assert origin("https", "a.test", 1) == "https://a.test:1"
    assert origin("http", "::1", 80) == "http://[::1]:80"


@pytest.mark.parametrize("text", ["", "made up", "-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----\n", "é"])
def test_what_is_no_certificate_is_told(text: str) -> None:
    """Else a client would go on, and trust nobody."""
    with pytest.raises(ValueError):
        client_context(text)


@asynccontextmanager
async def server(authority: Authority, directory: Path) -> AsyncIterator[str]:
    """One that says "here", by TLS."""

    async def here(_: web.Request) -> web.Response:
        return web.Response(text="here")

    app = web.Application()
    app.router.add_get("/", here)
    path = directory / "tls.pem"
    path.write_bytes(authority.issue("server", ["127.0.0.1"]))
    async with serving_at(Listening(certificate=str(path)), app) as url:
        yield url


async def ask(url: str, context: ssl.SSLContext) -> str:
    """What is said."""
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as http,
        http.get(url) as reply,
    ):
        return await reply.text()


async def test_a_server_speaks_tls_1_3_and_nothing_else(tmp_path: Path) -> None:
    """Neither an older version, nor plain HTTP; a stranger's authority does not make it trusted."""
    (tmp_path / "stranger").mkdir()
    authority, stranger = Authority.of(tmp_path), Authority.of(tmp_path / "stranger")
    async with server(authority, tmp_path) as url:
        assert url.startswith("https://127.0.0.1:")
        assert await ask(url, client_context(authority.pem)) == "here"
        old = ssl.create_default_context(cadata=authority.pem)
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        for context in (old, client_context(stranger.pem)):
            with pytest.raises(aiohttp.ClientConnectorError):
                await ask(url, context)
        with pytest.raises(aiohttp.ClientError):
            await ask(url.replace("https", "http"), client_context(authority.pem))


async def test_a_server_says_what_others_call_it(tmp_path: Path) -> None:
    """Where that is not where it listens."""
    path = tmp_path / "tls.pem"
    path.write_bytes(Authority.of(tmp_path).issue("server", ["selectors.test"]))
    for listening, start in (
        (Listening(address="selectors.test", certificate=str(path)), "https://selectors.test:"),
        (Listening(address="selectors.test"), "http://selectors.test:"),
        (Listening(), "http://127.0.0.1:"),
    ):
        async with serving_at(listening, web.Application()) as url:
            assert url.startswith(start)


async def shown(url: str, authority: Authority) -> int:
    """The serial number of the certificate that a new connection is shown."""
    port = int(url.rpartition(":")[2])
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client_context(authority.pem))
    try:
        certificate = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        return x509.load_der_x509_certificate(certificate).serial_number
    finally:
        writer.close()
        await writer.wait_closed()


async def test_a_certificate_is_renewed_while_it_is_in_use(tmp_path: Path) -> None:
    """One that is damaged meanwhile, or away, is left alone: the one before it is still good."""
    authority, path = Authority.of(tmp_path), tmp_path / "tls.pem"
    path.write_bytes(authority.issue("server", ["127.0.0.1"]))
    context = server_context(path)
    listening = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=context)
    url = f"x:{listening.sockets[0].getsockname()[1]}"
    async with listening, renewed(context, path, every=0.005), asyncio.timeout(10):
        first = await shown(url, authority)
        path.write_bytes(b"damaged")
        await noticed()
        assert await shown(url, authority) == first
        path.unlink()
        await noticed()
        assert await shown(url, authority) == first
        path.write_bytes(authority.issue("server", ["127.0.0.1"]))
        while await shown(url, authority) == first:
            pass


async def noticed() -> None:
    """Return once the file was looked at twice, and was not good."""
    with capture_logs() as logs:
        while len(logs) < 2:  # noqa: ASYNC110 - who looks tells nobody
            await asyncio.sleep(0.001)
