"""The runtime's protocol as docs/protocol.md tells it, spoken by `speaker.py`, which knows nothing else of Fedota."""

import asyncio
import hashlib
import json
import re
import select
import struct
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from socket import MSG_PEEK, MSG_WAITALL
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import pytest

from fedota.contracts.kit import Kit
from fedota.events import to_json
from fedota.events.problems import Plan
from fedota.runtime.protocol import CheckedIn, Claim, Meta, Orders, Told
from tests.contract.speaker import Answer, Client, Speaker, Work, pack, plus, unpack, work
from tests.integration.runtime.conftest import (
    Component,
    Participant,
    Weights,
    World,
    assert_same,
    expected_after,
    until,
)
from tests.integration.runtime.test_tls import Secure

DOCUMENT: Final = Path(__file__).parents[2] / "docs" / "protocol.md"
SPEAKER: Final = Path(__file__).with_name("speaker.py")


def model() -> Weights:
    """Several types, and large enough for a line to break in the middle of it."""
    return {
        "large": np.linspace(-1, 1, 200_000, dtype=np.float32).reshape(400, 500),
        "fine": np.arange(6, dtype=np.float64),
        "steps": np.array([3, 4], np.int64),
    }


def plan(**changes: Any) -> Plan:
    """Two clients a round, both needed, at one selector."""
    usual: dict[str, Any] = {"rounds": 1, "goal_count": 2, "minimum_fraction": 1.0, "selectors": 1}
    return Plan(**{**usual, **changes})


# A whole run.


@pytest.mark.parametrize("tls", [False, True])
async def test_a_whole_run_without_any_code_of_ours(world: World, tmp_path: Path, tls: bool) -> None:
    """Three programs of one file, for which no package can be imported; one has a line that always breaks."""
    plan_ = plan(rounds=3, goal_count=3, selectors=2)
    if tls:
        secure = Secure(world, tmp_path / "authority")
        await secure.launch(plan_, model())
    else:
        await world.launch(plan_, model())
    kits = [secure.kit(f"org {number}") if tls else world.kit(f"org {number}") for number in (1, 2, 3)]
    programs = [
        _program(kit, tmp_path, number, *(["--breaking"] if number == 3 else [])) for number, kit in enumerate(kits, 1)
    ]
    logs = await asyncio.wait_for(asyncio.gather(*programs), 120)
    final = await until(lambda: world.platform.final)
    clients = [Participant(number) for number in (1, 2, 3)]
    assert_same(world.platform.weights(final), expected_after(world.model, 3, *clients))
    assert final.metrics == pytest.approx({"loss": 3 / 6})
    for log in logs:
        assert [one for one in log if "fate" in one] == [{"round": number, "fate": "counted"} for number in (1, 2, 3)]
        assert [one["answer"] for one in log if "answer" in one] == [200, 200, 200]
        assert log[-1] == {"finished": "The training is finished."}
    assert [len([one for one in log if one.get("resumed")]) for log in logs] == [0, 0, 3]


async def _program(kit: Kit, directory: Path, number: int, *options: str) -> list[dict[str, Any]]:
    """One run of the file, from start to end."""
    path = directory / f"kit-{number}.json"
    path.write_bytes(to_json(kit))
    arguments = ["-I", "-S", str(SPEAKER), str(path), str(number), *options]
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=asyncio.subprocess.PIPE)
    try:
        out, _ = await process.communicate()
    finally:
        if process.returncode is None:  # nobody is left behind by a test that fails
            process.kill()
    assert process.returncode == 0
    log: list[dict[str, Any]] = json.loads(out)
    return log


# Clients, step by step.


def client(world: World, number: int, selector: Component | None = None) -> Client:
    """A client of an organization of its own."""
    home = selector or world.selectors[0]
    return Client(home.url, world.token(f"org {number}"), f"client-{number}")


async def in_threads(*calls: Callable[[], Any]) -> list[Any]:
    """What they give; they wait for the network, and the test's loop plays the platform meanwhile."""
    return await asyncio.gather(*(asyncio.to_thread(call) for call in calls))


async def do(call: Callable[..., Any], *arguments: Any) -> Any:
    """What it gives, likewise."""
    return await asyncio.to_thread(call, *arguments)


@asynccontextmanager
async def selected(
    world: World, plan_: Plan | None = None, homes: tuple[int, ...] = (0, 0)
) -> AsyncIterator[tuple[list[Client], list[Work]]]:
    """A client for each of `homes`, selected there, with an update that it may send."""
    await world.launch(plan_ or plan(), model())
    async with chosen(world, homes) as found:
        yield found


