"""The REST interface, against real servers."""

import asyncio
import gzip
import io
from typing import Any
from uuid import UUID, uuid4

import msgspec
import pytest

from fedota.contracts import commands
from fedota.errors import FedotaError
from fedota.events import orchestrator as infra
from fedota.events.problems import ParticipationRequested, ProblemCompleted
from fedota.kernel.projection import Projector
from fedota.kernel.rebuilding import rebuild, verify
from gateway.projection import PROJECTION

NEW = {
    "name": "Tumours",
    "description": "About",
    "data_format": "csv",
    "client_image": "registry.test/image",
    "plan": {"rounds": 3, "goal_count": 2},
}
FILE = {"name": "model.safetensors", "size": 10, "sha256": "a" * 64, "role": "model"}


async def test_a_problem_from_publication_to_start(platform: Any) -> None:
    """Each command reaches its owner with the role as actor, and what it did can be read at its position."""
    async with platform.client("setter") as setter, platform.client("organization") as organization:
        made = await setter.post("/api/problems", json=NEW)
        assert made.status == 201
        problem_id = (await made.json())["problem_id"]
        assert made.headers["Location"] == f"/api/problems/{problem_id}"
        position = made.headers["Fedota-Position"]
        read = await (await setter.get(f"/api/problems/{problem_id}", params={"at_least": position})).json()
        assert (read["state"], read["setter"], read["plan"]["rounds"]) == ("draft", "setter", 3)

        path = f"/api/problems/{problem_id}"
        slots = await (await setter.post(f"{path}/uploads", json={"files": [FILE]})).json()
        assert slots["slots"][0]["name"] == FILE["name"] and slots["seconds"] == 600
        assert (await setter.post(f"{path}/files", json={"files": [FILE]})).status == 200
        joined = await organization.post(f"{path}/participations", json={"organization": "Clinic A"})
        assert joined.status == 201
        member = f"{path}/participations/Clinic%20A"
        assert (await setter.post(f"{member}/approve")).status == 200
        started = await setter.post(f"{path}/start")
        after = {"at_least": started.headers["Fedota-Position"]}
        read = await (await setter.get(path, params=after)).json()
        assert (read["state"], read["run"], read["infrastructure"]["state"]) == ("running", 1, "starting")
        assert read["participations"] == {"approved": 1, "requested": 0}
        stopped = await setter.post(f"{path}/stop", json={"reason": "enough"})
        read = await (await setter.get(path, params={"at_least": stopped.headers["Fedota-Position"]})).json()
        assert (read["state"], read["reason"]) == ("stopped", "enough")
        actors = [(type(command).__name__, request.actor) for request, command in platform.requests]
        assert ("CreateProblem", "setter") in actors and ("RequestParticipation", "organization") in actors


async def test_a_problem_is_there_the_moment_after_it_was_published(platform: Any) -> None:
    """Who does not ask for a position still does not get a 404 for what was just made."""
    async with platform.client("setter") as setter:
        for _ in range(5):
            made = await (await setter.post("/api/problems", json=NEW)).json()
            assert (await setter.get(f"/api/problems/{made['problem_id']}")).status == 200


async def test_the_same_idempotency_key_names_the_same_problem(platform: Any) -> None:
    """A retry must not publish a second problem; another role's same key is another request."""
    async with platform.client("setter") as setter, platform.client("operator") as operator:
        headers = {"Idempotency-Key": "once"}
        ids = [
            (await (await one.post("/api/problems", json=NEW, headers=headers)).json())["problem_id"]
            for one in (setter, setter, operator)
        ]
        assert ids[0] == ids[1] != ids[2] and UUID(ids[0])
        assert [request.key for request, _ in platform.requests] == ["once"] * 3
        assert (await setter.post("/api/problems", json=NEW, headers={"Idempotency-Key": "x" * 201})).status == 422


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"name": ""}, "name"),
        ({"plan": {"rounds": 0, "goal_count": 2}}, "plan.rounds"),
        ({"plan": {"goal_count": 2}}, "plan.rounds"),
        ({"surprise": 1}, "surprise"),
        ({"client_image": 3}, "client_image"),
    ],
)
async def test_wrong_fields_are_named(platform: Any, change: dict[str, Any], field: str) -> None:
    """A refused body says which field and why, and no command is sent."""
    async with platform.client("setter") as setter:
        reply = await setter.post("/api/problems", json={**NEW, **change})
        body = await reply.json(content_type="application/problem+json")
        assert (reply.status, body["code"]) == (422, "invalid_field")
        assert list(body["fields"]) == [field]
        assert platform.requests == []


