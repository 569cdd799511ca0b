"""People act by name, and their names stay at the gateway's door: everywhere else they are sealed, until forgotten."""

import asyncio
import base64
import hashlib
import json
import os
import re
import secrets
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from html import escape
from pathlib import Path
from typing import Any, Final
from unittest.mock import Mock
from urllib.parse import quote

import aiohttp
import asyncpg
import msgspec
import nats
import pytest
import structlog

from fedota.client.api import Api
from fedota.contracts import subjects
from fedota.contracts.operations import Difference
from fedota.errors import FedotaError
from fedota.events.problems import ParticipationRequested, ProblemCreated
from fedota.kernel.database import connect_pool
from fedota.kernel.files import write_private
from fedota.kernel.rebuilding import verify
from fedota.kernel.settings import SettingsError
from gateway.app import create_app
from gateway.parts import PARTS
from gateway.people import FORGOTTEN, UNREADABLE, People, read_key_file
from gateway.projection import PROJECTION
from gateway.settings import Settings
from tests.contract.test_chain import first_break
from tests.integration.gateway.test_stream import frames
from tests.integration.problems.world import World
from tests.support.servers import RunningServers
from tests.support.services import Platform, Running, new_id, running
from tests.unit.events.test_evolution import example

ANNA: Final = 'Änna O\'Neil <anna@clinic.example> & "co"'
BERT: Final = "bert@clinic.example"
CARL: Final = "carl"
TOKENS: Final[dict[str, dict[str, str]]] = {
    "anna": {"role": "setter", "person": ANNA},
    "anna, operator": {"role": "operator", "person": ANNA},
    "bert": {"role": "organization", "organization": "Clinic A", "person": BERT},
    "carl": {"role": "operator", "person": CARL},
    "operator": {"role": "operator"},
    "setter": {"role": "setter"},
}
NEW: Final = {
    "name": "Tumours",
    "description": "About",
    "data_format": "csv",
    "client_image": "registry.test/team/client:1.0",
    "plan": {"rounds": 3, "goal_count": 2},
}
_HIDDEN: Final = [name.encode() for name in (ANNA, "Änna", "O'Neil", "anna@clinic", BERT, "bert@")]


class Doors:
    """A log, the problems service, and as many gateways as a test wants."""

    def __init__(self, platform: Platform, directory: Path, stack: AsyncExitStack) -> None:
        self.platform = platform
        self.directory = directory
        self.key_file = directory / "people.key"
        write_private(self.key_file, secrets.token_hex(32).encode())
        self.tokens_file = directory / "tokens.json"
        self._stack = stack

    def hand_out(self, tokens: Mapping[str, Mapping[str, str]]) -> None:
        """Write the tokens file, which every gateway reads."""
        entries = [{"sha256": hashlib.sha256(name.encode()).hexdigest(), **token} for name, token in tokens.items()]
        write_private(self.tokens_file, msgspec.json.encode(entries))

    def take_out(self, *people: str) -> None:
        """Write the tokens file anew without those who are named in it so."""
        self.hand_out({name: token for name, token in TOKENS.items() if token.get("person") not in people})

    def settings(self, **more: Any) -> Settings:
        """A gateway's settings."""
        self.hand_out(TOKENS)
        told = {"tokens_file": self.tokens_file, "people_key_file": self.key_file, "heartbeat": 0.2, **more}
        return self.platform.settings(Settings, "gateway", **told)

    async def open(self) -> Running:
        """Another gateway."""
        return await self._stack.enter_async_context(running(create_app, self.settings()))

    @asynccontextmanager
    async def people(self, key_file: Path | None = None) -> AsyncIterator[People]:
        """What a gateway of its own would know of people."""
        async with connect_pool(self.platform.role_url("gateway"), "gateway", size=2) as pool:
            yield await People.open(pool, read_key_file(key_file or self.key_file, needed=True))

    async def everything(self) -> dict[str, list[bytes]]:
        """Each value of each table of the database, and each message of the stream."""
        connection = await asyncpg.connect(self.platform.database_url)
        try:
            tables = await connection.fetch(
                "select quote_ident(n.nspname) || '.' || quote_ident(c.relname) as name from pg_class c"
                " join pg_namespace n on n.oid = c.relnamespace where c.relkind = 'r'"
                " and n.nspname not in ('pg_catalog', 'information_schema')"
            )
            held = {
                row["name"]: [
                    _bytes(value)
                    for record in await connection.fetch(f"select * from {row['name']}")
                    for value in record
                ]
                for row in tables
            }
        finally:
            await connection.close()
        return {**held, "the stream": await self._stream()}

    async def _stream(self) -> list[bytes]:
        servers = self.platform.servers
        client = await nats.connect(servers.nats_url, user_credentials=str(servers.nats_keys["anything"]))
        try:
            stream = client.jetstream()
            last = (await stream.stream_info(subjects.STREAM)).state.last_seq
            messages = [await stream.get_msg(subjects.STREAM, number) for number in range(1, last + 1)]
            return [part for message in messages for part in (message.data or b"", str(message.headers).encode())]
        finally:
            await client.close()

    async def log(self) -> list[asyncpg.Record]:
        """The log as it is stored."""
        connection = await asyncpg.connect(self.platform.database_url)
        try:
            return await connection.fetch("select * from fedota.events order by position")
        finally:
            await connection.close()