@asynccontextmanager
async def chosen(world: World, homes: tuple[int, ...]) -> AsyncIterator[tuple[list[Client], list[Work]]]:
    """The same, where everything runs already."""
    clients = [client(world, number, world.selectors[home]) for number, home in enumerate(homes, 1)]
    told = await in_threads(*(one.check_in for one in clients))
    assert [one["status"] for one in told] == ["selected"] * len(homes)
    base = unpack(await do(clients[0].fetch, told[0]["model"]))
    yield (
        clients,
        [work(one["ticket"], one["round"], pack(plus(base, number)), number, {}) for number, one in enumerate(told, 1)],
    )


async def test_what_a_check_in_says(world: World) -> None:
    """Each answer has just the fields that the document shows."""
    shown = {one["status"]: one.keys() for one in examples("POST /v1/check-in")}
    assert shown.keys() == {"selected", "come_back", "send_again", "finished"}
    async with selected(world) as (clients, updates):
        one, other = clients
        again = await do(one.check_in)
        assert (again["ticket"], again["status"]) == (updates[0].ticket, "selected")
        assert again.keys() == shown["selected"] and again["update"] == "none"
        assert again["model"].keys() == {"sha256", "size"} and 0 < again["seconds"] <= plan().report_timeout
        lost = await do(one.check_in, updates[0].ticket)
        assert lost == {"status": "send_again"}
        assert (await do(one.send, updates[0])).json == {"round": 1, "attempt": 1}
        held = one.http.begin("POST", "/v1/check-in", {"Fedota-Ticket": updates[0].ticket})
        assert (await do(other.send, updates[1])).status == 200
        finished = (await do(one.http.end, held)).json
        assert finished == {"status": "finished", "reason": "The training is finished.", "update": "counted"}
        assert shown["finished"] == finished.keys()


async def test_a_model_by_ranges(world: World) -> None:
    """As RFC 9110 has them, from a selector and from the coordinator."""
    async with selected(world) as (clients, updates):
        one = clients[0].http
        path = f"/v1/models/{world.digest}"
        coordinator = Speaker(world.coordinator.url, {"Authorization": "Bearer a shared secret"})
        for server in (one, coordinator):
            await do(ranges, server, path)
        for client_, update in zip(clients, updates, strict=True):
            assert (await do(client_.send, update)).status == 200
        await until(lambda: world.platform.final)


def ranges(server: Speaker, path: str) -> None:
    """Every kind of range of one model."""
    whole = server.ask("GET", path)
    size, tag = len(whole.body), f'"{path.rpartition("/")[2]}"'
    assert (whole.status, whole.headers["Accept-Ranges"], whole.headers["ETag"]) == (200, "bytes", tag)
    wanted = {
        "bytes=0-": (0, size),
        "bytes=100-": (100, size),
        "bytes=100-199": (100, 200),
        "bytes=0-0": (0, 1),
        f"bytes=5-{10 * size}": (5, size),
        f"bytes={size - 1}-": (size - 1, size),
        "bytes=-7": (size - 7, size),
        "bytes=300000-700000": (300_000, 700_001),
    }
    for asked, (start, stop) in wanted.items():
        part = server.ask("GET", path, {"Range": asked})
        assert (part.status, part.headers["ETag"]) == (206, tag), asked
        assert part.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{size}"
        assert part.body == whole.body[start:stop]
    behind = server.ask("GET", path, {"Range": f"bytes={size}-"})
    assert (behind.status, behind.headers["Content-Range"]) == (416, f"bytes */{size}")
    for ignored in ("bytes=0-1,5-9", "lines=1-2", "bytes=nonsense"):
        assert server.ask("GET", path, {"Range": ignored}).body == whole.body, ignored