async def test_bodies_that_are_no_json_or_too_large_are_refused(platform: Any) -> None:
    """Nothing but plain JSON of at most a megabyte is read."""
    async with platform.client("setter") as setter:

        async def post(data: bytes, **headers: str) -> tuple[int, str]:
            reply = await setter.post("/api/problems", data=io.BytesIO(data), headers=headers)
            return reply.status, (await reply.json(content_type="application/problem+json"))["code"]

        assert await post(b"{") == (400, "invalid_request")
        assert await post(b"\xff") == (400, "invalid_request")
        assert await post(b"[]") == (422, "invalid_field")
        assert await post(b" " * 1_048_577) == (413, "too_large")
        squeezed = gzip.compress(b" " * 10_000)
        assert await post(squeezed, **{"Content-Encoding": "gzip"}) == (415, "unsupported_encoding")
        flat = msgspec.json.encode({**NEW, "plan": {"rounds": 1, "goal_count": 1, "client_config": {"a": 1}}})
        deep = b'{"a":' * 9999 + b"1" + b"}" * 9999
        assert await post(flat.replace(b'{"a":1}', deep)) == (400, "invalid_request")
        assert platform.requests == []


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b'{"reason":"a","reason":"b"}', "reason"),
        (b'{"reason":"a\\u0000b"}', "reason"),
        (b'{"\\u0000":1}', "\0"),
    ],
)
async def test_what_two_readers_would_read_differently_is_refused(platform: Any, body: bytes, field: str) -> None:
    """A field that is there twice, and the character that no database takes."""
    async with platform.client("setter") as setter:
        reply = await setter.post(f"/api/problems/{uuid4()}/stop", data=body)
        refusal = await reply.json(content_type="application/problem+json")
        assert (reply.status, refusal["code"], list(refusal["fields"])) == (422, "invalid_field", [field])
        assert platform.requests == []


async def test_what_no_text_column_holds_is_shown_all_the_same(platform: Any) -> None:
    """A process may log any character: that must not park the event and with it the whole problem."""
    problem_id = str(uuid4())
    failed = infra.InfraFailed(problem_id=problem_id, run=1, namespace="ns", reason="exit \0 now", log=["a\0b"])
    position = await platform.record(*platform.story(problem_id), failed)
    async with platform.client("setter") as setter:
        seen = await (await setter.get(f"/api/problems/{problem_id}", params={"at_least": position})).json()
        assert seen["infrastructure"]["failure"] == "exit \ufffd now"
        assert (await setter.get("/readyz")).status == 200


async def test_whatever_bytes_come_the_answer_is_whole(platform: Any) -> None:
    """Paths, headers and methods that no client library sends: refused in words, and nothing breaks."""
    key = b"Authorization: Bearer fdt_setter_made_up\r\n"
    problem = f"/api/problems/{uuid4()}".encode()
    for line, headers, statuses in [
        (b"GET /api/\xff\xfe HTTP/1.1", key, {400, 404}),
        (b"GET /api/%ff%00 HTTP/1.1", key, {404}),
        (b"GET /\xff HTTP/1.1", key + b"Accept: text/html\r\n", {400, 404}),
        (b"GET /api/problems/" + b"a" * 6000 + b" HTTP/1.1", key, {404}),
        (b"GET /api/" + b"a" * 90_000 + b" HTTP/1.1", key, {400}),
        (b"GET /api/problems?limit=%ff HTTP/1.1", key, {422}),
        (b"GET /api/problems?at_least=" + "²".encode() + b" HTTP/1.1", key, {400, 422}),
        (b"GET /api/problems HTTP/1.1", b"Authorization: Bearer \xff\xfe\r\n", {401}),
        (b"GET /api/problems HTTP/1.1", b"Cookie: fedota=\xff\r\n", {401}),
        (b"GET /api/events?type=\xff HTTP/1.1", key, {400, 422}),
        (b"PROPFIND /api/problems HTTP/1.1", key, {405}),
        (b"POST " + problem + b"/start HTTP/1.1", key + b"Idempotency-Key: \xff\r\n", {422}),
        (b"POST " + problem + b"/start HTTP/1.1", key + b"Idempotency-Key: \r\n", {422}),
        (b"GET " + problem + b"/files/%2e%2e%2fsecret HTTP/1.1", key, {404, 422}),
    ]:
        status, body = await raw(platform.url, line, headers)
        assert status in statuses, (line[:60], status, body[:200])
        assert b"Traceback" not in body
    assert platform.requests == []


