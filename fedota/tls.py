"""TLS between clients and selectors: version 1.3, one authority that is trusted, plain HTTP on loopback only."""

import asyncio
import ipaddress
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import structlog

_LOOK: Final = 60.0  # seconds between two looks at a certificate's file
_log = structlog.get_logger(__name__)


def is_loopback(host: str) -> bool:
    """Whether only this machine is reached at `host`, a name or an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def origin(scheme: str, host: str, port: int) -> str:
    """The URL of a server without a path; an IPv6 address stands in brackets in it."""
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def client_context(authority: str) -> ssl.SSLContext:
    """What a client connects with: it trusts the authority whose certificate (PEM) this is, and nobody else.

    Raises `ValueError` when it is not one.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_verify_locations(cadata=authority)
    except (ssl.SSLError, TypeError) as error:
        raise ValueError(f"This is no certificate: {error}") from None
    return context


def server_context(path: Path) -> ssl.SSLContext:
    """What a server listens with; the file (PEM) holds its key and its certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0  # nobody resumes a session: making tickets costs a third of a handshake
    context.load_cert_chain(path)
    return context


@asynccontextmanager
async def renewed(context: ssl.SSLContext, path: Path, every: float = _LOOK) -> AsyncIterator[None]:
    """Within this, a certificate that is renewed in its file is shown to whoever connects from then on."""
    task = asyncio.create_task(_reload(context, path, path.stat().st_mtime_ns, every), name="certificate")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def _reload(context: ssl.SSLContext, path: Path, seen: int, every: float) -> None:
    while True:
        await asyncio.sleep(every)
        try:
            if (found := path.stat().st_mtime_ns) != seen:
                context.load_cert_chain(path)
                seen = found
                _log.info("the certificate was renewed")
        except (OSError, ssl.SSLError) as error:  # the one before it is still good
            _log.warning("the certificate could not be read again", path=str(path), error=str(error))
