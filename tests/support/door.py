"""A TCP door between storage and its object store, which can be shut, and can hold back one kind of request."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit


class Door:
    """Passes bytes on while it is open; shut, it refuses connections and cuts those that there are."""

    def __init__(self, target: str) -> None:
        self._target = urlsplit(target)
        self._port = 0
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self.held_back = b""  # a request that begins with this goes no further
        self.holding = asyncio.Event()

    @classmethod
    @asynccontextmanager
    async def to(cls, target: str) -> AsyncIterator["Door"]:
        """A door to a URL, shut, with a port of its own."""
        door = cls(target)
        await door.open()
        await door.shut()
        try:
            yield door
        finally:
            await door.shut()

    @property
    def url(self) -> str:
        """Where its outer side is."""
        return f"http://127.0.0.1:{self._port}"

    async def open(self) -> None:
        """Let everybody through."""
        self._server = await asyncio.start_server(self._pass, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def shut(self) -> None:
        """Let nobody through."""
        if self._server is None:
            return
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()
        self._server = None

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            inner_reader, inner_writer = await asyncio.open_connection(self._target.hostname, self._target.port)
            try:
                there = asyncio.create_task(self._pump(reader, inner_writer, watched=True))
                back = asyncio.create_task(self._pump(inner_reader, writer))
                try:
                    await asyncio.wait([there, back], return_when=asyncio.FIRST_COMPLETED)
                finally:
                    there.cancel()
                    back.cancel()
                    await asyncio.gather(there, back, return_exceptions=True)
            finally:
                inner_writer.close()
        except (asyncio.CancelledError, OSError):
            pass  # the door was shut, or there is nobody behind it: either way this connection is over
        finally:
            writer.close()
            self._connections.discard(task)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, watched: bool = False) -> None:
        while piece := await reader.read(65536):
            if watched and self.held_back and piece.startswith(self.held_back):
                self.holding.set()
                await asyncio.Future()
            writer.write(piece)
            await writer.drain()
