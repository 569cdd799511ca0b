"""Light clients, thousands in one process: docs/protocol.md's first part over bare streams, training left out."""

import asyncio
import contextlib
import json
import random
import resource
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

_PIECE: Final = 1 << 20  # bytes
_REPORTED: Final = 409
_NOT_NOW: Final = (503, 504)
_NOT_FOUND: Final = 404  # the round has gone on
_NOTHING: Final = memoryview(b"")
_CONTINUE: Final = b"HTTP/1.1 100 "
Sink = Callable[[bytes], object]


class Answer(NamedTuple):
    """A response's status, headers (lower case) and JSON."""

    status: int
    headers: dict[str, str]
    json: dict[str, Any]

    @property
    def retry_after(self) -> float:
        """Seconds after which to ask again."""
        return float(self.headers.get("retry-after", 1))


class Line:
    """A client's connection to its selector, made again when it was closed; by TLS where there is a `context`."""

    def __init__(self, url: str, token: str, client: str, context: ssl.SSLContext | None = None) -> None:
        place = urlsplit(url)
        assert place.hostname is not None
        self._place = (place.hostname, place.port)
        self._context = context
        self._head = f"Host: {place.netloc}\r\nAuthorization: Bearer {token}\r\nFedota-Client: {client}\r\n"
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connected, if it was not yet."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._place, limit=_PIECE, ssl=self._context)
        return self._streams

    def close(self) -> None:
        """Let go of the connection."""
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None

    async def ask(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        body: memoryview = _NOTHING,
        sink: Sink | None = None,
    ) -> Answer:
        """One request. The body of a good answer goes to `sink`, where there is one. Raises `ConnectionError`."""
        kept = False
        try:
            reader, writer = await self.connect()
            expected = {"Expect": "100-continue"} if body else {}
            lines = "".join(f"{name}: {value}\r\n" for name, value in {**(headers or {}), **expected}.items())
            writer.write(f"{method} {path} HTTP/1.1\r\n{self._head}{lines}Content-Length: {len(body)}\r\n\r\n".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            asked = head.startswith(_CONTINUE)
            async with _writing(writer, body if asked else _NOTHING) as writing:  # it may be refused on its way
                answer = await _read(await reader.readuntil(b"\r\n\r\n") if asked else head, reader, sink)
                # after half a body the next request would be taken for the other half
                whole = writing.done() or not asked
                kept = answer.headers.get("connection", "").lower() != "close" and whole
            return answer
        except (OSError, EOFError) as error:
            raise ConnectionError(str(error) or type(error).__name__) from None
        finally:
            if not kept:
                self.close()


@contextlib.asynccontextmanager
async def _writing(writer: asyncio.StreamWriter, body: memoryview) -> AsyncIterator[asyncio.Task[None]]:
    async def write() -> None:
        with contextlib.suppress(ConnectionError):  # what is to be read tells more
            for start in range(0, len(body), _PIECE):
                writer.write(body[start : start + _PIECE])
                await writer.drain()

    task = asyncio.create_task(write())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


async def _read(head: bytes, reader: asyncio.StreamReader, sink: Sink | None) -> Answer:
    status, *lines = head.decode().split("\r\n")
    pairs = (line.partition(": ") for line in lines if line)
    headers = {name.lower(): value for name, _, value in pairs}
    code, left = int(status.split()[1]), int(headers.get("content-length", 0))
    if sink is None or code >= 300:
        return Answer(code, headers, json.loads(await reader.readexactly(left) or b"{}"))
    while left:
        piece = await reader.read(min(left, _PIECE))
        if not piece:
            raise EOFError("the connection was closed in the middle of a body")
        sink(piece)
        left -= len(piece)
    return Answer(code, headers, {})


class LightClient:
    """Takes part with an update that was made before; `met` counts what it was told on the way."""

    def __init__(self, line: Line, update: memoryview, met: Counter[str], sink: Callable[[], Sink]) -> None:
        self._line = line
        self._update = update
        self._met = met
        self._sink = sink
        self._ticket = ""

    async def take_part(self) -> None:
        """Until the training is finished."""
        while True:
            try:
                if await self._obey(await self._check_in()):
                    return
            except ConnectionError as error:
                self._met[f"no answer: {error}"] += 1
                await asyncio.sleep(random.uniform(0.1, 0.5))

    async def _check_in(self) -> Answer:
        return await self._line.ask("POST", "/v1/check-in", {"Fedota-Ticket": self._ticket} if self._ticket else {})

    async def _obey(self, answer: Answer) -> bool:
        if answer.status in _NOT_NOW:
            await self._wait(answer)
            return False
        if answer.status != 200:
            raise RuntimeError(f"A check-in was answered with {answer.status}: {answer.json}")
        told = answer.json
        self._met[told["status"]] += 1
        if told.get("update") in ("counted", "over"):
            self._met[told["update"]] += 1
            self._ticket = ""
        match told["status"]:
            case "finished":
                self._line.close()
                return True
            case "come_back":
                await asyncio.sleep(told["seconds"] * random.uniform(1.0, 1.2))
            case "selected":
                await self._take(told)
            case "send_again":
                await self._send()
        return False

    async def _take(self, told: dict[str, Any]) -> None:
        if self._ticket != told["ticket"]:
            model = await self._line.ask("GET", f"/v1/models/{told['model']['sha256']}", sink=self._sink())
            if model.status == _NOT_FOUND:
                self._met["too late for the model"] += 1
                return
            if model.status != 200:
                raise RuntimeError(f"A model was answered with {model.status}: {model.json}")
            self._ticket = told["ticket"]
        await self._send()

    async def _send(self) -> None:
        headers = {"Fedota-Ticket": self._ticket, "Fedota-Examples": "1", "Content-Type": "application/octet-stream"}
        answer = await self._line.ask("POST", "/v1/updates", headers, self._update)
        if answer.status in _NOT_NOW:
            await self._wait(answer)
        elif answer.status == _REPORTED:
            self._met[answer.json["code"]] += 1
        elif answer.status != 200:
            raise RuntimeError(f"An update was answered with {answer.status}: {answer.json}")

    async def _wait(self, answer: Answer) -> None:
        self._met[f"{answer.status} {answer.json.get('code', '')}"] += 1
        await asyncio.sleep(answer.retry_after * random.uniform(1.0, 1.2))


def drop(_: bytes) -> None:
    """Where the bytes of a model go that nobody trains on."""


def allow_files(count: int) -> None:
    """Let this process, and those that it starts, have so many connections. Raises `RuntimeError` when it may not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        raise RuntimeError(f"{count} open files are needed, but {hard} are allowed. Raise that: ulimit -n {count}")
    if soft != resource.RLIM_INFINITY and soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