def _bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


def client(door: Running, name: str) -> aiohttp.ClientSession:
    """Somebody with a token, at a gateway."""
    return aiohttp.ClientSession(door.url, headers={"Authorization": f"Bearer {name}"})


async def published(door: Running, name: str = "anna", **headers: str) -> tuple[str, str]:
    """A problem that somebody publishes: its id, and the position where one can read it."""
    async with client(door, name) as http, http.post("/api/problems", json=NEW, headers=headers) as reply:
        assert reply.status == 201, await reply.text()
        return (await reply.json())["problem_id"], reply.headers["Fedota-Position"]


async def read(door: Running, name: str, path: str, **params: str) -> Any:
    """What somebody is shown."""
    async with client(door, name) as http, http.get(path, params=params) as reply:
        assert reply.status == 200, await reply.text()
        return await reply.json() if reply.content_type == "application/json" else await reply.text()


async def forget(door: Running, who: str, name: str = "carl") -> dict[str, Any]:
    """What an operator is told."""
    async with client(door, name) as http, http.delete(f"/api/people/{quote(who, safe='')}") as reply:
        assert reply.status == 200, await reply.text()
        told: dict[str, Any] = await reply.json()
        return told


@pytest.fixture
async def doors(servers: RunningServers, migrated_url: str, tmp_path: Path) -> AsyncIterator[Doors]:
    """No gateway yet."""
    async with Platform.open(servers, migrated_url) as platform, AsyncExitStack() as stack:
        await stack.enter_async_context(World(platform, tmp_path).running())
        yield Doors(platform, tmp_path, stack)


@pytest.fixture
async def door(doors: Doors) -> Running:
    """A gateway."""
    return await doors.open()


async def test_a_name_is_nowhere_but_at_the_door(doors: Doors, door: Running) -> None:
    """Not in the log, the stream, a read model, an idempotency key or the table of people, in no form."""
    problem_id, _ = await published(door, **{"Idempotency-Key": "once"})
    async with client(door, "bert") as bert, client(door, "anna, operator") as anna:
        path = f"/api/problems/{problem_id}"
        asked = await bert.post(f"{path}/participations", json={"organization": "Clinic A"})
        approved = await anna.post(f"{path}/participations/Clinic A/approve", headers={"Idempotency-Key": "twice"})
        assert (asked.status, approved.status) == (201, 200)
    await read(door, "anna", f"/api/problems/{problem_id}", at_least=approved.headers["Fedota-Position"])
    held = await doors.everything()
    assert {"fedota.events", "fedota.requests", "gateway.problems", "gateway.feed", "people.keys"} <= set(held)
    for place, values in held.items():
        for value in values:
            for name in _HIDDEN:
                assert name not in value, place
                assert base64.b64encode(name)[:-4] not in value and name.hex().encode() not in value, place
    sealed = [row["actor"] for row in await doors.log()]
    assert [actor.partition("~")[0] for actor in sealed] == ["setter", "organization:Clinic A", "operator"]
    assert all(re.fullmatch(r"[^~]+~[0-9a-f]{32}~[\w-]+", actor) for actor in sealed)
    for place in ("fedota.requests", "gateway.feed", "the stream"):
        assert any(sealed[0].encode() in value for value in held[place]), place
    assert sealed[0].encode() in held["gateway.problems"]


