"""The wires do what the other tests believe that they do."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

import pytest

from tests.faults.rounds.wires import Connection, Trap, Way, Wire
from tests.support.waiting import until


class Line(NamedTuple):
    """A wire to an echo, and one connection through it; `ended` when the echo has heard the end of what it was sent."""

    wire: Wire
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    ended: asyncio.Event

    async def echoes(self, words: bytes) -> bool:
        """Whether these words come back."""
        self.writer.write(words)
        return await self.reader.readexactly(len(words)) == words

    async def connection(self) -> Connection:
        """What the wire has of it."""

        async def there() -> list[Connection]:
            return self.wire.connections

        await until(there)
        return self.wire.connections[0]


@asynccontextmanager
async def echoing() -> AsyncIterator[Line]:
    """Connected."""
    ended = asyncio.Event()

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while piece := await reader.read(1 << 16):
                writer.write(piece)
                await writer.drain()
            ended.set()
        except ConnectionError:
            pass  # it was reset
        finally:
            writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    url = f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, Wire("echo", lambda: url).laid() as wire:
        host, port = wire.url("").removeprefix("://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            yield Line(wire, reader, writer, ended)
        finally:
            writer.close()


async def test_everything_passes() -> None:
    """More than any buffer holds, both ways, and then the end."""
    async with echoing() as line:
        body = bytes(range(256)) * 40_000
        received = asyncio.create_task(line.reader.readexactly(len(body)))
        line.writer.write(body)
        assert await received == body
        line.writer.write_eof()
        assert await line.reader.read() == b"" and line.ended.is_set()


async def test_a_reset_is_heard_at_once() -> None:
    """At both ends."""
    async with echoing() as line:
        assert await line.echoes(b"hello")
        (await line.connection()).reset()
        with pytest.raises(ConnectionResetError):
            await line.reader.read()

        async def nobody() -> bool:
            return line.wire.connections == []

        await until(nobody)
        assert not line.ended.is_set()


async def test_what_is_swallowed_is_never_heard() -> None:
    """Neither words nor the end, until it is reset."""
    async with echoing() as line:
        connection = await line.connection()
        connection.swallow()
        line.writer.write(b"hello")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(line.reader.read(1), 0.2)
        connection.reset()
        with pytest.raises(ConnectionResetError):
            await line.reader.read()


async def test_one_half_is_closed() -> None:
    """The echo hears the end, we do not."""
    async with echoing() as line:
        assert await line.echoes(b"hello")
        (await line.connection()).half_close("there")
        await asyncio.wait_for(line.ended.wait(), 5)
        assert await line.reader.read() == b"", "the echo closed its half then"


async def test_a_slow_line_passes_everything() -> None:
    """Only later."""
    async with echoing() as line:
        (await line.connection()).slow_down(0.1)
        began = asyncio.get_running_loop().time()
        assert await line.echoes(b"hello")
        assert asyncio.get_running_loop().time() - began >= 0.2


@pytest.mark.parametrize("silently", [False, True])
async def test_a_wire_is_cut_and_mended(silently: bool) -> None:
    """Nothing passes meanwhile, on old connections or new ones."""
    async with echoing() as line:
        assert await line.echoes(b"hello")
        line.wire.cut(silently=silently)
        host, port = line.wire.url("").removeprefix("://").split(":")
        for reader, writer in ((line.reader, line.writer), await asyncio.open_connection(host, int(port))):
            writer.write(b"hello")
            with pytest.raises((ConnectionError, TimeoutError, asyncio.IncompleteReadError)):
                await asyncio.wait_for(reader.readexactly(5), 0.2)
            writer.close()
        line.wire.mend()
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        writer.close()


@pytest.mark.parametrize(
    ("after", "answered", "passed"), [(0, False, b"one "), (6, False, b"one two th"), (0, True, b"one two three")]
)
async def test_a_trap_springs_in_its_place(after: int, answered: bool, passed: bytes) -> None:
    """Before the words, so many bytes later, or before the answer; and once."""
    sprung: list[Way] = []

    async def spring(connection: Connection, way: Way) -> None:
        sprung.append(way)
        if not answered:
            await asyncio.sleep(0.1)
        connection.half_close(way)

    async with echoing() as line:
        line.wire.trap = Trap(re.compile(b"two"), spring, after=after, answered=answered)
        line.writer.write(b"one two three")
        assert await line.reader.read() == (b"" if answered else passed)
        assert sprung == ["back" if answered else "there"]
