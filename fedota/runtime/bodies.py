"""Large bodies, moved without needless copies, and gone on with where they broke off.

aiohttp hands a body over in pieces that were copied three times on their way, which for tensors of many megabytes is
much of a round's work. So once the headers are read, a body's bytes go straight from the socket to where they are
wanted; the connection is closed afterwards, since aiohttp's parser did not see them. What is sent goes straight to the
socket too: from a file without passing through this process at all. Behind TLS both go through the transport instead.
"""

import asyncio
import mmap
import os
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any, Final

from aiohttp import ClientResponse, HttpVersion11, StreamReader, hdrs, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.payload import Payload

from fedota.errors import FedotaError
from fedota.runtime.places import PIECE, SMALL_PIECE, Place, Spooled, put, room
from fedota.runtime.portions import Portions

ONLY_TENSORS: Final = "Send the model's tensors and nothing else."
STALL: Final = 20.0  # seconds without a byte after which a body is cut off
_DEAF: Final = 300.0  # seconds without a byte taken after which a reader is given up
_SLOWEST: Final = 16_384  # bytes a second: whoever is slower takes a place from those who are not
_SMALL: Final = 1 << 18  # bytes below which a connection of its own costs more than the copies
_BURST: Final = 4 * PIECE  # bytes that one connection may send before others have their turn
_AT_ONCE: Final = 4  # turns of the event loop in which a transport's small buffer should be empty
_ENCRYPTED: Final = 1 << 14  # bytes that go through TLS at once: a record, and as much may wait in memory
_THROUGH_TLS: Final = Portions(512)  # files that are sent at the same time; each costs some 200 KB
_STAGE: Final = 1 << 18  # bytes of a body that wait in memory for the disk
_WRITERS: Final = ThreadPoolExecutor(4, "write")  # of their own: a slow disk must not hold up what else needs a thread
_TAKEN_OVER: Final = web.RequestKey("taken_over", bool)
_INVITED: Final = web.RequestKey("invited", bool)
_UNASKED: Final = 3.0  # seconds; who sends a body though nobody asked for it does so after one
_POLL: Final = 0.05

# Sends more to a socket, given its descriptor: the number of bytes, 0 when all are sent. It may raise BlockingIOError.
_Step = Callable[[int], int]


class _Direct(asyncio.BufferedProtocol):
    """Stands in for a connection's own protocol until `length` bytes are in their place."""

    def __init__(self, own: Any, transport: asyncio.Transport, place: Place, length: int) -> None:
        self.received = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._failure: BaseException | None = None
        self._own = own
        self._transport = transport
        self._place = place
        self.left = length
        self._returned = False

    def begin(self, early: bytes) -> None:
        """Take what was read by other means, and then what comes."""
        put(self._place, early)
        self._go_on()

    def _go_on(self) -> None:
        if not self.left:
            self._end(None)
        elif not self._returned and not self._transport.is_closing():
            self._transport.resume_reading()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._place.room()[: self.left]

    def buffer_updated(self, nbytes: int) -> None:
        try:
            self._place.took(nbytes)
        except Exception as error:
            self._end(error)
            return
        self.received += nbytes
        self.left -= nbytes
        if not self.left:
            self._end(None)

    def _end(self, error: BaseException | None) -> None:
        self.give_back()
        if not self.done.done():
            self._failure = error
            self.done.set_result(None)

    def failure(self) -> BaseException | None:
        """Why not all of it came; to be raised by whoever asks, and not kept here.

        What is raised knows who raised it, and holds their places: were it held by one of them, the circle would
        keep many megabytes until somebody looks for circles.
        """
        failure, self._failure = self._failure, None
        return failure

    def give_back(self) -> None:
        """Put the connection's own protocol in its place again; it is not given more to read."""
        if self._returned or self._transport.is_closing():
            return
        self._returned = True
        self._transport.pause_reading()
        self._transport.set_protocol(self._own)

    async def settled(self) -> None:
        """Return when what came is in its place, and nothing more will come there."""

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self._failure = _broken()
            self.done.set_result(None)
        self._own.connection_lost(exc)

    def pause_writing(self) -> None:
        self._own.pause_writing()

    def resume_writing(self) -> None:
        self._own.resume_writing()


