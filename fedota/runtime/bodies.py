"""Large bodies, moved without needless copies.

aiohttp hands a body over in pieces that were copied three times on their way, which for tensors of many megabytes is
much of a round's work. So once the headers are read, the connection's bytes go straight from the socket to where they
are wanted; the connection is closed afterwards, since aiohttp's parser did not see them.
"""

import asyncio
import mmap
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from time import monotonic
from typing import Any, Final

from aiohttp import ClientResponse, StreamReader, web

from fedota.errors import FedotaError

PIECE: Final = 1 << 20  # bytes handed to the kernel at once
STALL: Final = 20.0  # seconds without a byte after which a body is cut off
_SLOWEST: Final = 16_384  # bytes a second: whoever is slower takes a place from those who are not
_SMALL: Final = 1 << 18  # bytes below which a connection of its own costs more than the copies
_TAKEN_OVER: Final = web.RequestKey("taken_over", bool)


class _Direct(asyncio.BufferedProtocol):
    """Stands in for a connection's own protocol until `target` is full."""

    def __init__(self, own: Any, transport: asyncio.Transport, target: memoryview) -> None:
        self.received = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._own = own
        self._transport = transport
        self._target = target

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._target[self.received :]

    def buffer_updated(self, nbytes: int) -> None:
        self.received += nbytes
        if self.received == len(self._target):
            self.give_back()
            if not self.done.done():
                self.done.set_result(None)

    def give_back(self) -> None:
        """Put the connection's own protocol in its place again; it is not given more to read."""
        self._transport.pause_reading()
        self._transport.set_protocol(self._own)

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(ConnectionResetError("The connection was closed in the middle of a body."))
            self.done.exception()  # nobody may be waiting any more
        self._own.connection_lost(exc)

    def pause_writing(self) -> None:
        self._own.pause_writing()

    def resume_writing(self) -> None:
        self._own.resume_writing()


async def read_body(request: web.Request, target: memoryview) -> int:
    """Read a request's body into `target`; the number of bytes.

    Raises `update_too_large` when there are more than fit, and `timeout` when they stall or come far too slowly.
    """
    length = request.content_length
    if length is not None and length > len(target):
        raise _too_large(len(target))
    transport = request.transport
    if length is None or length < _SMALL or transport is None:
        return await _copied(request.content, target)
    await _taken_over(request, transport, target[:length])
    return length


def finish(request: web.Request, response: web.StreamResponse) -> None:
    """Close the connection with the response when its bytes were taken past aiohttp."""
    if request.get(_TAKEN_OVER):
        response.force_close()


async def read_rest(request: web.Request, target: memoryview) -> None:
    """Read what is left of a request's body, which must fill `target`; its beginning was read by other means."""
    transport = request.transport
    if transport is None:
        raise ConnectionResetError("The connection was closed in the middle of a body.")
    await _taken_over(request, transport, target)


async def _taken_over(request: web.Request, transport: asyncio.Transport, target: memoryview) -> None:
    request[_TAKEN_OVER] = True
    try:
        await _straight(request.content, request.protocol, transport, target)
    finally:
        request.content.feed_eof()  # aiohttp must not wait for what it will never see


async def read_reply(reply: ClientResponse, target: memoryview) -> None:
    """Read a reply's body, which must fill `target` exactly. Raises `timeout`, or `ConnectionResetError`."""
    connection = reply.connection
    if connection is None or connection.transport is None or reply.content_length != len(target):
        if await _copied(reply.content, target) != len(target):
            raise ConnectionResetError("The body is shorter than it was announced.")
        return
    try:
        await _straight(reply.content, connection.protocol, connection.transport, target)
    finally:
        reply.close()


async def _straight(content: StreamReader, protocol: Any, transport: asyncio.Transport, target: memoryview) -> None:
    """From the socket into `target`, after what aiohttp has read already."""
    transport.pause_reading()
    early = content.read_nowait(-1)
    target[: len(early)] = early
    if len(early) == len(target):
        return
    direct = _Direct(protocol, transport, target[len(early) :])
    transport.set_protocol(direct)
    transport.resume_reading()
    try:
        await _progressing(direct)
    except BaseException:
        if not transport.is_closing():
            direct.give_back()  # the target may be another's from now on: not one more byte may go there
        raise


async def _progressing(direct: _Direct) -> None:
    began = monotonic()
    while not direct.done.done():
        before = direct.received
        await asyncio.wait([direct.done], timeout=STALL)
        if not direct.done.done() and (direct.received == before or _too_slow(direct.received, began)):
            raise _stalled(direct.received, began)
    direct.done.result()


async def _copied(content: StreamReader, target: memoryview) -> int:
    received, began = 0, monotonic()
    while True:
        try:
            piece = await asyncio.wait_for(content.readany(), STALL)
        except TimeoutError:
            raise _stalled(received, began) from None
        if not piece:
            return received
        if received + len(piece) > len(target):
            raise _too_large(len(target))
        target[received : received + len(piece)] = piece
        received += len(piece)
        if _too_slow(received, began):
            raise _stalled(received, began)


def _too_slow(received: int, began: float) -> bool:
    return monotonic() - began > 2 * STALL + received / _SLOWEST


def _stalled(received: int, began: float) -> FedotaError:
    return FedotaError("timeout", f"The body came too slowly: {received} bytes in {monotonic() - began:.0f} seconds.")


def _too_large(most: int) -> FedotaError:
    return FedotaError("update_too_large", f"The body has more than the {most} bytes that are accepted.")


async def pieces(parts: Iterable[memoryview]) -> AsyncIterator[memoryview]:
    """A body's parts as they are written, none of them copied."""
    for part in parts:
        for start in range(0, len(part), PIECE):
            yield part[start : start + PIECE]


def mapped(path: Path) -> memoryview:
    """A file's bytes, read only when they are looked at."""
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


async def send_file(request: web.Request, path: Path) -> web.StreamResponse:
    """A file, from the page cache to the socket."""
    response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
    body = mapped(path)
    response.content_length = len(body)
    await response.prepare(request)
    if request.method != "HEAD":
        async for piece in pieces([body]):
            await response.write(piece)
    return response