async def test_names_are_shown_to_who_is_signed_in(door: Running) -> None:
    """In the problem, its list, its events, its page and the stream; whatever characters they have."""
    problem_id, position = await published(door)
    shown = f"{ANNA} (setter)"
    for who in ("setter", "bert", "carl"):
        at = {"at_least": position}
        assert (await read(door, who, f"/api/problems/{problem_id}", **at))["setter"] == shown
        assert (await read(door, who, "/api/problems", **at))["problems"][0]["setter"] == shown
        assert (await read(door, who, "/api/events"))["events"][0]["actor"] == shown
    page = await read(door, "bert", f"/problems/{problem_id}")
    assert page.count(escape(shown)) == 2 and "anna@clinic.example>" not in page  # its setter, and who caused the event
    assert "~" not in page and escape(BERT) in page  # and whom one is signed in as
    async with (
        client(door, "bert") as bert,
        bert.get("/api/events/stream") as stream,
        _frames(stream) as found,
    ):
        assert json.loads((await anext(found))["data"])["actor"] == shown
    async with Api.open(door.url, "bert") as api:
        [event] = await api.events(problem_id)
        assert event.actor == shown and isinstance(event.data, ProblemCreated)


async def test_one_person_is_one_actor(doors: Doors, door: Running) -> None:
    """A retry gives the first answer again, at another gateway too; in another role the person has the same id."""
    first = await published(door, **{"Idempotency-Key": "once"})
    other = await doors.open()
    assert await published(other, **{"Idempotency-Key": "once"}) == first
    await published(other, "anna, operator", **{"Idempotency-Key": "once"})
    await published(other, "setter")
    actors = [row["actor"] for row in await doors.log()]
    (one, two), nameless = [actor.split("~") for actor in actors[:2]], actors[2]
    assert (one[0], two[0], nameless) == ("setter", "operator", "setter") and one[1:] == two[1:]
    async with doors.people() as people:
        assert await people.actor("setter", ANNA) == actors[0]
        assert await people.actors_of(ANNA) == await people.actors_of(one[1]) == sorted(actors[:2])
        assert await people.actors_of("nobody") == []


async def test_the_same_name_in_other_code_points_is_the_same(doors: Doors) -> None:
    """Ä is one character or two, and one person."""
    async with doors.people() as people:
        composed = await people.actor("setter", "\N{LATIN CAPITAL LETTER A WITH DIAERESIS}nna")
        assert await people.actor("setter", "A\N{COMBINING DIAERESIS}nna") == composed
        assert await people.actor("setter", "Anna") != composed


async def test_two_gateways_at_once_agree_on_a_key(doors: Doors) -> None:
    """Whoever comes second takes the first one's: there is one key and one text, however many begin together."""
    async with doors.people() as one, doors.people() as two:
        for number in range(20):
            names = [f"person {number}"] * 4
            texts = await asyncio.gather(*(people.actor("setter", name) for people in (one, two) for name in names))
            assert len(set(texts)) == 1
        assert [person.name for person in await one.listed()] == [f"person {number}" for number in range(20)]