class _Staged(_Direct):
    """The same into a file, which is written beside the event loop: a slow disk makes whoever writes wait for seconds.

    What comes meanwhile is gathered in `_STAGE` bytes. When they are full no more is read until they are written.
    """

    def __init__(self, own: Any, transport: asyncio.Transport, place: Spooled, length: int) -> None:
        super().__init__(own, transport, place, length)
        self._file = place
        self._stage = room(_STAGE)
        self._filled = 0
        self._begun = 0  # bytes of the stage that are written, or being written
        self._writing: asyncio.Future[None] | None = None

    def begin(self, early: bytes) -> None:
        if early:
            self._write(memoryview(early))
        else:
            self._go_on()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._stage[self._filled :][: self.left]

    def buffer_updated(self, nbytes: int) -> None:
        self.received += nbytes
        self.left -= nbytes
        self._filled += nbytes
        if not self.left or self._filled == len(self._stage):
            self._transport.pause_reading()
        if self._writing is None:
            self._write_on()

    def _write_on(self) -> None:
        piece, self._begun = self._stage[self._begun : self._filled], self._filled
        self._write(piece)

    def _write(self, piece: memoryview) -> None:
        self._writing = asyncio.get_running_loop().run_in_executor(_WRITERS, self._file.copy, piece)
        self._writing.add_done_callback(self._written)

    def _written(self, writing: asyncio.Future[None]) -> None:
        self._writing = None
        if (error := writing.exception()) is not None:
            self._end(error)
        elif self._begun < self._filled:
            self._write_on()
        else:
            self._begun = self._filled = 0
            self._go_on()

    async def settled(self) -> None:
        """Return when nothing is being written: one write begins the next, also for who is cancelled meanwhile."""
        cancelled: asyncio.CancelledError | None = None
        while self._writing is not None:
            try:
                await _finished(self._writing)
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled


async def _finished(work: asyncio.Future[Any]) -> None:
    """Wait for work in a thread, which cannot be cancelled: whoever is, must not go on before it has ended."""
    cancelled: asyncio.CancelledError | None = None
    while True:
        try:
            await asyncio.wait([work])
            break
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


async def read_body(request: web.Request, place: Place) -> None:
    """Read a request's body into `place`, after what it has.

    Raises `update_too_large` when there is more than fits, and `timeout` when it stalls or comes far too slowly. What
    came before a body broke off is in its place, whatever is raised.
    """
    length, most = request.content_length, place.size - place.received
    if length is not None and length > most:
        raise _too_large(place.size)
    if length is None or length < _SMALL or request.transport is None:
        await _copied(request.content, place)
    else:
        await read_rest(request, place, length)


def expects(request: web.Request) -> bool:
    """Whether the client sends its body only when it is asked to (RFC 9110, 10.1.1)."""
    return request.version >= HttpVersion11 and request.headers.get(hdrs.EXPECT, "").lower() == "100-continue"


async def unhurried(request: web.Request) -> None:
    """In the place of aiohttp's way, which asks for a body before anybody has looked at what comes with it."""
    if expects(request):
        return
    if request.version >= HttpVersion11 or not await _comes_unasked(request.content):
        refused = web.HTTPExpectationFailed()
        refused.force_close()  # what comes next on this connection would be taken for the body
        raise refused


async def _comes_unasked(content: StreamReader) -> bool:
    """Whether some of a body is here within `_UNASKED` seconds.

    HTTP/1.0 has no `100 Continue`, so the wish for it is ignored. But a proxy may have passed it on: its client waits
    in vain to be asked, and what never comes must not be waited for where that takes another's turn.
    """
    polls = int(_UNASKED / _POLL)
    while not (comes := content.total_bytes > 0 or content.is_eof()) and polls > 0:
        await asyncio.sleep(_POLL)  # a stream tells only who reads it
        polls -= 1
    return comes


@contextmanager
def held_back(request: web.Request) -> Iterator[None]:
    """Nothing is read meanwhile of a client that said it would send nothing unasked: it may do so all the same.

    That it has gone away is noticed afterwards.
    """
    protocol = request.protocol
    if not expects(request) or protocol.transport is None:
        yield
        return
    protocol.pause_reading()
    try:
        yield
    finally:
        protocol.resume_reading()


async def invite(request: web.Request) -> None:
    """Ask for the body, if the client waits for that."""
    if expects(request):
        request[_INVITED] = True
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # of the response nothing is sent yet


def finish(request: web.Request, response: web.StreamResponse) -> None:
    """Close the connection with the response when not all of the body came, or its bytes were taken past aiohttp."""
    body = request.content
    if request.get(_TAKEN_OVER) or not body.is_eof():
        response.force_close()
    if expects(request) and not request.get(_INVITED) and not body.total_bytes:
        body.feed_eof()  # it will not come: aiohttp would wait for it with the closing


