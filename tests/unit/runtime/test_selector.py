"""A selector as its clients meet it, over real connections; its coordinator is played by the test."""

import asyncio
import gzip
import hashlib
import struct
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from ssl import SSLContext
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
import safetensors.numpy
from aiohttp import web
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from fedota.contracts import participation
from fedota.contracts.runtime import Listening, SelectorSettings
from fedota.events import to_json
from fedota.process import serving, serving_at
from fedota.runtime import aggregation, sending, uploads
from fedota.runtime.aggregation import WeightedSum
from fedota.runtime.places import Spooled
from fedota.runtime.portions import Portions
from fedota.runtime.protocol import (
    CHECK_IN,
    CLIENT,
    EXAMPLES,
    MODELS,
    OFFSET,
    ORDERS,
    PARTIALS,
    STATES,
    TICKET,
    UPDATES,
    WHOLE,
    Meta,
    ModelRef,
    Orders,
    Told,
    Work,
)
from fedota.runtime.selector import reporting
from fedota.runtime.selector.app import SERVER, create_app
from fedota.runtime.selector.headers import AHEAD
from fedota.runtime.web import Handler
from fedota.tls import client_context
from services.orchestrator.launchers.authority import Authority

COUNT = 150_000  # numbers: two halves of them are large bodies each
PRIVATE = Ed25519PrivateKey.generate()
PEM, PLAIN = serialization.Encoding.PEM, serialization.NoEncryption()
PRIVATE_PEM = PRIVATE.private_bytes(PEM, serialization.PrivateFormat.PKCS8, PLAIN).decode()
PUBLIC_PEM = PRIVATE.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()


def update(value: float, count: int = COUNT) -> bytes:
    """Weights with numbers from this one on, so that none may stand in another's place."""
    return safetensors.numpy.save({"w": np.arange(count, dtype=np.float32) + np.float32(value)})


def numbers(body: bytes) -> NDArray[np.float64]:
    """What is in it."""
    return safetensors.numpy.load(body)["w"].astype(np.float64)


class Coordinator:
    """Gives orders, and takes in what the selector says and hands over."""

    def __init__(self, model: bytes) -> None:
        self.model = ModelRef(sha256=hashlib.sha256(model).hexdigest(), size=len(model))
        self._told: Told | None = None
        self._body = model
        self._work: Work | None = None
        self._number = 0
        self._changed = asyncio.Condition()
        self._sums: asyncio.Queue[tuple[Meta, bytes]] = asyncio.Queue()

    def app(self) -> web.Application:
        """Its HTTP side."""
        app = web.Application(client_max_size=2**30)
        app.router.add_post(STATES, self._take_state)
        app.router.add_get(ORDERS, self._give_orders)
        app.router.add_get(MODELS, self._give_model)
        app.router.add_put(PARTIALS, self._take_sum)
        return app

    async def orders(self, share: int, collect: str = "") -> None:
        """A cohort of so many clients is at work, or its sum is asked for."""
        work = Work(
            cohort="k", round=1, attempt=1, base=self.model, share=share, deadline=time.time() + 600, collect=collect
        )
        async with self._changed:
            self._work, self._number = work, self._number + 1
            self._changed.notify_all()

    async def hears(self, wanted: Callable[[Told], bool]) -> None:
        """Return when the selector says that it is so."""
        async with asyncio.timeout(10), self._changed:
            await self._changed.wait_for(lambda: self._told is not None and wanted(self._told))

    async def collected(self) -> tuple[list[str], NDArray[np.float64]]:
        """Whose updates are in the sum, and the sum."""
        await self.orders(0, collect="c")
        meta, sum_ = await asyncio.wait_for(self._sums.get(), 10)
        return sorted(one.organization for one in meta.accepted), np.frombuffer(sum_)

    async def _take_state(self, request: web.Request) -> web.Response:
        async with self._changed:
            self._told = msgspec.json.decode(await request.read(), type=Told)
            self._changed.notify_all()
        return web.Response(status=204)

    async def _give_orders(self, request: web.Request) -> web.Response:
        known = request.headers.get("If-None-Match")
        async with self._changed:
            await self._changed.wait_for(lambda: known != f'"{self._number}"')
            orders = Orders(life=request.query["life"], model=self.model, config={}, work=self._work)
        return web.Response(body=to_json(orders), headers={"ETag": f'"{self._number}"'})

    async def _give_model(self, _: web.Request) -> web.Response:
        return web.Response(body=self._body)

    async def _take_sum(self, request: web.Request) -> web.Response:
        body = await request.read()
        before = 8 + struct.unpack("<Q", body[:8])[0]
        self._sums.put_nowait((msgspec.json.decode(body[8:before], type=Meta), body[before:]))
        return web.Response(status=204)