async def test_an_update_whose_line_breaks_goes_on(world: World) -> None:
    """Again and again, in pieces of any size, with wrong beginnings in between: it counts once, and whole."""
    async with selected(world) as (clients, updates):
        (one, other), (first, second) = clients, updates
        head = {"Fedota-Ticket": first.ticket}
        size = len(first.body)
        nothing = await do(one.http.ask, "HEAD", "/v1/updates", head)
        assert (nothing.status, nothing.headers["Upload-Offset"], nothing.body) == (204, "0", b"")
        await do(one.http.break_off, "POST", "/v1/updates", first.headers, size, first.body[:500_000])
        have = await do(kept, one, first)
        assert have <= 500_000
        for wrong in (0, have - 1, have + 1, size):
            answer = await do(
                one.http.ask, "PATCH", "/v1/updates", {**first.headers, "Upload-Offset": str(wrong)}, b"x"
            )
            assert (answer.status, answer.code, answer.headers["Upload-Offset"]) == (409, "offset_mismatch", str(have))
        part = {**first.headers, "Upload-Offset": str(have), "Upload-Length": str(size)}
        said = await do(one.http.ask, "PATCH", "/v1/updates", part, first.body[have : have + 1000])
        assert (said.status, said.headers["Upload-Offset"], said.body) == (204, str(have + 1000), b"")
        part["Upload-Offset"] = str(have + 1000)
        rest = first.body[have + 1000 :]
        await do(one.http.break_off, "PATCH", "/v1/updates", part, len(rest), rest[:10_000])
        have = await do(kept, one, first)
        without_length = {**first.headers, "Upload-Offset": str(have)}
        assert (await do(one.http.ask, "PATCH", "/v1/updates", without_length, first.body[have:])).json == {
            "round": 1,
            "attempt": 1,
        }
        assert (await do(one.http.ask, "HEAD", "/v1/updates", head)).status == 409
        assert (await do(other.send, second)).status == 200
        final = await until(lambda: world.platform.final)
        assert_same(world.platform.weights(final), expected_after(world.model, 1, Participant(1), Participant(2)))
        assert (final.reported, final.examples, final.refusals) == (2, 3, [])


def told_at_last(one: Client, ticket: str) -> dict[str, Any]:
    """What comes of checking in again for as long as it is asked for: who was just started may not know yet."""
    while (told := one.check_in(ticket))["status"] == "come_back":
        assert told["update"] in ("pending", "counted", "over")
    return told


@pytest.mark.parametrize("forgotten", [False, True])
async def test_an_update_counts_whoever_is_asked(world: World, forgotten: bool) -> None:
    """A selector asks for what it does not know: of its life before, of others' sums. The coordinator may forget."""
    async with selected(world, plan(rounds=2, selectors=2), (0, 1)) as (clients, updates):
        for one, update in zip(clients, updates, strict=True):
            assert (await do(one.send, update)).status == 200
        await until(lambda: world.platform.completed())
        restarted = world.selectors[0]
        for component in (restarted, *([world.coordinator] if forgotten else [])):
            await component.kill()
            await component.start()
        tickets = [update.ticket for update in updates]
        again = [partial(told_at_last, client(world, number, restarted), one) for number, one in enumerate(tickets, 1)]
        told = await in_threads(*again)
        assert [(one["status"], one["round"]) for one in told] == [("selected", 2)] * 2
        fates = [(one["update"], one.get("known")) for one in told]
        assert fates == [("over", False) if forgotten else ("counted", None)] * 2


async def test_what_is_sent_to_the_wrong_selector_says_where_to_send_it(world: World) -> None:
    """To send it there again would be in vain for the whole round."""
    async with selected(world, plan(selectors=2), (0, 1)) as (clients, updates):
        one, other = clients
        elsewhere = client(world, 1, world.selectors[1])
        answer = await do(elsewhere.send, updates[0])
        assert (answer.status, answer.code) == (503, "unavailable")
        assert answer.json["detail"].startswith("Send the update to the selector that gave you its ticket.")
        assert (await do(one.send, updates[0])).status == 200
        again = await do(elsewhere.send, updates[0])
        assert again.status == 503
        assert (await do(other.send, updates[1])).status == 200
        await until(lambda: world.platform.final)


async def test_a_part_that_was_taken_for_the_rest_says_so(world: World) -> None:
    """Without the length of the whole a part looks like the end."""
    async with selected(world) as (clients, updates):
        (one, _), (first, _) = clients, updates
        headers = {**first.headers, "Upload-Offset": "0"}
        answer = await do(one.http.ask, "PATCH", "/v1/updates", headers, first.body[:1000])
        assert answer.code == "update_malformed"
        assert "Without Upload-Length the body was taken for all that was left" in answer.json["detail"]


def kept(one: Client, update: Work) -> int:
    """The bytes that a selector has of an update whose line broke: said once it has noticed that it came, and broke."""
    until_ = time.monotonic() + 20
    while (answer := _asked(one, update)).status == 409 or answer.headers["Upload-Offset"] == "0":
        assert time.monotonic() < until_, answer
    assert answer.status == 204
    return int(answer.headers["Upload-Offset"])


