"""Who gets in, and where: the router's own table is walked, so a new route cannot be forgotten."""

import asyncio
import gzip
import io
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import pytest
from aiohttp.web_protocol import RequestHandler
from yarl import URL

from fedota.events import orchestrator as infra
from fedota.events.problems import ProblemCompleted, ProblemStopped
from fedota.kernel.service import SERVICE
from gateway import web_errors
from gateway.auth import ACTIONS
from gateway.routes import ACTIONS_OF, API, PAGES
from tests.integration.gateway.conftest import TOKENS

_OPEN = {"/livez", "/readyz", "/sign-in", "/static"}
_PLACES = {"problem": str(uuid4()), "organization": "A", "name": "f", "round": "1", "person": "nobody"}
_PLACES |= {"process": "gateway", "position": "1"}
_ROLES = ("setter", "organization", "operator")


def _address(path: str) -> str:
    return path.format(**_PLACES)


async def test_no_route_is_open_that_should_not_be(platform: Any) -> None:
    """Without a token the API answers 401 and pages lead to signing in; nothing reaches a service."""
    seen = set()
    async with platform.client(None) as nobody:
        for route in platform.app.router.routes():
            seen.add(route.resource.canonical)
            if route.resource.canonical in _OPEN:
                continue
            reply = await nobody.request(route.method, _address(route.resource.canonical), allow_redirects=False)
            if route.resource.canonical.startswith(("/api", "/metrics")):
                assert reply.status == 401, route
                assert reply.headers["WWW-Authenticate"].startswith("Bearer")
            else:
                assert (reply.status, reply.headers["Location"].split("?")[0]) == (303, "/sign-in"), route
        assert seen == _OPEN | {"/metrics"} | {route.path for route in (*API, *PAGES)}
        for path, status in [
            ("/api/nothing", 401),
            ("/api", 401),
            ("/nothing", 303),
            ("/static/..%2fapp.py", 404),
            ("/static/nothing", 404),
            ("/static/", 404),
        ]:
            address = URL(platform.url + path, encoded=True)
            assert (await nobody.get(address, allow_redirects=False)).status == status, path
    assert platform.requests == []


async def test_open_routes_answer_without_a_token_and_tell_no_secret(platform: Any) -> None:
    """Health, signing in, and the files that pages are made of."""
    async with platform.client(None) as nobody:
        for path in ("/livez", "/readyz", "/sign-in", "/static/style.css", "/static/page.js"):
            reply = await nobody.get(path)
            text = await reply.text()
            assert reply.status == 200, (path, text)
            assert "made-up" not in text and "fdt_" not in text


async def test_what_is_wrong_inside_is_not_told_outside(platform: Any) -> None:
    """The open health route names what fails; the reason, which may hold addresses, is for the log."""

    async def broken() -> None:
        raise OSError("cannot reach 10.0.0.7:5432")

    platform.app[SERVICE].add_check("log", broken)
    async with platform.client(None) as nobody:
        reply = await nobody.get("/readyz")
        assert (reply.status, (await reply.json())["status"]) == (503, "failing")
        assert "log" in (await reply.json())["failing"] and "10.0.0.7" not in await reply.text()


async def test_metrics_are_for_operators(platform: Any) -> None:
    """How much goes on is nobody else's business."""
    async with platform.client("operator") as operator, platform.client("setter") as setter:
        reply = await operator.get("/metrics")
        assert reply.status == 200 and "fedota_event_streams" in await reply.text()
        assert (await setter.get("/metrics")).status == 403


@pytest.mark.parametrize("token", ["", "x", "fdt_setter_made_u", "Fdt_setter_made_up", "fdt_setter_made_up x", "ÿ"])
async def test_a_wrong_token_opens_nothing(platform: Any, token: str) -> None:
    """Only the very token does, whatever bytes are sent."""
    async with platform.client(None) as nobody:
        reply = await nobody.get("/api/problems", headers={"Authorization": f"Bearer {token}"})
        assert reply.status == 401
        basic = await nobody.get("/api/problems", headers={"Authorization": "Basic fdt_setter_made_up"})
        assert basic.status == 401