class Answer(NamedTuple):
    """What a selector said."""

    status: int
    headers: dict[str, str]
    json: dict[str, Any]

    @property
    def code(self) -> str:
        """Of an error."""
        return str(self.json.get("code", ""))

    @property
    def offset(self) -> int:
        """The bytes that it has."""
        return int(self.headers.get(OFFSET.lower(), -1))


class Line:
    """One request on a connection of its own, sent bit by bit."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, bodyless: bool) -> None:
        self.reader = reader
        self.writer = writer
        self._bodyless = bodyless

    def send(self, data: bytes) -> None:
        """Some more of it, as fast as it is taken."""
        self.writer.write(data)

    async def invited(self) -> None:
        """Wait to be asked for the body."""
        async with asyncio.timeout(10):
            assert await self.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"

    async def answer(self) -> Answer:
        """Wait for it."""
        async with asyncio.timeout(10):
            first, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[:-2]
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            size = 0 if self._bodyless else int(headers.get("content-length", 0))
            body = await self.reader.readexactly(size)
        self.writer.close()
        return Answer(int(first.split()[1]), headers, msgspec.json.decode(body) if body else {})

    def break_off(self) -> None:
        """Go away."""
        self.writer.transport.abort()


class Client:
    """Holds its lines itself."""

    def __init__(self, port: int, organization: str, context: SSLContext | None) -> None:
        token = participation.sign(PRIVATE_PEM, "p", organization, seconds=600).token
        self.headers = {"Host": "s", "Authorization": f"Bearer {token}", CLIENT: "c", EXAMPLES: "1"}
        self._port = port
        self._context = context

    async def line(self, method: str, path: str = UPDATES, /, **headers: Any) -> Line:
        """A request whose headers are sent."""
        line = Line(
            *await asyncio.open_connection("127.0.0.1", self._port, ssl=self._context, limit=1 << 16),
            bodyless=method == "HEAD",
        )
        named = {name.replace("_", "-"): str(value) for name, value in headers.items()}
        said = [f"{name}: {value}" for name, value in {**self.headers, **named}.items()]
        line.send("\r\n".join([f"{method} {path} HTTP/1.1", *said, "", ""]).encode())
        return line

    async def check_in(self) -> None:
        """Be selected."""
        answer = await (await self.line("POST", CHECK_IN)).answer()
        self.headers[TICKET] = answer.json["ticket"]

    async def ask(self, method: str, body: bytes = b"", **headers: Any) -> Answer:
        """A request at once."""
        line = await self.line(method, **{"Content-Length": len(body), **headers})
        line.send(body)
        return await line.answer()

    async def patch(self, offset: int, rest: bytes, **headers: Any) -> Answer:
        """The rest of an update."""
        return await self.ask("PATCH", rest, **{OFFSET: offset, **headers})

    async def breaks_off(self, whole: bytes, count: int) -> None:
        """So much of an update comes, and then the line is broken."""
        line = await self.line("POST", Content_Length=len(whole))
        line.send(whole[:count])
        await line.writer.drain()
        line.writer.close()
        async with asyncio.timeout(10):
            while (await self.ask("HEAD")).offset != count:
                pass


class There:
    """A selector: its coordinator, its address, and what happens to requests there."""

    def __init__(self, coordinator: Coordinator) -> None:
        self.coordinator = coordinator
        self.port = 0
        self.context: SSLContext | None = None
        self.requests: list[web.Request] = []
        self.cancelled = asyncio.Event()  # a request, as its client has gone

    def client(self, organization: str) -> Client:
        """Somebody of this organization."""
        return Client(self.port, organization, self.context)

    async def selected(self, *organizations: str) -> list[Client]:
        """A client of each, with a ticket."""
        clients = [self.client(one) for one in organizations]
        waiting = [asyncio.create_task(one.check_in()) for one in clients]
        await self.coordinator.hears(lambda told: told.waiting == len(clients))
        await self.coordinator.orders(len(clients))
        await asyncio.gather(*waiting)
        return clients

    @web.middleware
    async def _watch(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        self.requests.append(request)
        try:
            return await handler(request)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


@asynccontextmanager
async def selector(directory: Path, *, count: int = COUNT, tls: bool = False) -> AsyncIterator[There]:
    """One that has a model of so many numbers."""
    there, listening = There(Coordinator(update(0.0, count))), Listening()
    if tls:
        authority, certificate = Authority.of(directory), directory / "server.pem"
        certificate.write_bytes(authority.issue("server", ["127.0.0.1"]))
        listening, there.context = Listening(certificate=str(certificate)), client_context(authority.pem)
    async with serving(there.coordinator.app(), "127.0.0.1", 0, handler_cancellation=True) as url:
        settings = SelectorSettings(
            problem_id="p", run=1, name="s", coordinator=url, token_key=PUBLIC_PEM, key="secret"
        )
        app = create_app(settings, directory)
        app.middlewares.append(there._watch)
        async with serving_at(listening, app, **SERVER) as own:
            there.port = int(own.rpartition(":")[2])
            yield there


class Gate:
    """Holds the first call of a function up, in its thread, until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        self.reached = asyncio.Event()
        self._opened, self._begun = threading.Event(), False
        self._loop, self._own = asyncio.get_running_loop(), getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *arguments: self._called(*arguments))

    def open(self) -> None:
        """Let it go on."""
        self._opened.set()

    def _called(self, *arguments: Any) -> Any:
        first, self._begun = not self._begun, True
        if first:
            self._loop.call_soon_threadsafe(self.reached.set)
            assert self._opened.wait(10)
        return self._own(*arguments)