async def test_a_new_beginning_drops_what_was_there(world: World) -> None:
    """A POST after half of another body is the whole update; what it refuses leaves nothing to go on with."""
    async with selected(world) as (clients, updates):
        (one, other), (first, second) = clients, updates
        await do(one.http.break_off, "POST", "/v1/updates", first.headers, len(first.body), bytes(500_000))
        assert await do(kept, one, first)
        refused = await do(one.http.ask, "POST", "/v1/updates", first.headers, first.body[:-1])
        assert refused.code == "update_malformed"
        assert (await do(_asked, one, first)).headers["Upload-Offset"] == "0"
        await do(one.http.break_off, "POST", "/v1/updates", first.headers, len(first.body), bytes(500_000))
        assert await do(kept, one, first)
        assert (await do(one.send, first)).status == 200
        assert (await do(other.send, second)).status == 200
        final = await until(lambda: world.platform.final)
        assert_same(world.platform.weights(final), expected_after(world.model, 1, Participant(1), Participant(2)))


async def test_of_two_connections_the_living_one_has_the_update(world: World) -> None:
    """While bytes come, a second one is refused; once they stop, it takes the place of the first."""
    async with selected(world) as (clients, updates):
        (one, other), (first, second) = clients, updates
        await do(_two_connections, one, first)
        assert (await do(other.send, second)).status == 200
        final = await until(lambda: world.platform.final)
        assert_same(world.platform.weights(final), expected_after(world.model, 1, Participant(1), Participant(2)))


def _two_connections(one: Client, update: Work) -> None:
    living = one.http.half("POST", "/v1/updates", update.headers, len(update.body), update.body[:1000])
    try:
        rival = one.http.begin("POST", "/v1/updates", update.headers, update.body)
        sent = 1000
        while not select.select([rival.sock], [], [], 0.05)[0]:
            living.send(update.body[sent : sent + 1000])
            sent += 1000
        assert one.http.end(rival).code == "already_reported"
        again = one.http.ask("POST", "/v1/updates", update.headers, update.body)  # by now the first is silent
        assert again.status == 200
    finally:
        living.close()


async def test_what_http_allows(world: World) -> None:
    """No length, a wish to be told before the body, a connection that is used again, headers that nobody knows."""
    async with selected(world) as (clients, updates):
        (one, other), (first, second) = clients, updates
        await do(_kept_connection, one, world.digest)
        refused = await do(_uninvited, one, first)
        assert refused.code == "unsupported_encoding" and refused.headers["Connection"] == "close"
        assert (await do(_expecting, one, first)).status == 200
        pieces = (second.body[start : start + 70_000] for start in range(0, len(second.body), 70_000))
        answer = await do(other.http.ask, "POST", "/v1/updates", {**second.headers, "X-Unknown": "1"}, pieces)
        assert answer.status == 200
        await until(lambda: world.platform.final)


def _kept_connection(one: Client, digest: str) -> None:
    connection = one.http.connect()
    try:
        for _ in range(3):
            connection.request("GET", f"/v1/models/{digest}", headers={**one.http.headers, "Range": "bytes=0-9"})
            reply = connection.getresponse()
            assert (reply.status, len(reply.read())) == (206, 10)
    finally:
        connection.close()


def _expecting(one: Client, update: Work) -> Answer:
    """Send the body only when it is asked for, as curl does."""
    length = str(len(update.body))
    headers = {**update.headers, "Content-Length": length, "Expect": "100-continue"}
    connection = one.http.open("POST", "/v1/updates", headers)
    assert connection.sock.recv(len(b"HTTP/1.1 100 Continue\r\n\r\n"), MSG_WAITALL).startswith(b"HTTP/1.1 100 ")
    connection.send(update.body)
    return one.http.end(connection)


def _uninvited(one: Client, update: Work) -> Answer:
    """Who waits to be asked for a body that would be refused is told so, and not asked."""
    length = str(len(update.body))
    headers = {**update.headers, "Content-Length": length, "Expect": "100-continue", "Content-Encoding": "gzip"}
    connection = one.http.open("POST", "/v1/updates", headers)
    assert connection.sock.recv(len(b"HTTP/1.1 415"), MSG_PEEK | MSG_WAITALL) == b"HTTP/1.1 415"
    return one.http.end(connection)


