"""A training over TLS: large bodies too, which are read past aiohttp; and who is not talked to."""

import asyncio
import io
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec
import numpy as np
import pytest
import safetensors.numpy

from fedota.client import ClientError
from fedota.contracts.kit import Kit
from fedota.events.problems import Plan
from fedota.tls import client_context
from services.orchestrator.launchers.authority import Authority
from tests.integration.runtime.conftest import (
    Component,
    Participant,
    Weights,
    World,
    assert_same,
    expected_after,
    running,
    until,
)


def model() -> Weights:
    """Large enough to be read past aiohttp, in pieces that are no multiple of a TLS record."""
    rng = np.random.default_rng(7)
    return {"large": rng.standard_normal((1999, 1001)).astype(np.float32), "steps": np.array([1], np.int64)}


class Secure:
    """A world whose components have certificates of one authority."""

    def __init__(self, world: World, directory: Path) -> None:
        directory.mkdir()
        self.world = world
        self.directory = directory
        self.authority = Authority.of(directory)

    async def launch(self, plan: Plan, weights: Weights) -> None:
        """Bring everything up."""
        self.world.prepare(plan, weights)
        trusted = {"coordinator_authority": self.authority.pem}
        self._certify(self.world.coordinator, {})
        for selector in self.world.selectors:
            self._certify(selector, trusted)
        await self.world.coordinator.start()
        await asyncio.gather(*(selector.start() for selector in self.world.selectors))

    def _certify(self, component: Component, more: dict[str, Any]) -> None:
        path = self.directory / f"{component.directory.name}.pem"
        path.write_bytes(self.authority.issue(component.directory.name, ["127.0.0.1"]))
        settings: Callable[[int], msgspec.Struct] = component._settings

        def certified(port: int) -> msgspec.Struct:
            return msgspec.structs.replace(settings(port), certificate=str(path), **more)

        component._settings = certified

    def kit(self, organization: str, **changes: Any) -> Kit:
        """A join kit that carries the authority."""
        return msgspec.structs.replace(self.world.kit(organization), **{"authority": self.authority.pem, **changes})


@pytest.fixture
def secure(world: World, tmp_path: Path) -> Secure:
    """Nothing runs yet."""
    return Secure(world, tmp_path / "authority")


async def test_a_training_over_tls(secure: Secure, tmp_path: Path) -> None:
    """Models and updates arrive whole, at the coordinator too; a selector that is killed is found again."""
    world = secure.world
    plan = Plan(rounds=3, goal_count=3, minimum_fraction=1.0, selectors=2, report_timeout=10.0)
    await secure.launch(plan, model())
    assert {urlsplit(component.url).scheme for component in world.components} == {"https"}
    participants = [Participant(number, free=True) for number in (1, 2, 3)]
    async with running(*(one.run(secure.kit(one.organization), tmp_path) for one in participants)):
        await until(lambda: world.platform.completed(1))
        await world.selectors[0].kill()
        await world.selectors[0].start()
        final = await until(lambda: world.platform.final)
    assert_same(world.platform.weights(final), expected_after(model(), 3, *participants))


@pytest.mark.parametrize("stranger", [True, False])
async def test_a_client_trusts_the_authority_of_its_kit_alone(secure: Secure, tmp_path: Path, stranger: bool) -> None:
    """A selector with a certificate of somebody else gets neither token nor update, and the client says why.

    Who checks in first is selected at once: it is somebody who trusts the selector.
    """
    world = secure.world
    await secure.launch(Plan(rounds=1, goal_count=1, selectors=1), {"w": np.zeros(3, np.float32)})
    (tmp_path / "stranger").mkdir()
    authority = Authority.of(tmp_path / "stranger").pem if stranger else ""
    lines: list[str] = []
    one = Participant(1, free=True)
    with pytest.raises(ClientError, match=r"is not good by the join kit.*download the kit again"):
        await _run(one, secure.kit("org 1", authority=authority), tmp_path, lines)
    assert one.rounds == []
    await Participant(2, free=True).run(secure.kit("org 2"), tmp_path)
    final = await until(lambda: world.platform.final)
    assert (final.attempt, final.participants) == (1, ["org 2"])
    assert max(report.selected for report in world.platform.reports) == 1


async def _run(one: Participant, kit: Kit, data: Path, lines: list[str]) -> None:
    one.lines = lines
    await one.run(kit, data, patience=0.5)


def _session(authority: Authority) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=client_context(authority.pem)))


async def test_an_authority_that_is_none_is_told(secure: Secure, tmp_path: Path) -> None:
    """A kit that somebody shortened is not used without its protection."""
    secure.world.prepare(Plan(rounds=1, goal_count=1, selectors=1), {"w": np.zeros(3, np.float32)})
    kit = secure.kit("org 1", authority="-----BEGIN", selectors=["https://127.0.0.1:9"])
    with pytest.raises(ClientError, match="The join kit's authority cannot be used"):
        await Participant(1).run(kit, tmp_path)


@pytest.mark.parametrize("component", ["coordinator", "selector"])
async def test_nobody_speaks_plain_http_past_loopback(world: World, component: str) -> None:
    """A process that would is not started: tokens and models would cross the network in the open."""
    world.prepare(Plan(rounds=1, goal_count=1, selectors=1), {"w": np.zeros(3, np.float32)})
    world.coordinator.url = "http://127.0.0.1:9"
    chosen = world.coordinator if component == "coordinator" else world.selectors[0]
    settings = chosen._settings
    chosen._settings = lambda port: msgspec.structs.replace(settings(port), host="0.0.0.0")
    await chosen.start(wait=False)
    assert await asyncio.wait_for(chosen.process.wait(), 20) == 1
    assert "0.0.0.0 is not of the loopback" in chosen.log()


