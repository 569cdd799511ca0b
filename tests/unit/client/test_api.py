"""The client of the gateway's REST interface, before a server that misbehaves as real ones do."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from fedota.client import api as module
from fedota.client.api import Api, LocalFile
from fedota.errors import FedotaError, problem_json
from fedota.events import Event, encode, to_json, uuid7
from fedota.events.problems import ProblemStopped
from fedota.local.demo.story import _events
from fedota.process import serving

MODEL = b"weights" * 1000
SHA256 = hashlib.sha256(MODEL).hexdigest()
Answer = Callable[[web.Request], Any]


class Server:
    """Gateway and object store in one: each request gets the next of the answers, the last one again and again."""

    def __init__(self, *answers: Answer) -> None:
        self._answers = list(answers)
        self.requests: list[tuple[str, str, bytes]] = []  # method and path, idempotency key, body
        self.url = ""

    @property
    def keys(self) -> list[str]:
        """The idempotency keys that were sent."""
        return [key for _, key, _ in self.requests]

    async def handle(self, request: web.Request) -> Any:
        """Note the request and answer it."""
        key = request.headers.get("Idempotency-Key", "")
        self.requests.append((f"{request.method} {request.path}", key, await request.read()))
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        result = answer(request)
        return result if isinstance(result, web.StreamResponse) else await result

    @classmethod
    @asynccontextmanager
    async def of(cls, *answers: Answer) -> AsyncIterator["Server"]:
        """A server that listens."""
        server, app = cls(*answers), web.Application()
        app.router.add_route("*", "/{path:.*}", server.handle)
        async with serving(app, "127.0.0.1", 0, handler_cancellation=True) as server.url:
            yield server


def good(_: web.Request) -> web.Response:
    """What the gateway says to a write."""
    return web.json_response({"position": 7}, headers={"Fedota-Position": "7"})


def refused(code: str, **headers: str) -> Answer:
    """A gateway's error."""
    body = problem_json(FedotaError(code, "Said by the gateway.").problem)
    status: int = body["status"]
    return lambda _: web.Response(
        status=status, body=to_json(body), content_type="application/problem+json", headers=headers
    )


def strange(status: int) -> Answer:
    """A page of something that is no gateway."""
    return lambda _: web.Response(status=status, text="<html>", content_type="text/html")


async def broken(request: web.Request) -> web.Response:
    """The connection breaks before an answer."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def silent(_: web.Request) -> web.Response:
    """Never an answer."""
    await asyncio.Event().wait()
    raise AssertionError


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_DELAY", 0.01)


@pytest.mark.parametrize(
    "trouble", [broken, refused("unavailable"), refused("timeout"), strange(502)], ids=["broken", "503", "504", "proxy"]
)
async def test_a_write_is_repeated_with_the_same_key(trouble: Answer) -> None:
    """So it takes effect once, whether or not the first one did."""
    async with Server.of(trouble, trouble, good) as server, Api.open(server.url, "token") as api:
        await api.stop("p", "enough")
        await api.stop("p", "enough")
    first, second, third, other = server.requests
    assert first == second == third and first[1]
    assert other[1] != first[1]  # another write is another one


@pytest.mark.parametrize("trouble", [broken, refused("unavailable"), refused("timeout")], ids=["broken", "503", "504"])
async def test_a_read_is_repeated(trouble: Answer) -> None:
    """More often than aiohttp does by itself, which is once."""
    async with Server.of(*[trouble] * 3, good) as server, Api.open(server.url, "token") as api:
        assert (await api.problem("p"))["position"] == 7
    assert len(server.requests) == 4


@pytest.mark.parametrize("code", ["problem_state", "internal_error", "forbidden"])
async def test_what_another_try_would_not_change_is_not_repeated(code: str) -> None:
    """The gateway's own words come at once."""
    async with Server.of(refused(code)) as server, Api.open(server.url, "token") as api:
        with pytest.raises(FedotaError, match=f"{code}: Said by the gateway"):
            await api.start("p")
    assert len(server.requests) == 1