async def turns() -> None:
    """The event loop, which both ends of all connections here share, has nothing left to read or to write."""
    for _ in range(1000):
        await asyncio.sleep(0)


# Where an update goes on.


@pytest.mark.parametrize("half", [300_000, 599_000])
async def test_a_rest_is_taken_where_the_update_broke_off_and_nowhere_else(tmp_path: Path, half: int) -> None:
    """Whatever the request says beside it; what is there stays as it is, and in the end each number is in its place."""
    async with selector(tmp_path) as there:
        (one,) = await there.selected("org")
        whole = update(1.0)
        for offset in (1, half):
            answer = await one.patch(offset, whole[offset:])
            assert (answer.status, answer.code, answer.offset) == (409, "offset_mismatch", 0)
        await one.breaks_off(whole, half)
        for offset in (0, half - 1, half + 1):
            for rest, length in ((whole[offset:], len(whole)), (whole[half:], len(whole) + 1)):
                answer = await one.patch(offset, rest, **{WHOLE: length})
                assert (answer.status, answer.code, answer.offset) == (409, "offset_mismatch", half), offset
        assert (await one.ask("HEAD")).offset == half
        part = await one.patch(half, whole[half : half + 50], **{WHOLE: len(whole)})
        assert (part.status, part.offset) == (204, half + 50)
        answer = await one.patch(half, whole[half:])
        assert (answer.status, answer.offset) == (409, half + 50)
        assert (await one.patch(half + 50, whole[half + 50 :])).status == 200
        accepted, total = await there.coordinator.collected()
    assert accepted == ["org"] and np.array_equal(total, numbers(whole))