async def read_rest(request: web.Request, place: Place, length: int) -> None:
    """Read the `length` bytes that are left of a request's body; its beginning was read by other means."""
    transport = request.transport
    if transport is None:
        raise _broken()
    request[_TAKEN_OVER] = True
    try:
        await _straight(request.content, request.protocol, transport, place, length)
    finally:
        request.content.feed_eof()  # aiohttp must not wait for what it will never see


async def read_reply(reply: ClientResponse, place: Place) -> None:
    """Read a reply's body, which must fill `place`. Raises `timeout`, or `ConnectionResetError`.

    What came before it broke off is in its place, whatever is raised.
    """
    connection, length = reply.connection, place.size - place.received
    if connection is None or connection.transport is None or reply.content_length != length:
        await _copied(reply.content, place)
        if place.received != place.size:
            raise ConnectionResetError("The body is shorter than it was announced.")
        return
    try:
        await _straight(reply.content, connection.protocol, connection.transport, place, length)
    finally:
        reply.close()


async def _straight(
    content: StreamReader, protocol: Any, transport: asyncio.Transport, place: Place, length: int
) -> None:
    """From the socket to its place, after what aiohttp has read already."""
    wanted = place.received + length
    transport.pause_reading()
    early = content.read_nowait(-1)
    left = length - len(early)
    if isinstance(place, Spooled):
        direct: _Direct = _Staged(protocol, transport, place, left)
    else:
        direct = _Direct(protocol, transport, place, left)
    transport.set_protocol(direct)
    began = monotonic()
    try:
        direct.begin(early)
        await _progressing(direct, began)
    finally:
        direct.give_back()  # the place may be another's from now on: not one more byte may go there
        await direct.settled()
    if place.received < wanted:  # else all of it is there, whatever became of its connection meanwhile
        raise direct.failure() or _stalled(place, began)


async def _progressing(direct: _Direct, began: float) -> None:
    """Return when all of the body has come, or no more will, or it stalls or comes far too slowly."""
    while not direct.done.done() and direct.left:
        before = direct.received
        await asyncio.wait([direct.done], timeout=STALL)
        if direct.received == before or _too_slow(direct.received, began):
            return


async def _copied(content: StreamReader, place: Place) -> None:
    received, began = 0, monotonic()
    while True:
        try:
            piece = await asyncio.wait_for(content.readany(), STALL)
        except TimeoutError:
            raise _stalled(place, began) from None
        if not piece:
            return
        if len(piece) > place.size - place.received:
            raise _too_large(place.size)
        await _stored(place, piece)
        received += len(piece)
        if _too_slow(received, began):
            raise _stalled(place, began)


async def _stored(place: Place, data: bytes) -> None:
    if not isinstance(place, Spooled):
        put(place, data)
        return
    writing = asyncio.get_running_loop().run_in_executor(_WRITERS, place.copy, memoryview(data))
    await _finished(writing)
    writing.result()


def _too_slow(received: int, began: float) -> bool:
    return monotonic() - began > 2 * STALL + received / _SLOWEST


def _stalled(place: Place, began: float) -> FedotaError:
    came = f"{place.received} bytes of it are here after {monotonic() - began:.0f} seconds"
    return FedotaError("timeout", f"The body came too slowly: {came}. Go on from there.")


def _too_large(most: int) -> FedotaError:
    return FedotaError("update_too_large", f"For this model {most} bytes are the most. {ONLY_TENSORS}")


def _broken() -> ConnectionResetError:
    return ConnectionResetError("The connection was closed in the middle of a body.")


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
        if not _is_plain(transport) or (self._size or 0) < _SMALL:
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
        raise _broken()
    try:
        if _is_plain(transport) and len(span) >= _SMALL:
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
        if _too_slow(start - span.start, began):
            raise _broken()


async def _taken(writing: Awaitable[None], deaf: float | None = None) -> None:
    """Wait until a piece is written. Raises `ConnectionResetError` when nothing of it is taken."""
    try:
        async with asyncio.timeout(deaf or _DEAF):
            await writing
    except TimeoutError:
        raise _broken() from None


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
            raise _broken()
        await asyncio.sleep(0 if turns < _AT_ONCE else 0.01)  # mostly it is but the headers, and out at once
        turns += 1
    if transport.is_closing():
        raise _broken()


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
                raise _broken()
            await asyncio.wait([self._done], timeout=1.0)
        self._done.result()
