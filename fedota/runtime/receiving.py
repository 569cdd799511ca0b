"""Large bodies that come, without needless copies, and gone on with where they broke off.

Once the headers are read, a body's bytes go straight from the socket to where they are wanted; the connection is closed
afterwards, since aiohttp's parser did not see them. Behind TLS they go through the transport instead.
"""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from time import monotonic
from typing import Any, Final

from aiohttp import ClientResponse, HttpVersion11, StreamReader, hdrs, web

from fedota.errors import FedotaError
from fedota.runtime import bodies
from fedota.runtime.bodies import SMALL, broken, too_slow
from fedota.runtime.places import Place, Spooled, put, room

ONLY_TENSORS: Final = "Send the model's tensors and nothing else."
_STAGE: Final = 1 << 18  # bytes of a body that wait in memory for the disk
_WRITERS: Final = ThreadPoolExecutor(4, "write")  # of their own: a slow disk must not hold up what else needs a thread
_TAKEN_OVER: Final = web.RequestKey("taken_over", bool)
_INVITED: Final = web.RequestKey("invited", bool)
_UNASKED: Final = 3.0  # seconds; who sends a body though nobody asked for it does so after one
_POLL: Final = 0.05


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
            self._failure = broken()
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
    if length is None or length < SMALL or request.transport is None:
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
        raise broken()
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
        await asyncio.wait([direct.done], timeout=bodies.STALL)
        if direct.received == before or too_slow(direct.received, began):
            return


async def _copied(content: StreamReader, place: Place) -> None:
    received, began = 0, monotonic()
    while True:
        try:
            piece = await asyncio.wait_for(content.readany(), bodies.STALL)
        except TimeoutError:
            raise _stalled(place, began) from None
        if not piece:
            return
        if len(piece) > place.size - place.received:
            raise _too_large(place.size)
        await _stored(place, piece)
        received += len(piece)
        if too_slow(received, began):
            raise _stalled(place, began)


async def _stored(place: Place, data: bytes) -> None:
    if not isinstance(place, Spooled):
        put(place, data)
        return
    writing = asyncio.get_running_loop().run_in_executor(_WRITERS, place.copy, memoryview(data))
    await _finished(writing)
    writing.result()


def _stalled(place: Place, began: float) -> FedotaError:
    came = f"{place.received} bytes of it are here after {monotonic() - began:.0f} seconds"
    return FedotaError("timeout", f"The body came too slowly: {came}. Go on from there.")


def _too_large(most: int) -> FedotaError:
    return FedotaError("update_too_large", f"For this model {most} bytes are the most. {ONLY_TENSORS}")
