"""Large bodies that go, without needless copies, or only the part that is missing at the other end.

They go straight to the socket: what lies in a file without passing through this process at all. Behind TLS they go
through the transport instead.
"""

import asyncio
import mmap
import os
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from time import monotonic
from typing import Any, Final

from aiohttp import hdrs, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.payload import Payload

from fedota.errors import FedotaError
from fedota.runtime.bodies import SMALL, broken, too_slow
from fedota.runtime.places import PIECE, SMALL_PIECE
from fedota.runtime.portions import Portions

_DEAF: Final = 300.0  # seconds without a byte taken after which a reader is given up
_BURST: Final = 4 * PIECE  # bytes that one connection may send before others have their turn
_AT_ONCE: Final = 4  # turns of the event loop in which a transport's small buffer should be empty
_ENCRYPTED: Final = 1 << 14  # bytes that go through TLS at once: a record, and as much may wait in memory
_THROUGH_TLS: Final = Portions(512)  # files that are sent at the same time; each costs some 200 KB

# Sends more to a socket, given its descriptor: the number of bytes, 0 when all are sent. It may raise BlockingIOError.
_Step = Callable[[int], int]


class Parts(Payload):
    """A request's body of parts that lie in memory, none of them copied; `start` bytes of it are left out.

    `begins` is called before the first byte is sent: with `Expect: 100-continue`, when it was asked for. Who takes
    nothing of it for `deaf` seconds is given up.
    """

    _autoclose = True  # there is nothing to be closed

    def __init__(
        self,
        parts: Iterable[memoryview],
        start: int = 0,
        *,
        begins: Callable[[], None] = lambda: None,
        deaf: float | None = None,
    ) -> None:
        left = list(_after(parts, start))
        super().__init__(left)
        self._size = sum(len(part) for part in left)
        self._begins = begins
        self._deaf = deaf

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """Tensors are no text."""
        raise TypeError("a body of tensors is no text")

    async def write(self, writer: AbstractStreamWriter) -> None:
        """Send all of it."""
        self._begins()
        self._consumed = True  # else aiohttp would send it anew when a connection breaks: it is gone on with
        left, self._value = deque(self._value), []
        try:
            await self._sent(writer, left)
        finally:
            left.clear()  # aiohttp keeps what is raised in circles, and with it all that is held here

    async def _sent(self, writer: AbstractStreamWriter, left: deque[memoryview]) -> None:
        transport: Any = getattr(writer, "transport", None)
        if not _is_plain(transport) or (self._size or 0) < SMALL:
            await _through(writer, left, self._deaf)
        else:
            writer.send_headers()
            await _poured(transport, _from_memory(left), self._deaf)


def _after(parts: Iterable[memoryview], start: int) -> Iterable[memoryview]:
    for part in parts:
        if rest := part[start:]:
            yield rest
        start = max(0, start - len(part))


def mapped(path: Path) -> memoryview:
    """A file's bytes, read only when they are looked at."""
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


async def send_file(
    request: web.Request, path: Path, tag: str = "", *, gone: str = "This is not here any more.", to: str = ""
) -> web.StreamResponse:
    """A file, or the range of it that is asked for, from the page cache to the socket. `tag` names its content.

    Raises `not_found` with the sentence `gone` when there is no such file. Through TLS it goes by memory, of which
    there is only so much, of which everybody who is named in `to` has a part: beyond that this raises `unavailable`.
    """
    if _is_plain(request.transport):
        return await _send_opened(request, path, tag, gone)
    if not _THROUGH_TLS.admits(to):  # nobody waits in line: who is told to come back costs nothing
        raise FedotaError("unavailable", "Too many fetch the model at once. Ask again.", retry_after=5)
    _THROUGH_TLS.take(to)
    try:
        return await _send_opened(request, path, tag, gone)
    finally:
        _THROUGH_TLS.give_back(to)