async def raw(url: str, line: bytes, headers: bytes) -> tuple[int, bytes]:
    """The status and the body that very bytes are answered with."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(line + b"\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n" + headers + b"\r\n")
        async with asyncio.timeout(10):
            answer = await reader.read()
    finally:
        writer.close()
        await writer.wait_closed()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]), body


async def test_unknown_routes_and_methods_answer_problem_json(platform: Any) -> None:
    """Whatever is asked for, the answer can be read by a program."""
    async with platform.client("setter") as setter:
        for method, path, status, code in [
            ("GET", "/api/nothing", 404, "not_found"),
            ("GET", "/nothing", 404, "not_found"),
            ("PUT", "/api/problems", 405, "method_not_allowed"),
            ("GET", "/api/problems/nothing", 404, "problem_not_found"),
            ("GET", f"/api/problems/{uuid4()}", 404, "problem_not_found"),
            ("GET", "/api/problems?limit=-1", 422, "invalid_field"),
            ("GET", "/api/events?problem=x", 422, "invalid_field"),
            ("POST", f"/api/problems/{uuid4()}/participations/%00/approve", 422, "invalid_field"),
        ]:
            reply = await setter.request(method, path)
            body = await reply.json(content_type="application/problem+json")
            assert (reply.status, body["code"], body["status"]) == (status, code, status), path
        assert (await setter.put("/api/problems")).headers["Allow"] == "GET, HEAD, POST"


async def test_errors_of_services_pass_and_unforeseen_ones_keep_their_text(
    platform: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service's own words reach the caller; those of a defect never do."""
    async with platform.client("setter") as setter:
        platform.refusal = FedotaError("unavailable", "Busy.", retry_after=7)
        reply = await setter.post("/api/problems", json=NEW)
        assert (reply.status, reply.headers["Retry-After"]) == (503, "7")
        platform.refusal = FedotaError("problem_state", "It is running.")
        reply = await setter.post(f"/api/problems/{uuid4()}/start")
        assert (await reply.json(content_type=None))["detail"] == "It is running."

        async def defect(*_: object) -> None:
            raise RuntimeError("the password is 1234")

        monkeypatch.setattr("gateway.reads.Reads.problems", defect)
        reply = await setter.get("/api/problems")
        assert reply.status == 500 and "1234" not in await reply.text()


async def test_rounds_model_and_infrastructure(platform: Any) -> None:
    """A round's newest state, its checkpoint as the model, and the log of a failure for those who may see it."""
    problem_id = str(uuid4())
    path = f"/api/problems/{problem_id}"
    async with platform.client("setter") as setter, platform.client("organization") as organization:
        position = await platform.record(*platform.story(problem_id)[:-1])
        reply = await setter.get(f"{path}/model", params={"at_least": position})
        assert (reply.status, (await reply.json(content_type=None))["code"]) == (409, "problem_state")
        position = await platform.record(platform.round(problem_id, 4, "completed"))
        rounds = await (await setter.get(f"{path}/rounds", params={"at_least": position})).json()
        assert [(row["round"], row["stage"]) for row in rounds["rounds"]] == [(1, "completed")]
        one = await (await setter.get(f"{path}/rounds/1")).json()
        assert one["attempts"][0]["metrics"] == {"loss": 1.0}
        for nowhere in ("rounds/2", "rounds/0", "rounds/x", "rounds/²", "rounds/99999999999", "rounds/2/checkpoint"):
            assert (await setter.get(f"{path}/{nowhere}")).status == 404, nowhere
        model = await (await setter.get(f"{path}/model")).json()
        assert model == {
            "url": "https://s3.test/k/1.safetensors",
            "seconds": 600,
            "run": 1,
            "round": 1,
            "key": "k/1.safetensors",
            "sha256": "b" * 64,
            "size": 9,
        }
        assert await (await setter.get(f"{path}/rounds/1/checkpoint")).json() == model
        file = await (await organization.get(f"{path}/files/model.safetensors")).json()
        assert file["url"] == "https://s3.test/k/model.safetensors"
        assert (await organization.get(f"{path}/files/other")).status == 404

        failed = infra.InfraFailed(problem_id=problem_id, run=1, namespace="ns", reason="no memory", log=["line"])
        stopped = infra.InfraStopped(problem_id=problem_id, run=1, namespace="ns", reason="cleaned up")
        position = await platform.record(failed, stopped)
        seen = await (await setter.get(f"{path}/infrastructure", params={"at_least": position})).json()
        assert (seen["state"], seen["failure"], seen["log"]) == ("stopped", "no memory", ["line"])
        seen = await (await organization.get(f"{path}/infrastructure")).json()
        assert (seen["failure"], "log" in seen) == ("no memory", False)
        page = await (await organization.get("/api/events", params={"problem": problem_id, "limit": 1000})).json()
        told = [event["data"]["log"] for event in page["events"] if event["type"] == "InfraFailed"]
        assert told == [[]]