async def test_forgetting_holds_at_once_everywhere(doors: Doors, door: Running) -> None:
    """At another gateway and on a stream that was open before; the log and what is made of it stay as they were."""
    other = await doors.open()
    problem_id, _ = await published(door)
    _, last = await published(door, "carl")
    assert (await read(other, "setter", f"/api/problems/{problem_id}", at_least=last))["setter"] == f"{ANNA} (setter)"
    [anna, carl] = (await read(other, "carl", "/api/people"))["people"]
    assert (anna["name"], carl["name"]) == (ANNA, CARL)
    log, rows = await doors.log(), await _rows(other)
    async with (
        client(other, "bert") as bert,
        bert.get("/api/events/stream") as stream,
        _frames(stream) as found,
    ):
        assert json.loads((await anext(found))["data"])["actor"] == f"{ANNA} (setter)"
        doors.take_out(ANNA)
        with structlog.testing.capture_logs() as said:
            told = await forget(door, ANNA)
        assert told["forgotten"] and anna["id"] in told["remains"]
        assert (await read(other, "setter", f"/api/problems/{problem_id}"))["setter"] == f"{FORGOTTEN} (setter)"
        assert f"{FORGOTTEN} (setter)" in await read(other, "setter", f"/problems/{problem_id}")
        [one, two] = (await read(other, "setter", "/api/events"))["events"]
        assert (one["actor"], two["actor"]) == (f"{FORGOTTEN} (setter)", f"{CARL} (operator)")
        # what was sealed before and comes now, on the stream that was open, is nobody's name either
        late = ParticipationRequested(problem_id=problem_id, organization="Clinic B")
        await doors.platform.record(late, actor=log[0]["actor"])
        assert json.loads((await anext(found))["data"])["actor"] == f"{CARL} (operator)"
        assert json.loads((await anext(found))["data"])["actor"] == f"{FORGOTTEN} (setter)"
    async with (
        client(other, "bert") as bert,
        bert.get("/api/events/stream") as stream,
        _frames(stream) as found,
    ):
        assert json.loads((await anext(found))["data"])["actor"] == f"{FORGOTTEN} (setter)"
    assert [person["name"] for person in (await read(other, "carl", "/api/people"))["people"]] == [CARL]
    [line] = [line for line in said if line["event"] == "person forgotten"]
    assert (line["person"], line["by"].split("~")[0]) == (anna["id"], "operator")
    assert not any(name.decode() in str(line) for name in (*_HIDDEN, CARL.encode()))
    after = await doors.log()
    assert after[:2] == log and first_break(after) is None
    assert (await _rows(other))["problems"] == rows["problems"] and await _differences(doors.platform) == []


async def test_an_operator_finds_what_a_person_did(doors: Doors, door: Running) -> None:
    """By name, as long as that is known; a name is not looked for in what others did."""
    await published(door)
    await published(door, "carl")
    for name, expected in ((ANNA, [1]), (CARL, [2]), ("anna", [])):
        found = await read(door, "carl", "/api/events", actor=name)
        assert [event["position"] for event in found["events"]] == expected, name
    doors.take_out(ANNA)
    await forget(door, ANNA)
    assert (await read(door, "carl", "/api/events", actor=ANNA))["events"] == []


async def test_nobody_can_open_a_name_whose_key_is_gone(doors: Doors, door: Running) -> None:
    """Nothing in the database opens it, not with the key file either; coming back is being somebody new."""
    problem_id, _ = await published(door)
    doors.take_out(ANNA)
    await forget(door, ANNA)
    held = await doors.everything()
    [actor] = [row["actor"] for row in await doors.log()]
    person = actor.split("~")[1]
    assert not any(
        person.encode() in value for place, values in held.items() for value in values if place.startswith("people")
    )
    doors.hand_out(TOKENS)
    again, _ = await published(door)
    async with doors.people() as people:
        assert await people.shown(actor) == f"{FORGOTTEN} (setter)"
        [back] = await people.actors_of(ANNA)
        assert back.split("~")[1] != person and again != problem_id
        assert await people.shown(back) == f"{ANNA} (setter)"
    events = (await read(door, "carl", "/api/events"))["events"]
    assert [event["actor"] for event in events] == [f"{FORGOTTEN} (setter)", f"{ANNA} (setter)"]