async def test_every_route_asks_the_table(platform: Any) -> None:
    """For each route × method × role the answer is 403 exactly where the table says no."""
    for role in _ROLES:
        async with platform.client(role) as client:
            for (method, path), action in ACTIONS_OF.items():
                async with client.request(method, _address(path), allow_redirects=False) as reply:
                    assert (reply.status == 403) == (role not in ACTIONS[action]), (role, method, path)


async def test_head_answers_as_get_does_without_a_body(platform: Any) -> None:
    """Whoever may read may look first; what never ends has no beginning to look at."""
    async with platform.client("setter") as setter:
        for path in ("/", "/api/problems", "/api/events", "/livez"):
            got, looked = await setter.get(path), await setter.head(path)
            assert (looked.status, looked.content_type) == (got.status, got.content_type) == (200, got.content_type)
            assert await looked.read() == b""
        stream = await setter.head("/api/events/stream")
        assert (stream.status, stream.headers["Allow"]) == (405, "GET")
        for path in ("/api/problems", "/"):
            options = await setter.options(path, headers={"Origin": "https://evil.test"})
            assert options.status == 405 and "GET" in options.headers["Allow"]
            assert not [name for name in options.headers if name.startswith("Access-Control")]


@pytest.mark.parametrize(
    ("headers", "data", "status"),
    [
        ({"Content-Encoding": "gzip"}, gzip.compress(b"token=fdt_setter_made_up"), 415),
        ({"Content-Type": "multipart/form-data; boundary=x"}, b"--x--", 400),
        ({"Content-Type": "application/x-www-form-urlencoded; charset=nonsense"}, b"token=x", 400),
        ({"Content-Type": "application/json"}, b"{}", 400),
        ({}, b"token=" + b"x" * 5000, 413),
        ({}, b"token=%FF%00", 401),
        ({}, b"token=\xff", 400),
    ],
)
async def test_only_a_small_plain_form_is_read_of_strangers(
    platform: Any, headers: dict[str, str], data: bytes, status: int
) -> None:
    """Anybody may send a form to sign in: what it costs is bounded before it is read."""
    form = {"Content-Type": "application/x-www-form-urlencoded", "Origin": platform.url, **headers}
    async with platform.client(None) as nobody:
        reply = await nobody.post("/sign-in", data=io.BytesIO(data), headers=form, allow_redirects=False)
        assert reply.status == status, await reply.text()


async def test_a_form_of_unknown_length_is_not_read(platform: Any) -> None:
    """A body in chunks could go on for ever."""

    async def chunks() -> AsyncIterator[bytes]:
        yield b"token=x"

    form = {"Content-Type": "application/x-www-form-urlencoded", "Origin": platform.url}
    async with platform.client(None) as nobody:
        assert (await nobody.post("/sign-in", data=chunks(), headers=form)).status == 413