async def test_an_update_that_begins_anew_has_nothing_of_the_one_before(tmp_path: Path) -> None:
    """Its client may have made another one meanwhile; also where that breaks off, too."""
    async with selector(tmp_path) as there:
        (one,) = await there.selected("org")
        whole = update(2.0)
        await one.breaks_off(update(1.0), 300_000)
        await one.breaks_off(whole, 1000)
        assert (await one.patch(1000, whole[1000:])).status == 200
        _, total = await there.coordinator.collected()
    assert np.array_equal(total, numbers(whole))


# A client that goes away.


@pytest.mark.parametrize(("owner", "name"), [(aggregation, "layout_in"), (WeightedSum, "add")], ids=["check", "add"])
async def test_an_update_that_is_here_is_counted_though_its_client_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    """Wholly, and once. Nothing comes into its place as long as somebody reads it there."""
    monkeypatch.setattr(uploads, "_MOMENT", 0.05)
    monkeypatch.setattr(uploads, "_PARTING", 0.05)
    async with selector(tmp_path) as there:
        one, other = await there.selected("one", "other")
        gate = Gate(monkeypatch, owner, name)
        line = await one.line("POST", Content_Length=len(update(1.0)))
        line.send(update(1.0))
        await asyncio.wait_for(gate.reached.wait(), 10)
        line.break_off()
        await asyncio.wait_for(there.cancelled.wait(), 10)
        sent = asyncio.create_task(other.ask("POST", update(5.0)))
        await turns()
        assert (await one.ask("HEAD")).status == 409
        assert (await one.ask("POST", update(9.0))).code == "already_reported"
        gate.open()
        assert (await sent).status == 200
        await there.coordinator.hears(lambda told: told.held is not None and told.held.reported == 2)
        accepted, total = await there.coordinator.collected()
    assert accepted == ["one", "other"]
    assert np.array_equal(total, numbers(update(1.0)) + numbers(update(5.0)))


async def test_who_sends_an_update_anew_does_not_break_off_one_that_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is added nothing comes on its connection, which is not dead for that: it is to hear the answer."""
    monkeypatch.setattr(uploads, "_MOMENT", 0.05)
    monkeypatch.setattr(uploads, "_PARTING", 0.05)
    async with selector(tmp_path) as there:
        (one,) = await there.selected("org")
        gate = Gate(monkeypatch, WeightedSum, "add")
        first = asyncio.create_task(one.ask("POST", update(1.0)))
        await asyncio.wait_for(gate.reached.wait(), 10)
        assert (await one.ask("POST", update(9.0))).code == "already_reported"
        gate.open()
        assert (await first).status == 200
        _, total = await there.coordinator.collected()
    assert np.array_equal(total, numbers(update(1.0)))


async def test_a_part_that_is_here_is_kept_though_its_client_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing comes into its place as long as it is not on the disk."""
    async with selector(tmp_path) as there:
        one, other = await there.selected("one", "other")
        gate, whole, part = Gate(monkeypatch, Spooled, "copy"), update(1.0), 300_000
        line = await one.line("PATCH", **{"Content-Length": part, OFFSET: 0, WHOLE: len(whole)})
        line.send(whole[:part])
        await asyncio.wait_for(gate.reached.wait(), 10)
        line.break_off()
        await asyncio.wait_for(there.cancelled.wait(), 10)
        assert (await other.ask("POST", update(5.0))).status == 200
        gate.open()
        assert (await one.ask("HEAD")).offset == part
        assert (await one.patch(part, whole[part:])).status == 200
        accepted, total = await there.coordinator.collected()
    assert accepted == ["one", "other"]
    assert np.array_equal(total, numbers(whole) + numbers(update(5.0)))


# What is not read.


