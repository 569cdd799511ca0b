"""Lines between processes that can be held up, reset, swallowed, closed by half or cut: a TCP proxy for each line."""

import asyncio
import re
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final, Literal, NamedTuple
from urllib.parse import urlsplit

_PIECE: Final = 1 << 16
_AT_ONCE: Final = struct.pack("ii", 1, 0)  # SO_LINGER: closing throws away what is unsent, and tells the peer by RST
Way = Literal["there", "back"]
Spring = Callable[["Connection", Way], Awaitable[None]]


class Side(NamedTuple):
    """One end of a connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


class Trap:
    """Springs once, in the middle of what passes: before these `words` do.

    With `after`, so many bytes later; when `answered`, before the first byte that comes back on them.
    """

    def __init__(self, words: re.Pattern[bytes], spring: Spring, *, after: int = 0, answered: bool = False) -> None:
        self.sprung = asyncio.Event()
        self._words = words
        self._spring = spring
        self._after = after
        self._answered = answered
        self._on: Connection | None = None
        self._left = 0

    def place(self, connection: "Connection", way: Way, piece: bytes) -> int | None:
        """Where in this piece it springs, if it does."""
        if self.sprung.is_set() or (self._on is not None and self._on is not connection):
            return None
        if self._on is None:
            found = self._words.search(piece) if way == "there" else None
            if found is None:
                return None
            self._on, self._left = connection, found.start() + self._after
            if self._answered:
                return None
        if self._answered:
            return 0 if way == "back" else None
        return self._passes(len(piece)) if way == "there" else None

    def _passes(self, size: int) -> int | None:
        if self._left < size:
            return self._left
        self._left -= size
        return None

    async def spring(self, connection: "Connection", way: Way) -> None:
        """Do what it is there for."""
        self.sprung.set()
        await self._spring(connection, way)

    def let_go(self, connection: "Connection") -> None:
        """The connection ended before it came to that: another one will."""
        if self._on is connection:
            self._on = None


class Connection:
    """One connection through a wire."""

    def __init__(self, wire: "Wire", near: Side, far: Side) -> None:
        self.wire = wire
        self._sides = (near, far)
        self._passing = asyncio.Event()
        self._passing.set()
        self._deaf: set[Way] = set()
        self._lag = 0.0
        self._broken = False
        self._end = asyncio.Event()

    async def run(self) -> None:
        """Pass on what comes, both ways, until both have ended or it is reset."""
        near, far = self._sides
        pumps = [
            asyncio.create_task(self._pump("there", near.reader, far.writer)),
            asyncio.create_task(self._pump("back", far.reader, near.writer)),
        ]
        for pump in pumps:
            pump.add_done_callback(lambda _: self._end.set() if all(one.done() for one in pumps) else None)
        try:
            await self._end.wait()
        finally:
            self._let_go()
            for pump in pumps:
                pump.cancel()
            self._close()  # before anything is awaited: the wire may be taken away meanwhile
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(self, way: Way, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while piece := await reader.read(_PIECE):
                await self._pass(way, piece, writer)
            await self._passing.wait()
            if way not in self._deaf:
                writer.write_eof()
        except OSError:
            self.reset()

    async def _pass(self, way: Way, piece: bytes, writer: asyncio.StreamWriter) -> None:
        trap = self.wire.trap
        if trap is not None and (place := trap.place(self, way, piece)) is not None:
            await self._write(way, piece[:place], writer)
            await trap.spring(self, way)
            piece = piece[place:]
        await self._write(way, piece, writer)

    async def _write(self, way: Way, piece: bytes, writer: asyncio.StreamWriter) -> None:
        if self._lag:
            await asyncio.sleep(self._lag)
        await self._passing.wait()
        if piece and way not in self._deaf:
            writer.write(piece)
            await writer.drain()

    def reset(self) -> None:
        """Both ends hear at once that it is over; what was under way is lost."""
        for side in self._sides:
            raw = side.writer.get_extra_info("socket")
            with suppress(OSError):
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
        self._broken = True
        self._end.set()

    def swallow(self) -> None:
        """Nothing passes any more, and neither end hears why, until it is reset."""
        self._passing.clear()

    def half_close(self, way: Way) -> None:
        """Who is spoken to hears that there is no more; who speaks does not hear that nobody listens."""
        writer = self._sides[1 if way == "there" else 0].writer
        self._deaf.add(way)
        with suppress(OSError):
            writer.write_eof()

    def slow_down(self, seconds: float) -> None:
        """From now on each piece takes so long."""
        self._lag = seconds

    def _let_go(self) -> None:
        if self.wire.trap is not None:
            self.wire.trap.let_go(self)

    def _close(self) -> None:
        for side in self._sides:
            (side.writer.transport.abort if self._broken else side.writer.close)()


class Wire:
    """A line to one process, at an address of its own. `target` tells where the process is now; "" when nowhere."""

    def __init__(self, name: str, target: Callable[[], str]) -> None:
        self.name = name
        self.trap: Trap | None = None
        self.connections: list[Connection] = []
        self._target = target
        self._address = ""
        self._state: Literal["open", "cut", "silent"] = "open"
        self._waiting: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def laid(self) -> AsyncIterator["Wire"]:
        """In use."""
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self._address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            for task in self._waiting:
                task.cancel()
            await asyncio.gather(*self._waiting, return_exceptions=True)
            await server.wait_closed()

    def url(self, scheme: str = "http") -> str:
        """Where it begins."""
        return f"{scheme}://{self._address}"

    def cut(self, *, silently: bool = False) -> None:
        """No connection lives, and none is made; `silently`, both ends still believe that they have one."""
        self._state = "silent" if silently else "cut"
        for connection in self.connections:
            (connection.swallow if silently else connection.reset)()

    def mend(self) -> None:
        """New connections are made again; those that were swallowed are over."""
        if self._state == "silent":
            for connection in self.connections:
                connection.reset()
        self._state = "open"

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._waiting.add(task)
        try:
            await self._serve(Side(reader, writer))
        except asyncio.CancelledError:
            writer.transport.abort()  # the wire is taken away
        finally:
            self._waiting.discard(task)

    async def _serve(self, near: Side) -> None:
        target = urlsplit(self._target())
        try:
            if self._state == "cut" or not target.port:
                raise ConnectionRefusedError
            far = Side(*await asyncio.open_connection(target.hostname, target.port))
        except OSError:
            near.writer.transport.abort()
            return
        connection = Connection(self, near, far)
        if self._state != "open":
            (connection.swallow if self._state == "silent" else connection.reset)()
        self.connections.append(connection)
        try:
            await connection.run()
        finally:
            self.connections.remove(connection)