async def test_half_a_body_holds_no_connection_for_ever(platform: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a stranger's, nor that of somebody who may send one."""
    monkeypatch.setattr(web_errors, "_PATIENCE", 0.1)
    defaults = RequestHandler.__init__.__kwdefaults__
    assert defaults  # among them that aiohttp, once it has answered, gives the rest of a body ten seconds to come
    monkeypatch.setitem(defaults, "lingering_time", 0.1)
    form = "Content-Type: application/x-www-form-urlencoded\r\nAccept: text/html\r\n"
    answers = await asyncio.gather(
        _half(platform.url, "/sign-in", form),
        _half(platform.url, "/api/problems", "Content-Type: application/json\r\n"),
    )
    assert [status for status, _ in answers] == [504, 504]
    for _, text in answers:
        assert "did not come within" in text and "Nothing was done; send it again." in text
    assert "<html" in answers[0][1] and '"code":"timeout"' in answers[1][1]


async def _half(url: str, path: str, headers: str) -> tuple[int, str]:
    """Status and all that comes until the connection is closed, when half of a body is sent."""
    place = URL(url)
    reader, writer = await asyncio.open_connection(place.host, place.port)
    token = f"Authorization: Bearer {TOKENS['setter']}\r\nOrigin: {url}\r\n"
    writer.write(
        f"POST {path} HTTP/1.1\r\nHost: {place.authority}\r\n{token}{headers}Content-Length: 20\r\n\r\ntoken=".encode()
    )
    async with asyncio.timeout(20):
        text = (await reader.read()).decode()
    writer.close()
    return int(text.split()[1]), text


async def test_a_session_lets_a_browser_in_and_out(platform: Any) -> None:
    """A pasted token becomes an opaque cookie that scripts cannot read; signing out makes it worthless."""
    async with platform.client(None) as browser:
        there = await browser.get(f"/problems/{_PLACES['problem']}", allow_redirects=False)
        assert there.headers["Location"] == f"/sign-in?next=%2Fproblems%2F{_PLACES['problem']}"
        same = {"Sec-Fetch-Site": "same-origin"}
        wrong = await browser.post("/sign-in", data={"token": "wrong"}, headers=same)
        assert wrong.status == 401 and "not known" in await wrong.text()
        form = {"token": " fdt_setter_made_up\n", "next": "//evil.test"}
        entered = await browser.post("/sign-in", data=form, headers=same, allow_redirects=False)
        assert (entered.status, entered.headers["Location"]) == (303, "/")
        cookie = entered.cookies["fedota"]
        assert (cookie["httponly"], cookie["samesite"], cookie["path"]) == (True, "Strict", "/")
        assert "fdt_" not in cookie.value and len(cookie.value) >= 43
        assert (await browser.get("/api/problems")).status == 200
        assert "No problem has been published yet" in await (await browser.get("/")).text()

        again = await browser.post(
            "/sign-in", data={"token": "fdt_setter_made_up"}, headers=same, allow_redirects=False
        )
        assert again.cookies["fedota"].value != cookie.value
        stolen = {"Cookie": f"fedota={cookie.value}"}
        async with platform.client(None) as thief:
            assert (await thief.get("/api/problems", headers=stolen)).status == 401
        kept = {"Cookie": f"fedota={again.cookies['fedota'].value}"}
        assert (await browser.post("/sign-out", headers=same, allow_redirects=False)).status == 303
        async with platform.client(None) as thief:
            assert (await thief.get("/api/problems", headers=kept)).status == 401


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-Fetch-Site": "same-origin"}, 404),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "https://evil.test"}, 403),
        ({"Origin": "null"}, 403),
        ({}, 403),
    ],
)
async def test_another_site_cannot_use_a_session(platform: Any, headers: dict[str, str], status: int) -> None:
    """A change that comes with the cookie must come from our own pages."""
    async with platform.client(None) as browser:
        same = {"Origin": platform.url}
        await browser.post("/sign-in", data={"token": "fdt_setter_made_up"}, headers=same)
        path = f"/api/problems/{uuid4()}/uploads"
        files = {"files": [{"name": "f", "size": 1, "sha256": "a" * 64}]}
        assert (await browser.post(path, json=files, headers=headers)).status == status
        assert (await browser.post(path, json=files, headers=same)).status == 404


async def test_a_signed_out_reader_is_told_no_more(platform: Any) -> None:
    """An open stream ends with its session."""
    async with platform.client(None) as browser:
        same = {"Origin": platform.url}
        await browser.post("/sign-in", data={"token": "fdt_setter_made_up"}, headers=same)
        reply = await browser.get("/api/events/stream")
        await browser.post("/sign-out", headers=same)
        await platform.record(platform.story(str(uuid4()))[0])
        assert b"ProblemCreated" not in await reply.content.read()