@pytest.mark.parametrize("caps", [{"examples_per_update": 3}, {"clip_norm": 100.0}])
async def test_what_a_client_says_of_itself_is_bounded_by_the_plan(world: World, caps: dict[str, Any]) -> None:
    """An enormous number of examples weighs what the plan allows, and an enormous step is made shorter."""
    async with selected(world, plan(**caps)) as (clients, updates):
        boast = updates[1]._replace(headers={**updates[1].headers, "Fedota-Examples": "1000000000"})
        for client_, update in zip(
            clients, (updates[0], boast if "clip_norm" not in caps else updates[1]), strict=True
        ):
            assert (await do(client_.send, update)).status == 200
        final = await until(lambda: world.platform.final)
    floats = sum(values.size for values in world.model.values() if values.dtype.kind == "f")
    steps = [number * min(1.0, caps.get("clip_norm", np.inf) / (number * floats**0.5)) for number in (1, 2)]
    weights = (1, 3 if "clip_norm" not in caps else 2)
    assert (final.examples, steps == [1, 2]) == (sum(weights), "clip_norm" not in caps)
    mean = float(np.average(steps, weights=weights))
    expected = {name: values + mean if values.dtype.kind == "f" else values + 2 for name, values in world.model.items()}
    assert_same(world.platform.weights(final), {n: one.astype(world.model[n].dtype) for n, one in expected.items()})


# The tables, and the examples.