async def test_the_join_kit_waits_for_approval_and_infrastructure(platform: Any) -> None:
    """Each refusal says which step is missing; a token of another organization opens nothing."""
    problem_id = str(uuid4())
    path = f"/api/problems/{problem_id}/participations"
    story = platform.story(problem_id)
    async with platform.client("organization") as organization, platform.client("clinic") as clinic:

        async def kit(name: str = "Clinic A", who: Any = organization, position: int = 0) -> tuple[int, Any]:
            reply = await who.get(f"{path}/{name}/kit", params={"at_least": position})
            return reply.status, await reply.json(content_type=None)

        here = (await organization.get("/livez")).url.origin()
        assert (await kit(position=await platform.record(*story[:2])))[1]["code"] == "participation_not_found"
        assert (await kit(position=await platform.record(story[2])))[1]["code"] == "participation_state"
        status, body = await kit(position=await platform.record(*story[3:5]))
        assert (status, body["code"]) == (409, "problem_state") and "starting" in body["detail"]
        position = await platform.record(story[5], ParticipationRequested(problem_id=problem_id, organization="B"))
        status, body = await kit(position=position)
        assert (status, body) == (
            200,
            {
                "problem_id": problem_id,
                "name": "Name",
                "organization": "Clinic A",
                "token": "a.b.c",
                "selectors": ["http://s0"],
                "expires": 2_000_000_000,
                "authority": "PEM",
                "page": f"{here}/problems/{problem_id}",
            },
        )
        assert (await kit(who=clinic))[0] == 200
        assert (await kit("B", who=clinic))[1]["code"] == "forbidden"
        assert isinstance(platform.requests[-1][1], commands.IssueToken)
        assert platform.requests[-1][0].actor == "organization:Clinic A"


async def test_a_kit_is_had_before_the_read_model_is_rebuilt(platform: Any) -> None:
    """A training that ran through an upgrade needs its clients: it has no authority, and no column for one."""
    problem_id = str(uuid4())
    position = await platform.record(*platform.story(problem_id)[:6])
    async with platform.client("clinic") as clinic:
        path = f"/api/problems/{problem_id}/participations/Clinic A/kit"
        assert (await clinic.get(path, params={"at_least": position})).status == 200
        await platform.pool.execute("alter table infrastructure drop column authority")
        reply = await clinic.get(path)
        kit = await reply.json(content_type=None)
    assert (reply.status, kit["authority"], kit["selectors"]) == (200, "", ["http://s0"])