async def test_the_server_says_when_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Retry-After` is the least; nobody is waited for longer than patience lasts."""
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def noted(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(0)

    busy = refused("unavailable", **{"Retry-After": "30"})
    async with Server.of(busy, good) as server, Api.open(server.url, "token") as api:
        monkeypatch.setattr(asyncio, "sleep", noted)
        await api.start("p")
        monkeypatch.undo()
    assert [30 <= pause <= 45 for pause in pauses] == [True]
    async with Server.of(busy) as server, Api.open(server.url, "token", patience=20) as api:
        with pytest.raises(FedotaError) as raised:
            await api.start("p")
    assert (raised.value.problem.retry_after, len(server.requests)) == (30, 1)


async def test_the_last_error_is_raised_when_patience_ends() -> None:
    """After several tries."""
    async with Server.of(broken, refused("unavailable")) as server, Api.open(server.url, "token", patience=0.3) as api:
        with pytest.raises(FedotaError, match="Said by the gateway"):
            await api.start("p")
    assert len(server.requests) > 2 and len(set(server.keys)) == 1


@pytest.mark.parametrize(
    ("url", "code"),
    [("http://127.0.0.1:9", "unavailable"), ("localhost:8080", "invalid_request"), ("http://", "invalid_request")],
)
async def test_an_address_where_nobody_is(url: str, code: str) -> None:
    """Is named in the error."""
    async with Api.open(url, "token", patience=0) as api:
        with pytest.raises(FedotaError, match=url.rstrip("/")) as raised:
            await api.problem("p")
    assert raised.value.problem.code == code


async def test_a_gateway_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Is given up after a while."""
    monkeypatch.setattr(module, "_REQUEST", aiohttp.ClientTimeout(total=0.1))
    async with Server.of(silent) as server, Api.open(server.url, "token", patience=0) as api:
        with pytest.raises(FedotaError, match=f"unavailable: {server.url} does not answer"):
            await api.problem("p")


@pytest.mark.parametrize(("status", "code"), [(200, "invalid_request"), (404, "invalid_request"), (503, "unavailable")])
async def test_what_is_no_gateway_is_called_so(status: int, code: str) -> None:
    """Only what looks like a proxy without its gateway is `unavailable`."""
    async with Server.of(strange(status)) as server, Api.open(server.url, "token", patience=0) as api:
        with pytest.raises(FedotaError, match="not as a gateway does") as raised:
            await api.problem("p")
    assert raised.value.problem.code == code


def test_files_and_streams_may_take_hours() -> None:
    """As long as something comes."""
    assert (module._LONG.total, module._LONG.sock_connect, module._LONG.sock_read) == (None, 30, 60)


async def test_a_slow_file_is_not_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What holds for requests does not hold for the object store, nor for streams; silence is cut off there."""
    monkeypatch.setattr(aiohttp.client, "DEFAULT_TIMEOUT", aiohttp.ClientTimeout(total=0.2))
    monkeypatch.setattr(module, "_REQUEST", aiohttp.ClientTimeout(total=5))

    async def slow(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(len(MODEL))})
        await response.prepare(request)
        for start in range(0, len(MODEL), 1000):
            await response.write(MODEL[start : start + 1000])
            await asyncio.sleep(0.1)
        return response

    async with Server.of(linked(), slow) as server, Api.open(server.url, "token") as api:
        await api.download_model("p", tmp_path / "model")
    assert (tmp_path / "model").read_bytes() == MODEL

    async def digesting(request: web.Request) -> web.Response:
        await asyncio.sleep(0.5)
        return good(request)

    async with Server.of(slot(), digesting, good) as server, Api.open(server.url, "token") as api:
        await api.upload("p", [LocalFile(tmp_path / "model", "model")])
    monkeypatch.setattr(module, "_LONG", aiohttp.ClientTimeout(total=None, sock_read=0.1))
    async with Server.of(linked(), silent) as server, Api.open(server.url, "token") as api:
        with pytest.raises(FedotaError, match=r"unavailable: The object store at 127\.0\.0\.1"):
            await api.download_model("p", tmp_path / "model")


def linked(size: int = len(MODEL), sha256: str = SHA256) -> Answer:
    """The gateway's answer to who asks for the model; the link leads back to the same server."""
    return lambda request: web.json_response(
        {
            "url": f"http://{request.host}/store?X-Amz-Signature=secret",
            "seconds": 900,
            "run": 1,
            "round": 2,
            "key": "k",
            "sha256": sha256,
            "size": size,
        }
    )


def bytes_of(content: bytes) -> Answer:
    """The object store gives these."""
    return lambda _: web.Response(body=content)


async def torn(request: web.Request) -> web.StreamResponse:
    """The connection breaks in the middle of the model."""
    response = web.StreamResponse(headers={"Content-Length": str(len(MODEL))})
    await response.prepare(request)
    await response.write(MODEL[:3000])
    return await broken(request)


async def endless(request: web.Request) -> web.StreamResponse:
    """The object store gives more and more."""
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(MODEL)


@pytest.mark.parametrize(
    ("store", "code", "said"),
    [
        (bytes_of(MODEL[:-1]), "file_rejected", "another model than the recorded one"),
        (bytes_of(MODEL + b"0"), "file_rejected", "another model than the recorded one"),
        (endless, "file_rejected", "another model than the recorded one"),
        (bytes_of(MODEL[::-1]), "file_rejected", "another model than the recorded one"),
        (strange(403), "unavailable", r"did not give the model \(403\)"),
        (torn, "unavailable", "does not answer"),
    ],
    ids=["short", "long", "endless", "other", "refused", "torn"],
)
async def test_a_model_that_is_not_whole_is_not_kept(tmp_path: Path, store: Answer, code: str, said: str) -> None:
    """The file stays as it was, and nothing lies beside it; the signed link is told to nobody."""
    path = tmp_path / "model"
    path.write_bytes(b"older")
    async with Server.of(linked(), store) as server, Api.open(server.url, "token") as api:
        with pytest.raises(FedotaError, match=said) as raised:
            await api.download_model("p", path)
    assert raised.value.problem.code == code and "secret" not in str(raised.value)
    assert (list(tmp_path.iterdir()), path.read_bytes()) == ([path], b"older")


async def test_a_model_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    """And nothing lies beside it."""
    path = tmp_path / "model"
    path.write_bytes(b"older")
    async with Server.of(linked(), bytes_of(MODEL)) as server, Api.open(server.url, "token") as api:
        await api.download_model("p", path)
    assert (list(tmp_path.iterdir()), path.read_bytes()) == ([path], MODEL)


def slot(change: Path | None = None) -> Answer:
    """The gateway's answer to an announcement; the setter's file changes right then."""

    def answer(request: web.Request) -> web.Response:
        if change:
            change.write_bytes(b"other")
        url = f"http://{request.host}/store?X-Amz-Signature=secret"
        return web.json_response({"slots": [{"name": "model", "url": url, "headers": {}}], "seconds": 900})

    return answer


@pytest.mark.parametrize(
    ("status", "changed", "code", "said"),
    [
        (400, True, "file_rejected", "changed while it was uploaded. Let nothing write to it, and upload it again"),
        (403, False, "file_rejected", r"refused model \(403\). Its upload slot may have expired: upload it again"),
        (500, False, "unavailable", "answered 500. Upload model again"),
    ],
)
async def test_an_upload_that_is_refused_says_what_to_do(
    tmp_path: Path, status: int, changed: bool, code: str, said: str
) -> None:
    """The file's change is found out afterwards: the store's answers do not tell."""
    path = tmp_path / "model"
    path.write_bytes(MODEL)
    answers = slot(path if changed else None), strange(status)
    async with Server.of(*answers) as server, Api.open(server.url, "token") as api:
        with pytest.raises(FedotaError, match=said) as raised:
            await api.upload("p", [LocalFile(path, "model")])
    assert raised.value.problem.code == code and "secret" not in str(raised.value)


@pytest.mark.parametrize("status", [200, 412])
async def test_an_upload_sends_the_file(tmp_path: Path, status: int) -> None:
    """412: the same bytes were there already."""
    path = tmp_path / "model"
    path.write_bytes(MODEL)
    async with Server.of(slot(), strange(status), good) as server, Api.open(server.url, "token") as api:
        await api.upload("p", [LocalFile(path, "model")])
    asked = ["POST /api/problems/p/uploads", "PUT /store", "POST /api/problems/p/files"]
    assert [request for request, _, _ in server.requests] == asked
    assert server.requests[1][2] == MODEL


def told(*positions: int, reason: str = "", end: Answer | None = None) -> Answer:
    """A stream with events at these positions, and how it ends once they were heard."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for position in positions:
            await response.write(b"data: " + event(position, reason) + b"\n\n")
        if end is None:
            return response
        ended: web.StreamResponse = await end(request)
        return ended

    return answer


def event(position: int, reason: str) -> bytes:
    """An event as the gateway tells it."""
    record = {
        "id": uuid7(),
        "position": position,
        "type": "ProblemStopped",
        "schema": 1,
        "subject": "problems/p",
        "version": position,
        "time": datetime.now(UTC),
        "actor": "setter",
        "correlation": uuid7(),
        "causation": None,
        "traceparent": None,
        "data": to_json(ProblemStopped(problem_id="p", run=1, reason=reason)),
    }
    return encode(record)


class Listener:
    """Somebody who follows a stream and notes what comes."""

    def __init__(self) -> None:
        self.positions: list[int] = []
        self._second = asyncio.Event()

    async def listen(self, events: AsyncGenerator[Event, None]) -> None:
        """Until it ends or raises."""
        async with aclosing(events):
            async for event in events:
                self.positions.append(event.position)
                if event.position == 2:
                    self._second.set()

    async def break_off(self, request: web.Request) -> web.StreamResponse:
        """End a stream's connection once the second event was heard: what is still under way would be lost with it."""
        await self._second.wait()
        return await broken(request)


async def test_a_stream_that_breaks_raises() -> None:
    """At once: whoever follows knows where to go on."""
    listener = Listener()
    answer = told(1, 2, end=listener.break_off)
    async with Server.of(answer) as server, Api.open(server.url, "token") as api:
        with pytest.raises(FedotaError, match=f"unavailable: {server.url} does not answer"):
            await listener.listen(api.follow("p"))
    assert listener.positions == [1, 2]


@pytest.mark.parametrize(("answer", "code"), [(broken, "unavailable"), (refused("forbidden"), "forbidden")])
async def test_a_stream_that_never_began_raises(answer: Answer, code: str) -> None:
    """In the gateway's words where it had some."""
    async with Server.of(answer) as server, Api.open(server.url, "token") as api:
        with pytest.raises(FedotaError) as raised:
            await Listener().listen(api.follow("p"))
    assert raised.value.problem.code == code


async def test_a_stream_carries_events_of_any_size() -> None:
    """One event is one line, however long."""
    reason = "x" * 3_000_000
    async with Server.of(told(1, reason=reason)) as server, Api.open(server.url, "token") as api:
        heard = [event.data async for event in api.follow("p")]
    assert heard == [ProblemStopped(problem_id="p", run=1, reason=reason)]


async def test_the_demo_goes_on_where_its_stream_broke() -> None:
    """Each event comes once; a refusal ends it."""
    asked: list[str] = []

    def noting(answer: Answer) -> Answer:
        def noted(request: web.Request) -> Any:
            asked.append(request.query["after"])
            return answer(request)

        return noted

    listener = Listener()
    answers = [told(1, 2, end=listener.break_off), refused("unavailable"), told(3), refused("forbidden")]
    async with Server.of(*map(noting, answers)) as server, Api.open(server.url, "token") as api:
        with pytest.raises(FedotaError, match="forbidden"):
            await listener.listen(_events(api, "p"))
    assert (listener.positions, asked) == ([1, 2, 3], ["0", "2", "2", "3"])