def section(title: str) -> str:
    """What the document says below a heading."""
    text = DOCUMENT.read_text()
    found = re.search(rf"^#+ `?{re.escape(title)}`?$(.*?)(?=^#+ |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"{DOCUMENT} has no section {title!r}"
    return found[1]


def examples(title: str) -> list[dict[str, Any]]:
    """The JSON objects that are shown there."""
    decoder, found = json.JSONDecoder(), []
    for block in re.findall(r"```json\n(.*?)```", section(title), re.DOTALL):
        text = block.strip()
        while text:
            one, end = decoder.raw_decode(text)
            found.append(one)
            text = text[end:].strip()
    return found


def table(title: str) -> set[tuple[int, str]]:
    """The errors that are listed there, each by status and code."""
    rows = re.findall(r"^\| (\d{3}) `(\w+)` \|", section(title), re.MULTILINE)
    return {(int(status), code) for status, code in rows}


async def test_every_status_of_the_tables(world: World) -> None:
    """Each row of the client's part is had from a real selector, and there is no other row."""
    world.prepare(plan(goal_count=2, over_selection=1.5, selectors=2), model())
    world.selectors[1].module = "tests.support.hasty_selector"
    await world.coordinator.start()
    await asyncio.gather(*(one.start() for one in world.selectors))
    seen: dict[str, set[tuple[int, str]]] = {title: set() for title in TABLES}
    async with chosen(world, (0, 0, 1)) as (clients, updates):
        await do(check_all, open_cases, clients, updates, seen, world.token("org 3"))
        await asyncio.gather(world.selectors[0].kill(), world.coordinator.kill())
        await world.selectors[0].start()
        await do(check_all, coming_up, clients, updates, seen)
        told = await do(clients[0].check_in, updates[0].ticket)
        assert told.keys() == examples("POST /v1/check-in")[1].keys()
        assert (told["status"], told["update"]) == ("come_back", "pending") and told["seconds"] > 0
        await world.coordinator.start()
        await until(lambda: world.platform.resumed == 2)
        for one, update in list(zip(clients, updates, strict=True))[:2]:
            await do(_insist, one, update)
        await until(lambda: world.platform.final)
        await do(check_all, over_cases, clients, updates, seen)
    assert seen == {title: table(title) for title in TABLES}


TABLES: Final = ("POST /v1/check-in", "GET /v1/models/<sha256>", "POST /v1/updates", "HEAD /v1/updates")


class Case(NamedTuple):
    """A request that is answered with a row of a table."""

    title: str
    code: str
    ask: Callable[[], Answer]
    seen: dict[str, set[tuple[int, str]]]

    def check(self) -> None:
        """Ask, and note the row."""
        answer = self.ask()
        head = self.title.startswith("HEAD")
        assert answer.status >= 400, (self.title, self.code, answer)
        assert head or answer.code == self.code, (self.title, self.code, answer)
        if not head:
            assert answer.headers["Content-Type"].startswith("application/problem+json")
            assert {"type", "title", "status", "detail", "code"} <= answer.json.keys()
            assert (answer.json["type"], answer.json["status"]) == (f"/errors/{self.code}", answer.status)
        if self.code == "unavailable":
            assert int(answer.headers["Retry-After"]) >= 1
        if self.code == "token_refused":
            assert answer.headers["WWW-Authenticate"].startswith("Bearer")
        self.seen[self.title].add((answer.status, self.code))


Seen = dict[str, set[tuple[int, str]]]


def check_all(cases: Callable[..., list[Case]], *arguments: Any) -> None:
    """One after the other: some are about the same ticket."""
    for case in cases(*arguments):
        case.check()


def open_cases(clients: list[Client], updates: list[Work], seen: Seen, another_token: str) -> list[Case]:
    """What is refused while a round waits for updates. The first client's is accepted before."""
    (one, other, slow), (first, second, third) = clients, updates
    assert one.send(first).status == 200

    def post(code: str, body: bytes = second.body, method: str = "POST", **changes: str) -> Case:
        headers = {**second.headers, **{name.replace("_", "-"): value for name, value in changes.items()}}
        return Case("POST /v1/updates", code, lambda: other.http.ask(method, "/v1/updates", headers, body), seen)

    base = unpack(second.body)
    spoiled = pack({**base, "fine": ("F64", [6], struct.pack("<6d", *[float("nan")] * 6))})
    stranger, elsewhere = {"Authorization": "Bearer nonsense"}, Client(one.http.url, another_token, "client-3")
    half = second.body[:-1]
    return [
        post("token_refused", Authorization="Bearer nonsense"),
        post("ticket_refused", Fedota_Ticket=third.ticket),
        post("update_too_large", second.body + bytes(70_000)),
        post("unsupported_encoding", Content_Encoding="gzip"),
        post("update_malformed", half),
        post("update_mismatch", pack({name: one_ for name, one_ in base.items() if name != "fine"})),
        post("update_not_finite", spoiled),
        post("update_examples", Fedota_Examples="0"),
        post("invalid_field", Fedota_Metrics="[]"),
        post("invalid_field", method="PATCH", Upload_Offset="-1"),
        post("offset_mismatch", method="PATCH", Upload_Offset="17"),
        Case("POST /v1/updates", "already_reported", lambda: one.send(first), seen),
        Case("POST /v1/updates", "unavailable", lambda: elsewhere.send(third), seen),
        Case("POST /v1/updates", "timeout", lambda: _stalled(slow, third), seen),
        Case("HEAD /v1/updates", "token_refused", lambda: slow.http.ask("HEAD", "/v1/updates", stranger), seen),
        Case("HEAD /v1/updates", "ticket_refused", lambda: slow.http.ask("HEAD", "/v1/updates"), seen),
        Case("HEAD /v1/updates", "already_reported", lambda: _asked(one, first), seen),
        Case("GET /v1/models/<sha256>", "not_found", lambda: one.http.ask("GET", f"/v1/models/{'0' * 64}"), seen),
        Case(
            "GET /v1/models/<sha256>",
            "token_refused",
            lambda: one.http.ask("GET", f"/v1/models/{'0' * 64}", stranger),
            seen,
        ),
        Case("POST /v1/check-in", "token_refused", lambda: one.http.ask("POST", "/v1/check-in", stranger), seen),
        Case("POST /v1/check-in", "too_large", lambda: one.http.ask("POST", "/v1/check-in", {}, b"{}"), seen),
        Case(
            "POST /v1/check-in",
            "invalid_field",
            lambda: one.http.ask("POST", "/v1/check-in", {"Fedota-Client": "no spaces, please"}),
            seen,
        ),
    ]


def coming_up(clients: list[Client], updates: list[Work], seen: Seen) -> list[Case]:
    """What a selector says that has not heard of its coordinator yet."""
    one, first = clients[0], updates[0]
    return [
        Case("POST /v1/updates", "unavailable", lambda: one.send(first), seen),
        Case("HEAD /v1/updates", "unavailable", lambda: _asked(one, first), seen),
    ]


def over_cases(clients: list[Client], updates: list[Work], seen: Seen) -> list[Case]:
    """What is refused once the round is over."""
    (counted, first), (late, last) = (clients[0], updates[0]), (clients[2], updates[2])
    return [
        Case("POST /v1/updates", "already_reported", lambda: counted.send(first), seen),
        Case("POST /v1/updates", "round_over", lambda: late.send(last), seen),
        Case("HEAD /v1/updates", "round_over", lambda: _asked(late, last), seen),
    ]


def _asked(one: Client, update: Work) -> Answer:
    return one.http.ask("HEAD", "/v1/updates", {"Fedota-Ticket": update.ticket})


def _stalled(one: Client, update: Work) -> Answer:
    return one.http.end(one.http.half("POST", "/v1/updates", update.headers, len(update.body), update.body[:-1]))


def _insist(one: Client, update: Work) -> None:
    """Send an update until it is in a sum, as a client does."""
    while True:
        told = one.check_in(update.ticket)
        if told["status"] == "send_again" and one.send(update).status == 200:
            return
        if told["status"] == "come_back" and told["seconds"]:
            time.sleep(told["seconds"])
        assert told["update"] == "pending", told


SHOWN: Final[dict[str, list[Any]]] = {
    "Client and selector": [Kit],
    "POST /v1/check-in": [CheckedIn] * 4,
    "POST /v1/selectors/<name>": [Told],
    "GET /v1/selectors/<name>/orders?life=<life>": [Orders],
    "PUT /v1/selectors/<name>/partial": [Meta],
    "POST /v1/claims": [Claim],
}


@pytest.mark.parametrize("title", SHOWN)
def test_what_is_shown_is_what_is_said(title: str) -> None:
    """Each example has all fields of its message, and no others."""
    shown = examples(title)
    assert len(shown) == len(SHOWN[title])
    for one, kind in zip(shown, SHOWN[title], strict=True):
        said = msgspec.to_builtins(msgspec.convert(one, kind))
        if "update" not in one:
            said.pop("update", None)
        assert said == one


# A selector, played by hand.


class Hand:
    """A selector's side, as the document tells it."""

    def __init__(self, url: str, name: str) -> None:
        self.http = Speaker(url, {"Authorization": "Bearer a shared secret"})
        self.name = name
        self.life = f"life-of-{name}"
        self.number = 0
        self.tag = ""
        self.orders: dict[str, Any] = {}
        self.sum, self.sum_name = b"", ""

    def tell(self, waiting: dict[str, int], **held: Any) -> None:
        """How things stand."""
        self.number += 1
        told = {"name": self.name, "life": self.life, "number": self.number, "waiting": sum(waiting.values())}
        body = json.dumps({**told, "organizations": waiting, "held": held or None}).encode()
        assert self.http.ask("POST", f"/v1/selectors/{self.name}", body=body).status == 204

    def listen(self, condition: Callable[[dict[str, Any]], Any]) -> None:
        """Hear orders until they are these."""
        while not (self.orders and condition(self.orders)):
            self.hear()

    def hear(self) -> int:
        """Orders, if there are new ones; the status."""
        headers = {"If-None-Match": self.tag} if self.tag else {}
        answer = self.http.ask("GET", f"/v1/selectors/{self.name}/orders?life={self.life}", headers)
        if answer.status == 200:
            self.tag, self.orders = answer.headers["ETag"], answer.json
        return answer.status

    def held(self, *organizations: str) -> dict[str, Any]:
        """The cohort, with an update of each of these."""
        work_ = self.orders["work"]
        same = {name: work_[name] for name in ("cohort", "round", "attempt", "share", "deadline")}
        gave = [{"organization": name, "updates": 1, "examples": 1, "size": 10} for name in organizations]
        counts = {"selected": work_["share"], "reported": len(organizations), "contributions": gave}
        return {**same, "base": work_["base"]["sha256"], **counts}

    def hand_over(self, numbers: bytes, *accepted: tuple[str, str, int], part: int = 0) -> Answer:
        """The sum of these updates: ticket, organization, examples. With `part` the line breaks after so many bytes."""
        said = [
            {"ticket": ticket, "organization": name, "examples": count, "metrics": {}}
            for ticket, name, count in accepted
        ]
        work_ = self.orders["work"]
        meta = {"cohort": work_["cohort"], "life": self.life, "collection": work_["collect"], "accepted": said}
        head = json.dumps(meta).encode()
        self.sum = struct.pack("<Q", len(head)) + head + numbers
        self.sum_name = hashlib.sha256(self.sum[: 8 + len(head)]).hexdigest()
        path = f"/v1/selectors/{self.name}/partial"
        if not part:
            return self.http.ask("PUT", path, body=self.sum)
        self.http.break_off("PUT", path, {}, len(self.sum), self.sum[:part])
        return self.has_sum(part)

    def has_sum(self, count: int) -> Answer:
        """Ask until so much of the sum is there."""
        path, named = f"/v1/selectors/{self.name}/partial", {"Fedota-Sum": self.sum_name}
        while (answer := self.http.ask("HEAD", path, named)).headers.get("Upload-Offset") != str(count):
            assert answer.status in (204, 503)
        return answer

    def go_on(self, offset: int) -> Answer:
        """The rest of the sum."""
        named = {"Fedota-Sum": self.sum_name, "Upload-Offset": str(offset)}
        return self.http.ask("PATCH", f"/v1/selectors/{self.name}/partial", named, self.sum[offset:])

    def claim(self, ticket: str, issuer: "Hand") -> str:
        """May this selector have the update of another one's ticket?"""
        wanted = {"life": self.life, "cohort": self.orders["work"]["cohort"], "ticket": ticket}
        body = json.dumps({**wanted, "name": issuer.name, "issuer": issuer.life}).encode()
        answer: str = self.http.ask("POST", "/v1/claims", body=body).json["answer"]
        return answer


def summed(*updates: tuple[Weights, int]) -> bytes:
    """Σ examples × weights: the floats in float64, in the order of the model file, then the integers' maximum."""
    names = sorted(updates[0][0], key=lambda name: (-updates[0][0][name].dtype.itemsize, name))  # safetensors' order
    floats = [name for name in names if updates[0][0][name].dtype.kind == "f"]
    sums = [sum(count * update[name].astype("<f8") for update, count in updates) for name in floats]
    most = [np.max([update[name] for update, _ in updates], axis=0) for name in names if name not in floats]
    return b"".join(np.asarray(one).tobytes() for one in (*sums, *most))


async def test_a_round_whose_selectors_are_played_by_hand(world: World) -> None:
    """The coordinator tells two of them what to do, and makes the checkpoint of the sum that it may use."""
    world.prepare(plan(goal_count=3, minimum_fraction=0.5, selectors=2), model())
    await world.coordinator.start()
    rows = await do(_play, world.coordinator.url, world.digest)
    final = await until(lambda: world.platform.final)
    assert_same(world.platform.weights(final), expected_after(world.model, 1, Participant(1), Participant(2)))
    assert (final.reported, final.examples, final.participants) == (2, 3, ["org 1", "org 2"])
    assert rows == table("Selector and coordinator")


def _play(url: str, digest: str) -> set[tuple[int, str]]:
    """One round, and each error that there is; gives those."""
    one, other = Hand(url, "selector-0"), Hand(url, "selector-1")
    rows: set[tuple[int, str]] = set()

    def refused(answer: Answer, code: str) -> None:
        assert answer.code == code, answer
        rows.add((answer.status, answer.code))

    refused(Speaker(url, {}).ask("GET", "/v1/selectors/x/orders?life=x"), "unauthenticated")
    refused(one.http.ask("GET", f"/v1/models/{'0' * 64}"), "not_found")
    refused(one.http.ask("POST", "/v1/selectors/selector-0", body=b"{]"), "invalid_request")
    one.tell({"org 1": 1, "org 2": 1})
    other.tell({"org 3": 1})
    for hand in (one, other):
        hand.listen(lambda orders: orders["work"])
        assert hand.orders.keys() == examples("GET /v1/selectors/<name>/orders?life=<life>")[0].keys()
        assert hand.orders["work"]["base"]["sha256"] == digest and not hand.orders["work"]["collect"]
    assert [hand.orders["work"]["share"] for hand in (one, other)] == [2, 1]
    base = {name: np.frombuffer(data, TYPES[type_]).reshape(shape) for name, (type_, shape, data) in _model(one)}
    good = summed((Participant(1).trained(base, 1), 1), (Participant(2).trained(base, 1), 2))
    whose = (("t1", "org 1", 1), ("t2", "org 2", 2))
    refused(one.hand_over(good, *whose), "round_over")
    for hand in (one, other):
        hand.tell({}, **hand.held())
    assert other.claim("t1", one) == "wait"
    assert one.hear() in (200, 304)
    one.tell({}, **one.held("org 1", "org 2"))
    other.tell({}, **other.held("org 3"))
    for hand in (one, other):
        hand.listen(lambda orders: orders["work"] and orders["work"]["collect"])
    refused(one.hand_over(good[:-1], *whose), "invalid_request")
    endless = struct.pack("<Q", 2**40) + b"{"
    refused(one.http.ask("PUT", f"/v1/selectors/{one.name}/partial", body=endless), "too_large")
    half = len(one.sum) // 2
    assert one.hand_over(good, *whose, part=half).status == 204
    refused(one.go_on(half + 1), "offset_mismatch")
    assert one.go_on(half).status == 204
    assert one.has_sum(len(one.sum)).status == 204
    assert one.hand_over(good, *whose).status == 204, "once more is harmless"
    refused(other.hand_over(good, ("t1", "org 3", 1)), "conflict")
    for hand in (one, other):
        hand.listen(lambda orders: orders["finished"])
    assert (one.orders["last"]["counted"], other.orders["last"]["counted"]) == (True, False)
    assert one.hear() == 304
    return rows


def _model(hand: Hand) -> Any:
    """The base, fetched in two ranges."""
    path = f"/v1/models/{hand.orders['work']['base']['sha256']}"
    first, rest = (hand.http.ask("GET", path, {"Range": f"bytes={span}"}) for span in ("0-99", "100-"))
    assert (first.status, rest.status) == (206, 206)
    return unpack(first.body + rest.body).items()


TYPES: Final = {"F32": "<f4", "F64": "<f8", "I64": "<i8"}