async def _send_opened(request: web.Request, path: Path, tag: str, gone: str) -> web.StreamResponse:
    """Opened before anything is said of it: it may be unlinked at any moment, and what is open stays."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise FedotaError("not_found", gone) from None
    try:
        return await _send_file(request, descriptor, tag)
    finally:
        os.close(descriptor)


async def _send_file(request: web.Request, descriptor: int, tag: str) -> web.StreamResponse:
    size = os.fstat(descriptor).st_size
    response = web.StreamResponse(headers={"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"})
    if tag:
        response.headers[hdrs.ETAG] = f'"{tag}"'
    asked = _range(request, size, tag)
    if asked is not None and not asked:
        return web.Response(status=416, headers={"Content-Range": f"bytes */{size}", "Accept-Ranges": "bytes"})
    if asked is not None:
        response.set_status(206)
        response.headers["Content-Range"] = f"bytes {asked.start}-{asked.stop - 1}/{size}"
    span = asked or range(size)
    response.content_length = len(span)
    writer = await response.prepare(request)
    if request.method != "HEAD" and writer is not None:
        await _send_span(request, response, writer, descriptor, span)
    return response


def _range(request: web.Request, size: int, tag: str) -> range | None:
    """The bytes that are asked for: None when all are, empty when there are none of that kind."""
    known = f'"{tag}"'
    if hdrs.RANGE not in request.headers or request.headers.get(hdrs.IF_RANGE, known) != known:
        return None
    try:
        asked = request.http_range
    except ValueError:
        return None  # what is not understood is ignored (RFC 9110, 14.2)
    start, stop, _ = asked.indices(size)
    return range(start, stop)


async def _send_span(
    request: web.Request, response: web.StreamResponse, writer: AbstractStreamWriter, descriptor: int, span: range
) -> None:
    transport = request.transport
    if transport is None:
        raise broken()
    try:
        if _is_plain(transport) and len(span) >= SMALL:
            writer.send_headers()
            await _poured(transport, _from_file(descriptor, span))
        else:
            await _written(transport, response, descriptor, span)
    except ConnectionError:
        transport.abort()  # closed in peace it would wait for what it holds to be taken
        raise


async def _written(
    transport: asyncio.WriteTransport, response: web.StreamResponse, descriptor: int, span: range
) -> None:
    """Through the transport. Raises `ConnectionError` when the reader takes nothing, or far too slowly."""
    began = monotonic()
    transport.set_write_buffer_limits(high=_ENCRYPTED)
    for start in range(span.start, span.stop, _ENCRYPTED):
        await _taken(response.write(os.pread(descriptor, min(_ENCRYPTED, span.stop - start), start)))
        if too_slow(start - span.start, began):
            raise broken()


async def _taken(writing: Awaitable[None], deaf: float | None = None) -> None:
    """Wait until a piece is written. Raises `ConnectionResetError` when nothing of it is taken."""
    try:
        async with asyncio.timeout(deaf or _DEAF):
            await writing
    except TimeoutError:
        raise broken() from None


def _is_plain(transport: Any) -> bool:
    """Whether what is written to its socket goes out as it is."""
    return (
        transport is not None
        and transport.get_extra_info("sslcontext") is None
        and transport.get_extra_info("socket") is not None
    )


async def _through(writer: AbstractStreamWriter, left: deque[memoryview], deaf: float | None) -> None:
    """By the transport, which copies what it cannot send at once.

    In pieces that go through the slowest line that is put up with before it would be taken for dead.
    """
    while left:
        await _taken(writer.write(left[0][:SMALL_PIECE]), deaf)
        left[0] = left[0][SMALL_PIECE:]
        if not left[0]:
            left.popleft()


def _from_memory(left: deque[memoryview]) -> _Step:
    def step(socket: int) -> int:
        while left and not left[0]:
            left.popleft()
        if not left:
            return 0
        sent = os.write(socket, left[0][:PIECE])
        left[0] = left[0][sent:]
        return sent

    return step


def _from_file(descriptor: int, span: range) -> _Step:
    start = span.start

    def step(socket: int) -> int:
        nonlocal start
        if start == span.stop:
            return 0
        sent = os.sendfile(socket, descriptor, start, min(PIECE, span.stop - start))
        if not sent:
            raise ConnectionResetError("The file became shorter while it was sent.")
        start += sent
        return sent

    return step


async def _poured(transport: Any, step: _Step, deaf: float | None = None) -> None:
    """Send past the transport, whose own writes come before; returns when all is sent."""
    deaf = deaf or _DEAF
    await _emptied(transport, deaf)
    loop = asyncio.get_running_loop()
    socket = os.dup(transport.get_extra_info("socket").fileno())  # a loop watches a transport's own one itself
    pouring = _Pouring(step, socket)
    loop.add_writer(socket, pouring.writable)
    try:
        await pouring.ended(transport, deaf)
    finally:
        loop.remove_writer(socket)
        os.close(socket)


async def _emptied(transport: Any, deaf: float | None = None) -> None:
    """Wait until the transport's own writes are out. Raises `ConnectionResetError` when they do not get there."""
    turns, began = 0, monotonic()
    while transport.get_write_buffer_size() and not transport.is_closing():
        if monotonic() - began > (deaf or _DEAF):
            raise broken()
        await asyncio.sleep(0 if turns < _AT_ONCE else 0.01)  # mostly it is but the headers, and out at once
        turns += 1
    if transport.is_closing():
        raise broken()


class _Pouring:
    """Sends as much as a socket takes whenever it takes more."""

    def __init__(self, step: _Step, socket: int) -> None:
        self._step = step
        self._socket = socket
        self._sent = 0
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def writable(self) -> None:
        if self._done.done():
            return
        until = self._sent + _BURST
        try:
            while self._sent < until:
                sent = self._step(self._socket)
                if not sent:
                    self._done.set_result(None)
                    return
                self._sent += sent
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._done.set_exception(ConnectionResetError(error.errno, error.strerror))
            self._done.exception()  # nobody may be waiting any more

    async def ended(self, transport: asyncio.Transport, deaf: float) -> None:
        """Return when all is sent. Raises `ConnectionResetError` when it cannot be, or nothing of it is taken."""
        before, since = -1, monotonic()
        while not self._done.done():
            if self._sent != before:
                before, since = self._sent, monotonic()
            if transport.is_closing() or monotonic() - since > deaf:
                raise broken()
            await asyncio.wait([self._done], timeout=1.0)
        self._done.result()