async def test_forgetting_twice_is_as_good_as_once(doors: Doors, door: Running) -> None:
    """By name or id, at once too; and who was never there is not there now."""
    await published(door)
    async with doors.people() as people:
        [anna] = await people.listed()
    doors.take_out(ANNA)
    told = await asyncio.gather(*(forget(door, anna.id) for _ in range(5)))
    assert sorted(one["forgotten"] for one in told) == [False] * 4 + [True]
    for who in (anna.id, ANNA, "a/b?c", "0" * 32):
        assert not (await forget(door, who))["forgotten"]


async def test_nobody_is_forgotten_whom_a_token_names(doors: Doors, door: Running) -> None:
    """With the next request that person would be known again: by name, by id, and before anything was done."""
    await published(door)
    async with doors.people() as people, client(door, "operator") as http:
        [anna] = await people.listed()
        for who in (ANNA, anna.id, BERT):
            reply = await http.delete(f"/api/people/{quote(who, safe='')}")
            problem = await reply.json()
            assert (reply.status, problem["code"]) == (409, "person_named") and "Take that entry out" in problem[
                "detail"
            ]
        assert await people.listed() == [anna]
        doors.take_out(ANNA)
        assert (await forget(door, anna.id))["forgotten"]


async def test_who_was_taken_out_is_out(doors: Doors, door: Running) -> None:
    """In the documented order, a token, a browser and a stream that it had open make nobody known again."""
    await published(door)
    jar = aiohttp.CookieJar(unsafe=True)
    async with aiohttp.ClientSession(door.url, cookie_jar=jar) as browser, client(door, "anna") as http:
        own = {"Sec-Fetch-Site": "same-origin"}
        await browser.post("/sign-in", data={"token": "anna"}, headers=own)
        assert (await browser.get("/api/problems")).status == 200
        async with http.get("/api/events/stream") as stream:
            doors.take_out(ANNA)
            assert (await forget(door, ANNA, "operator"))["forgotten"]
            async with asyncio.timeout(10):
                await stream.content.read()  # to its end
        assert (await browser.post("/api/problems", json=NEW, headers=own)).status == 401
        assert (await http.post("/api/problems", json=NEW)).status == 401
        assert (await browser.post("/sign-in", data={"token": "anna"}, headers=own)).status == 401
    async with doors.people() as people:
        assert await people.listed() == []


async def test_a_request_that_was_begun_before_makes_nobody_known(doors: Doors, door: Running) -> None:
    """Its body takes its time: meanwhile the token is taken out, and the person forgotten."""
    await published(door)

    async def slowly() -> AsyncIterator[bytes]:
        doors.take_out(ANNA)
        assert (await forget(door, ANNA, "operator"))["forgotten"]
        yield json.dumps(NEW).encode()

    async with client(door, "anna") as http, http.post("/api/problems", data=slowly(), expect100=True) as reply:
        assert reply.status == 401
    async with doors.people() as people:
        assert await people.listed() == []