@pytest.mark.parametrize("headers", [{"Content-Length": 10**9}, {"Transfer-Encoding": "chunked"}])
async def test_a_check_in_with_a_body_is_refused_at_once(tmp_path: Path, headers: dict[str, Any]) -> None:
    """Not a byte of it is waited for: it would be held as long as its client."""
    async with selector(tmp_path) as there:
        line = await there.client("org").line("POST", CHECK_IN, **headers)
        answer = await line.answer()
        assert (answer.status, answer.code, answer.headers["connection"]) == (413, "too_large", "close")
        assert there.requests[-1].content.total_bytes == 0


@pytest.mark.parametrize(("headers", "most"), [({"Expect": "100-continue"}, 0), ({}, AHEAD)], ids=["asked", "unasked"])
async def test_of_an_update_that_waits_for_its_turn_little_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, headers: dict[str, Any], most: int
) -> None:
    """Of who said it would wait to be asked, and sends it all the same, nothing. In its turn all of it is taken."""
    monkeypatch.setattr(reporting, "MOST_UPLOADS", 1)
    count = 1_500_000
    async with selector(tmp_path, count=count) as there:
        first, late = await there.selected("first", "late")
        whole = update(1.0, count)
        before = await first.line("POST", Content_Length=len(whole), Expect="100-continue")
        await before.invited()
        line = await late.line("POST", **{"Content-Length": len(whole), **headers})
        await turns()
        line.send(whole)
        await turns()
        waiting = there.requests[-1]
        assert waiting.headers[TICKET] == late.headers[TICKET]
        assert (0 if not most else 1) <= waiting.content.total_bytes <= most < len(whole)
        before.break_off()
        if headers:
            await line.invited()
        assert (await line.answer()).status == 200
        accepted, total = await there.coordinator.collected()
    assert accepted == ["late"] and np.array_equal(total, numbers(whole))


def chunked(body: bytes) -> bytes:
    """It, in one chunk."""
    return f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"


PACKED: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "deflate": zlib.compress}


@pytest.mark.parametrize("way", PACKED)
@pytest.mark.parametrize("length", [True, False])
async def test_an_update_that_is_packed_is_not_unpacked(tmp_path: Path, way: str, length: bool) -> None:
    """It is refused by its headers; 20 KB may be 20 MB, and the event loop would do nothing else meanwhile."""
    async with selector(tmp_path) as there:
        (one,) = await there.selected("org")
        bomb = PACKED[way](bytes(20_000_000))
        framing = {"Content-Length": len(bomb)} if length else {"Transfer-Encoding": "chunked"}
        for method in ("POST", "PATCH"):
            line = await one.line(method, **{"Content-Encoding": way, OFFSET: 0, **framing})
            line.send(bomb if length else chunked(bomb))
            answer = await line.answer()
            assert (answer.status, answer.code) == (415, "unsupported_encoding")
            await turns()
            assert there.requests[-1].content.total_bytes <= len(bomb)
        assert (await one.ask("POST", update(1.0))).status == 200


# Who fetches the model.


async def test_one_organization_does_not_keep_others_from_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By TLS only so many fetch it at once: however many slow ones it has, something is left for who has none."""
    monkeypatch.setattr(sending, "_THROUGH_TLS", Portions(8))
    async with selector(tmp_path, count=5_000_000, tls=True) as there:
        await there.selected("first")  # it has the model by then
        path = MODELS.format(sha256=there.coordinator.model.sha256)
        slow = [await there.client("greedy").line("GET", path) for _ in range(8)]
        heads = [await asyncio.wait_for(line.reader.readuntil(b"\r\n\r\n"), 10) for line in slow]
        assert sorted(head.split()[1] for head in heads) == [b"200"] * 6 + [b"503"] * 2
        assert all(b"Retry-After" in head for head in heads if b" 503 " in head)
        other = await there.client("other").line("GET", path)
        assert b" 200 " in await asyncio.wait_for(other.reader.readline(), 10)
        for line in (*slow, other):
            line.break_off()