async def test_lists_are_paged(platform: Any) -> None:
    """Nothing is left out and nothing comes twice over pages of problems, rounds and events."""
    ids = [str(uuid4()) for _ in range(5)]
    async with platform.client("operator") as operator:
        position = 0
        for problem_id in ids:
            position = await platform.record(platform.story(problem_id)[0])
        rounds = [platform.round(ids[0], number, "completed", number) for number in range(1, 6)]
        position = await platform.record(*rounds)

        async def pages(path: str, name: str, cursor: str) -> list[Any]:
            found: list[Any] = []
            params: dict[str, Any] = {"limit": 2, "at_least": position, "run": 1}
            for _ in range(9):
                body = await (await operator.get(path, params=params)).json()
                found += body[name]
                if not body[name] or body["next"] is None:
                    return found
                params[cursor] = body["next"]
            raise AssertionError("the pages have no end")

        assert [row["problem_id"] for row in await pages("/api/problems", "problems", "before")] == ids[::-1]
        assert [row["round"] for row in await pages(f"/api/problems/{ids[0]}/rounds", "rounds", "after")] == [
            1,
            2,
            3,
            4,
            5,
        ]
        positions = [event["position"] for event in await pages("/api/events", "events", "after")]
        assert positions == list(range(1, position + 1))


async def test_the_list_says_which_round_each_problem_is_in(platform: Any) -> None:
    """The newest attempt of the newest round, of each problem its own."""
    ids = [str(uuid4()) for _ in range(3)]
    for count, problem_id in enumerate(ids):
        await platform.record(platform.story(problem_id)[0])
        await platform.record(*(platform.round(problem_id, n, "completed", n) for n in range(1, count + 1)))
    async with platform.client("setter") as setter:
        await platform.projector.catch_up()
        listed = (await (await setter.get("/api/problems")).json())["problems"]
        rounds = {row["problem_id"]: row["latest_round"] and row["latest_round"]["round"] for row in listed}
        assert rounds == {ids[0]: None, ids[1]: 1, ids[2]: 2}


async def test_events_are_asked_for_by_problem_and_type(platform: Any) -> None:
    """Only those that fit come, and pages go on where the last one ended."""
    mine, other = str(uuid4()), str(uuid4())
    await platform.record(*platform.story(other), *platform.story(mine))
    async with platform.client("setter") as setter:

        async def ask(**params: Any) -> list[int]:
            reply = await (await setter.get("/api/events", params=params)).json()
            return [event["position"] for event in reply["events"]]

        assert await ask(type="ProblemCreated") == [1, 11]
        both = [("type", "ProblemCreated"), ("type", "InfraSpawned"), ("problem", mine)]
        page = await (await setter.get("/api/events", params=both)).json()
        assert [event["type"] for event in page["events"]] == ["ProblemCreated", "InfraSpawned"]
        assert await ask(type="RoundUpdated", problem=mine, limit=2) == [17, 18]
        assert await ask(type="RoundUpdated", problem=mine, after=18) == [19, 20]
        reply = await setter.get("/api/events", params={"type": "ProblemVanished"})
        assert (reply.status, list((await reply.json(content_type=None))["fields"])) == (422, ["type"])


async def test_a_read_of_the_future_times_out_and_says_so(platform: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A position that nothing has reached is not waited for for ever."""
    monkeypatch.setattr(Projector.wait_for, "__defaults__", (0.1,))
    async with platform.client("setter") as setter:
        reply = await setter.get("/api/problems", params={"at_least": 999})
        assert (reply.status, reply.headers["Retry-After"]) == (504, "1")


async def test_a_rebuild_gives_the_same_rows(platform: Any) -> None:
    """The read model holds nothing that the log does not."""
    problem_id = str(uuid4())
    result = platform.story(problem_id)[4].model
    lost = infra.InfraDegraded(
        problem_id=problem_id, run=1, namespace="ns", component="selector-0", reason="r", log=["x"]
    )
    back = infra.InfraRecovered(problem_id=problem_id, run=1, namespace="ns", component="selector-0")
    done = ProblemCompleted(problem_id=problem_id, run=1, rounds=1, model=result)
    await platform.record(*platform.story(problem_id), lost, back, done)
    projector = platform.projector
    await projector.catch_up()
    before = await platform.rows()
    assert await verify(PROJECTION, projector._pool, projector._log) == (22, [])
    assert await rebuild(PROJECTION, projector._pool, projector._log) == 22
    assert await platform.rows() == before
    assert {name: len(rows) for name, rows in before.items()} == {
        "problems": 1,
        "files": 1,
        "participations": 1,
        "infrastructure": 2,
        "rounds": 1,
        "contributions": 3,
        "feed": 13,
    }