class Proxy:
    """A hospital's way out: it passes on what is asked for by CONNECT, and notes what it saw of it."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.seen = b""

    @asynccontextmanager
    async def open(self) -> AsyncIterator[str]:
        """Its address."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        async with server:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        verb, target, _ = head.decode().split(" ", 2)
        self.asked.append(f"{verb} {target}")
        host, port = target.rsplit(":", 1)
        there_reader, there_writer = await asyncio.open_connection(host, int(port))
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        await asyncio.gather(self._pass(reader, there_writer), self._pass(there_reader, writer))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while piece := await reader.read(1 << 16):
                self.seen += piece
                writer.write(piece)
                await writer.drain()
        except ConnectionError:
            return
        finally:
            writer.close()


async def test_through_a_proxy(secure: Secure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that the environment names; it sees whom the client talks to, and nothing of what is said."""
    await secure.launch(Plan(rounds=1, goal_count=1, selectors=1), model())
    one, proxy = Participant(1, free=True), Proxy()
    kit = secure.kit("org 1")
    async with proxy.open() as url:
        monkeypatch.setenv("HTTPS_PROXY", url)
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        await one.run(kit, tmp_path)
    assert set(proxy.asked) == {f"CONNECT {urlsplit(kit.selectors[0]).netloc}"}
    assert len(proxy.seen) > 2 * model()["large"].nbytes
    assert b"Bearer" not in proxy.seen and kit.token.encode() not in proxy.seen
    assert_same(secure.world.platform.weights(secure.world.platform.final), expected_after(model(), 1, one))


@pytest.mark.parametrize("abruptly", [True, False])
async def test_a_client_that_goes_away_is_noticed(secure: Secure, abruptly: bool) -> None:
    """Whether it says goodbye, as TLS wants it, or not: who waits no more is not selected."""
    world = secure.world
    await secure.launch(Plan(rounds=1, goal_count=2, selectors=1), {"w": np.zeros(3, np.float32)})
    parts = urlsplit(world.selectors[0].url)
    _, writer = await asyncio.open_connection(parts.hostname, parts.port, ssl=client_context(secure.authority.pem))
    token = world.token("org 1")
    head = f"POST /v1/check-in HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nFedota-Client: c\r\n"
    writer.write(f"{head}Content-Length: 0\r\n\r\n".encode())
    await until(lambda: world.platform.reports[-1].waiting == 1)
    if abruptly:
        writer.transport.abort()
    else:
        writer.close()
    await until(lambda: world.platform.reports[-1].waiting == 0)


@pytest.mark.parametrize("goes_on", [True, False])
async def test_a_connection_that_breaks_in_a_large_update(secure: Secure, goes_on: bool) -> None:
    """The update goes on from where it broke off, or is sent again; the model is had in two pieces as well."""
    world = secure.world
    await secure.launch(Plan(rounds=1, goal_count=1, selectors=1), model())
    body = _body(2.0)
    async with _session(secure.authority) as http:
        headers = {"Authorization": f"Bearer {world.token('org 1')}", "Fedota-Client": "bare"}
        url = world.selectors[0].url
        answer = await (await http.post(f"{url}/v1/check-in", headers=headers)).json(content_type=None)
        await _fetch_in_two_pieces(http, f"{url}/v1/models/{answer['model']['sha256']}", headers)
        headers |= {"Fedota-Ticket": answer["ticket"], "Fedota-Examples": "3"}
        await _cut_off(url, secure.authority, headers, body)
        offset = await _kept(http, url, headers)
        assert offset <= len(body) // 2
        if goes_on:
            headers |= {"Upload-Offset": str(offset)}
        method, rest = ("PATCH", body[offset:]) if goes_on else ("POST", body)
        async with http.request(method, f"{url}/v1/updates", headers=headers, data=io.BytesIO(rest)) as reply:
            assert (reply.status, await reply.json(content_type=None)) == (200, {"round": 1, "attempt": 1})
    final = await until(lambda: world.platform.final)
    assert final.examples == 3
    assert (world.platform.weights(final)["large"] == 2.0).all()


async def _fetch_in_two_pieces(http: aiohttp.ClientSession, url: str, headers: dict[str, str]) -> None:
    """And compare them with the model."""
    whole = safetensors.numpy.save(model())
    pieces = []
    for wanted in (f"bytes=0-{len(whole) // 2 - 1}", f"bytes={len(whole) // 2}-"):
        async with http.get(url, headers={**headers, "Range": wanted}) as reply:
            assert reply.status == 206
            pieces.append(await reply.read())
    assert b"".join(pieces) == whole


async def _kept(http: aiohttp.ClientSession, url: str, headers: dict[str, str]) -> int:
    """How much of an update that broke off is there, once the selector has noticed that it came, and that it ended."""
    async with asyncio.timeout(20):
        while True:
            async with http.head(f"{url}/v1/updates", headers=headers) as reply:
                if reply.status == 204 and (offset := int(reply.headers["Upload-Offset"])):
                    return offset


def _body(value: float) -> bytes:
    return safetensors.numpy.save({name: np.full_like(values, value) for name, values in model().items()})


async def _cut_off(url: str, authority: Authority, headers: dict[str, str], body: bytes) -> None:
    """Send half of an update, and be gone without a word."""
    parts = urlsplit(url)
    context: ssl.SSLContext = client_context(authority.pem)
    _, writer = await asyncio.open_connection(parts.hostname, parts.port, ssl=context)
    lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
    head = f"POST /v1/updates HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{''.join(lines)}\r\n"
    writer.write(head.encode() + body[: len(body) // 2])
    await writer.drain()
    writer.transport.abort()