async def test_pages_may_load_nothing_from_elsewhere(platform: Any) -> None:
    """The content security policy is strict, and the pages keep to it: no inline script or style."""
    problem_id = str(uuid4())
    position = await platform.record(*platform.story(problem_id))
    async with platform.client("setter") as setter:
        for path in ("/", f"/problems/{problem_id}?at_least={position}", "/sign-in"):
            reply = await setter.get(path)
            text = await reply.text()
            assert reply.status == 200
            policy = reply.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy
            elsewhere = [rule.strip() for rule in policy.split(";") if "http" in rule]
            assert elsewhere == [f"connect-src 'self' {platform.s3_url}"]  # where files are uploaded to
            assert "style=" not in text and "<style" not in text and " onclick" not in text
            assert text.count("<script") == text.count('<script type="module" src="/static/page.js">') == 1


async def test_pages_show_words_of_others_as_words(platform: Any) -> None:
    """Nothing that a setter or a client wrote becomes markup."""
    problem_id = str(uuid4())
    created = platform.story(problem_id)[0]
    evil = type(created)(**{**{n: getattr(created, n) for n in created.__struct_fields__}, "name": "<b>x</b>"})
    position = await platform.record(evil)
    async with platform.client("operator") as operator:
        for path in ("/", f"/problems/{problem_id}"):
            text = await (await operator.get(f"{path}?at_least={position}")).text()
            assert "<b>x" not in text and "&lt;b&gt;x" in text


@pytest.mark.parametrize("role", _ROLES)
async def test_a_problem_can_be_looked_at_at_any_time(platform: Any, role: str) -> None:
    """Whatever has happened so far, everybody gets a page; what processes wrote is for those who run them."""
    problem_id = str(uuid4())
    story = platform.story(problem_id)
    run: dict[str, Any] = {"problem_id": problem_id, "run": 1, "namespace": "ns"}
    lost = infra.InfraDegraded(**run, component="selector-0", reason="killed", log=["what it wrote"])
    failed = infra.InfraFailed(**run, reason="no memory", log=["what it wrote"])
    stopped = infra.InfraStopped(**run, reason="removed")
    over = ProblemStopped(problem_id=problem_id, run=1, reason="it failed")
    done = ProblemCompleted(problem_id=problem_id, run=1, rounds=1, model=story[4].model)
    async with platform.client(role) as client:
        for event in (*story, lost, failed, over, stopped, story[4], done):
            after = {"at_least": await platform.record(event)}
            for path in ("/", f"/problems/{problem_id}"):
                page = await client.get(path, params=after)
                assert page.status == 200, (type(event).__name__, path)
            if event in (lost, failed):
                assert ("what it wrote" in await page.text()) == (role != "organization")


async def test_older_problems_are_a_page_further(platform: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list is cut, but nothing in it is out of reach."""
    monkeypatch.setattr("gateway.pages._SHOWN_PROBLEMS", 2)
    ids = [str(uuid4()) for _ in range(3)]
    position = 0
    for problem_id in ids:
        position = await platform.record(platform.story(problem_id)[0])
    async with platform.client("setter") as setter:
        first = await (await setter.get("/", params={"at_least": position})).text()
        assert [problem_id in first for problem_id in ids] == [False, True, True]
        assert 'href="/?before=2"' in first
        second = await (await setter.get("/?before=2")).text()
        assert [problem_id in second for problem_id in ids] == [True, False, False]
        assert 'data-live="/?before=2"' in second


async def test_errors_on_pages_are_pages(platform: Any) -> None:
    """Who reads pages reads errors there too; a program still gets problem+json."""
    async with platform.client("setter") as setter:
        page = await setter.get(f"/problems/{uuid4()}", headers={"Accept": "text/html"})
        assert (page.status, page.content_type) == (404, "text/html")
        assert "There is no such problem" in await page.text()