async def test_who_asks_together_shares_a_question(doors: Doors, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of streams show an event in the same moment; none of them sees a name that was forgotten before."""
    async with doors.people() as people:
        actor = await people.actor("setter", ANNA)
        asked: list[str] = []
        fetch = people._pool.fetch

        async def counting(query: str, *arguments: Any) -> Any:
            asked.append(query)
            return await fetch(query, *arguments)

        monkeypatch.setattr(people, "_pool", Mock(fetch=counting))
        assert set(await asyncio.gather(*(people.shown(actor) for _ in range(500)))) == {f"{ANNA} (setter)"}
        assert len(asked) == 1
        early = asyncio.create_task(people.shown(actor))
        while len(asked) == 1:  # noqa: ASYNC110 - the question is on its way
            await asyncio.sleep(0)
        late = people.shown(actor)
        await asyncio.gather(early, late)
        assert len(asked) == 3


async def test_only_operators_list_and_forget(door: Running) -> None:
    """To everybody else the people are what they see in events."""
    for name in ("anna", "bert"):
        async with client(door, name) as http:
            assert (await http.get("/api/people")).status == 403
            assert (await http.delete("/api/people/carl")).status == 403


async def test_reading_makes_nobody_known(doors: Doors, door: Running) -> None:
    """A key is made when somebody acts: looking around leaves no trace of a person."""
    await read(door, "anna", "/api/problems")
    await read(door, "anna", "/api/events")
    async with doors.people() as people:
        assert await people.listed() == []


async def test_another_key_file_is_refused(doors: Doors, door: Running) -> None:
    """Rather than to give everybody a second identity: a gateway says so at its start, and without a file as well."""
    wrong = doors.directory / "wrong.key"
    write_private(wrong, secrets.token_hex(32).encode())
    async with doors.people(wrong) as early:  # nobody is known yet: any file will do
        await published(door)
        with pytest.raises(SettingsError, match="another one"):
            await early.actor("setter", BERT)
    with pytest.raises(SettingsError, match="Set people_key_file to the file that this platform has had"):
        async with doors.people(wrong):
            pass
    with pytest.raises(SettingsError, match="another one"):
        async with running(create_app, doors.settings(people_key_file=wrong)):
            pass
    async with connect_pool(doors.platform.role_url("gateway"), "gateway", size=1) as pool:
        with pytest.raises(SettingsError, match="not given"):
            await People.open(pool, None)


async def test_what_was_not_sealed_so_is_not_shown_as_a_name(doors: Doors) -> None:
    """A sealed text that somebody moved to another person or changed is refused by its tag."""
    async with doors.people() as people:
        anna, bert = [await people.actor("setter", name) for name in (ANNA, BERT)]
        standing, person, sealed = anna.split("~")
        changed = sealed[:-4] + ("AAAA" if sealed[-4:] != "AAAA" else "BBBB")
        for other in (
            f"{standing}~{person}~{changed}",
            f"{standing}~{bert.split('~')[1]}~{sealed}",
            f"{standing}~{person}~A",
        ):
            assert await people.shown(other) == f"{UNREADABLE} (setter)"
        assert await people.shown("service:storage") == "service:storage"


async def test_only_the_gateway_may_look_at_people(doors: Doors) -> None:
    """Not the services, the relay or who reads the log for an audit; and the gateway changes no row."""
    for process in ("problems", "storage", "rounds", "orchestrator", "relay", "auditor", "notary"):
        connection = await asyncpg.connect(doors.platform.role_url(process).reveal())
        try:
            for table in ("keys", "actors", "key_file"):
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await connection.fetch(f"select * from people.{table}")
        finally:
            await connection.close()
    connection = await asyncpg.connect(doors.platform.role_url("gateway").reveal())
    try:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute("update people.keys set sealed = ''")
    finally:
        await connection.close()


async def test_without_the_database_names_are_not_made_up(doors: Doors) -> None:
    """Neither sealed in another way nor called forgotten: whoever asks is told to ask again."""
    async with connect_pool(doors.platform.role_url("gateway"), "gateway", size=1) as pool:
        people = await People.open(pool, read_key_file(doors.key_file, needed=True))
        actor = await people.actor("setter", ANNA)
    for asking in (
        people.actor("setter", ANNA),
        people.shown(actor),
        people.listed(),
        people.forget(ANNA, by="operator", named=()),
    ):
        with pytest.raises(FedotaError, match="unavailable"):
            await asking


async def test_a_problem_of_the_first_version_is_read_as_ever(doors: Doors, door: Running) -> None:
    """`ProblemCreated` as it was recorded before its actor was its setter: in the read model, and for a client."""
    problem_id, actor = new_id(), "setter"
    data = json.loads(example("ProblemCreated", 1)) | {"problem_id": problem_id}
    connection = await asyncpg.connect(doors.platform.role_url("problems").reveal())
    try:
        [row] = await connection.fetch(
            "select * from fedota.append(array[$1], array[''::bytea], array[$2], array[0], array[null::bytea],"
            " array[1], array[$3], array[gen_random_uuid()], array[null::uuid], array[null::text],"
            " array[gen_random_uuid()], array['ProblemCreated'], array[1], array[$4::bytea])",
            *(new_id(), f"problems/{problem_id}", actor, json.dumps(data).encode()),
        )
    finally:
        await connection.close()
    shown = await read(door, "carl", f"/api/problems/{problem_id}", at_least=str(row["position"]))
    assert (shown["setter"], shown["name"]) == ("setter", "Tumours")
    [event] = (await read(door, "carl", "/api/events"))["events"]
    assert event["schemaversion"] == 1 and event["data"]["setter"] == "setter"
    async with Api.open(door.url, "carl") as api:
        [decoded] = await api.events(problem_id)
        assert isinstance(decoded.data, ProblemCreated) and decoded.data.name == "Tumours"


async def fedota(door: Running, *arguments: str, answer: str = "") -> tuple[int, str, str]:
    """The command, at a terminal: its exit status, what it printed, and what it said beside."""
    environment = {**os.environ, "FEDOTA_TOKEN": "operator"}
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "fedota", "people", *arguments, "--url", door.url),
        stdin=PIPE,
        stdout=PIPE,
        stderr=PIPE,
        env=environment,
    )
    printed, said = await child.communicate(answer.encode())
    assert child.returncode is not None
    return child.returncode, printed.decode(), said.decode()


async def test_the_command(doors: Doors, door: Running) -> None:
    """It lists and forgets, asks before what cannot be undone, and says when there is nobody."""
    code, printed, said = await fedota(door, "list")
    assert (code, printed) == (0, "") and "Nobody" in said
    await published(door)
    await published(door, "carl")
    code, printed, _ = await fedota(door, "list", "--json")
    anna, carl = map(json.loads, printed.splitlines())
    assert (code, anna["name"], carl["name"]) == (0, ANNA, CARL)
    code, printed, _ = await fedota(door, "list")
    assert code == 0 and ANNA in printed and anna["id"] in printed

    code, _, said = await fedota(door, "forget", ANNA, answer="n\n")
    assert code == 1 and "Aborted" in said
    code, printed, said = await fedota(door, "forget", ANNA, "--yes")
    assert (code, printed) == (1, "") and "Take that entry out" in said
    doors.take_out(ANNA, CARL)
    assert (await fedota(door, "forget", ANNA, answer="y\n"))[0] == 0
    assert (await fedota(door, "forget", carl["id"], "--yes"))[0] == 0
    code, printed, said = await fedota(door, "forget", ANNA, "--yes")
    assert (code, printed) == (1, "") and "Nobody was forgotten" in said
    assert {event["actor"] for event in (await read(door, "operator", "/api/events"))["events"]} == {
        f"{FORGOTTEN} (setter)",
        f"{FORGOTTEN} (operator)",
    }


@asynccontextmanager
async def _frames(stream: aiohttp.ClientResponse) -> AsyncIterator[AsyncIterator[dict[str, str]]]:
    found = frames(stream)
    assert isinstance(found, AsyncGenerator)
    async with aclosing(found):
        yield found


async def _rows(door: Running) -> dict[str, Sequence[tuple[Any, ...]]]:
    pool = door.app[PARTS].reads._pool
    return {
        name: [tuple(row) for row in await pool.fetch(f"select * from {name} order by 1, 2, 3")]
        for name in PROJECTION.names
    }


async def _differences(platform: Platform) -> list[Difference]:
    """What a rebuild would change."""
    async with (
        connect_pool(platform.role_url("gateway"), "gateway", size=3) as pool,
        platform.log("gateway") as log,
    ):
        _, found = await verify(PROJECTION, pool, log, lambda done, whole: None)
        return found
