"""What operators ask through the gateway: of its own projection, and of processes that the test plays."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import aiohttp
import msgspec
import pytest

from fedota.contracts import subjects
from fedota.contracts.operations import DeadLetter, DeadLetterRequest, DeadLetters, ProjectionStatus, Retried, Work
from fedota.errors import FedotaError
from fedota.events import to_json
from fedota.kernel.bus import Bus
from tests.support.waiting import until

NOW = datetime.now(UTC)
PLAYED = "rounds"


class Process:
    """A process with a projection, as the gateway meets it."""

    def __init__(self) -> None:
        self.status = ProjectionStatus(process=PLAYED, position=4, head=5, parked=2)
        self.letters = [
            DeadLetter(position=position, subject=f"rounds/{stream}", type="RoundUpdated", error="why", parked=NOW)
            for position, stream in ((2, "a"), (3, "b"), (4, "a"))
        ]
        self.retried = Retried(handled=1, left=1, error="again")
        self.asked: list[tuple[str, Any]] = []

    async def answer(self, subject: str, body: bytes) -> bytes:
        """What it says."""
        name = subject.rpartition(".")[2]
        self.asked.append((name, msgspec.json.decode(body)))
        match name:
            case "status":
                return to_json(self.status)
            case "rebuild" | "verify":
                if self.status.work is not None:
                    raise FedotaError("conflict", "The read model is being rebuilt already.")
                self.status = msgspec.structs.replace(self.status, work=Work(kind="rebuild", started=NOW))
                return to_json(self.status)
            case "dead_letters":
                return to_json(DeadLetters(dead_letters=self.letters))
            case "retry":
                return to_json(self.retried)
        request = msgspec.json.decode(body, type=DeadLetterRequest)
        return to_json(msgspec.structs.replace(self.letters[0], state="dropped", dropped_by=request.actor))

    @asynccontextmanager
    async def running(self, bus: Bus) -> AsyncIterator["Process"]:
        """It answers."""
        names = ("status", "rebuild", "verify", "dead_letters", "retry", "drop")
        await bus.answer({subjects.operation(PLAYED, name): self.answer for name in names})
        yield self


@pytest.fixture
async def played(platform: Any) -> AsyncIterator[Process]:
    """A played process beside the real gateway; the others are not there."""
    async with AsyncExitStack() as stack:
        bus = await stack.enter_async_context(platform.ground.bus(PLAYED))
        yield await stack.enter_async_context(Process().running(bus))


async def body(reply: aiohttp.ClientResponse, status: int = 200) -> Any:
    """The answer, which has this status."""
    answer = await reply.json(content_type=None)
    assert reply.status == status, answer
    return answer


async def test_how_far_each_projection_is(platform: Any, played: Process) -> None:
    """Those who answer tell it, and who does not is named: nobody hides the others."""
    await platform.record(platform.story(str(uuid4()))[0])
    await platform.projector.catch_up()
    async with platform.client("operator") as operator:
        told = await body(await operator.get("/api/projections"))
        assert sorted(told["unavailable"]) == ["orchestrator", "problems", "storage"]
        by_name = {row["process"]: row for row in told["projections"]}
        assert by_name["gateway"]["position"] == by_name["gateway"]["head"] == 1
        assert by_name[PLAYED] == msgspec.to_builtins(played.status)
        silent = await operator.get("/api/projections/storage")
        assert (await body(silent, 503))["code"] == "unavailable" and silent.headers["Retry-After"]


async def test_a_process_that_nobody_knows_is_said_to_be_none(platform: Any, played: Process) -> None:
    """With the names of those that there are."""
    async with platform.client("operator") as operator:
        for method, address in [
            ("GET", "/api/projections/relay"),
            ("POST", "/api/projections/x/rebuild"),
            ("GET", "/api/deadletters?process=x"),
            ("GET", "/api/deadletters/x/1"),
            ("POST", "/api/deadletters/x/1/drop"),
        ]:
            refusal = await body(await operator.request(method, address), 404)
            assert refusal["code"] == "not_found" and "gateway, orchestrator, problems" in refusal["detail"], address
        for nonsense in ("0", "x", "-1", "9" * 30):
            assert (await body(await operator.get(f"/api/deadletters/{PLAYED}/{nonsense}"), 404))["code"] == "not_found"
        assert not played.asked


async def test_work_is_begun_once(platform: Any, played: Process) -> None:
    """To begin what is being done is no error and begins nothing; other work meanwhile is refused in words."""
    async with platform.client("operator") as operator:
        for _ in range(2):
            begun = await operator.post(f"/api/projections/{PLAYED}/rebuild")
            assert (await body(begun, 202))["work"]["kind"] == "rebuild"
            assert begun.headers["Location"] == f"/api/projections/{PLAYED}"
        refusal = await body(await operator.post(f"/api/projections/{PLAYED}/verify"), 409)
        assert refusal["code"] == "conflict" and "being rebuilt" in refusal["detail"]
        refusal = await body(await operator.post(f"/api/projections/{PLAYED}/rebuild", json={"now": True}), 422)
        assert list(refusal["fields"]) == ["now"]
        assert ("rebuild", {"actor": "operator"}) in played.asked


async def test_dead_letters_are_looked_at_retried_and_dropped(platform: Any, played: Process) -> None:
    """With the event, those parked behind it, and who gave it up."""
    await platform.record(*platform.story(str(uuid4()))[:2])
    async with platform.client("operator") as operator:
        listed = await body(await operator.get("/api/deadletters", params={"process": PLAYED}))
        assert [row["position"] for row in listed["dead_letters"]] == [2, 3, 4] and not listed["unavailable"]
        everybody = await body(await operator.get("/api/deadletters"))
        assert everybody["dead_letters"] == listed["dead_letters"] and "storage" in everybody["unavailable"]
        await body(await operator.get("/api/deadletters", params={"process": "storage"}), 503)
        shown = await body(await operator.get(f"/api/deadletters/{PLAYED}/2"))
        assert (shown["event"]["position"], [row["position"] for row in shown["behind"]]) == (2, [4])
        await body(await operator.get(f"/api/deadletters/{PLAYED}/9"), 404)
        retried = await body(await operator.post(f"/api/deadletters/{PLAYED}/2/retry"))
        assert retried == {"handled": 1, "left": 1, "error": "again"}
        dropped = await body(await operator.post(f"/api/deadletters/{PLAYED}/2/drop"))
        assert (dropped["state"], dropped["dropped_by"]) == ("dropped", "operator")
        assert ("drop", {"position": 2, "actor": "operator"}) in played.asked


async def test_only_operators_may(platform: Any, played: Process) -> None:
    """No other role reaches a process."""
    for role in ("setter", "organization"):
        async with platform.client(role) as somebody:
            for method, address in [
                ("GET", "/api/projections"),
                ("GET", f"/api/projections/{PLAYED}"),
                ("POST", f"/api/projections/{PLAYED}/rebuild"),
                ("POST", f"/api/projections/{PLAYED}/verify"),
                ("GET", "/api/deadletters"),
                ("GET", f"/api/deadletters/{PLAYED}/2"),
                ("POST", f"/api/deadletters/{PLAYED}/2/retry"),
                ("POST", f"/api/deadletters/{PLAYED}/2/drop"),
            ]:
                assert (await body(await somebody.request(method, address), 403))["code"] == "forbidden"
    assert not played.asked


async def test_the_gateways_own_read_model_is_verified_and_rebuilt(platform: Any) -> None:
    """A row that something else wrote is found, named, and put right by a rebuild, while reads go on."""
    problem_id = str(uuid4())
    position = await platform.record(*platform.story(problem_id))
    await platform.projector.catch_up()
    pool = platform.pool

    async with platform.client("operator") as operator:

        async def worked(kind: str) -> Any:
            await body(await operator.post(f"/api/projections/gateway/{kind}"), 202)

            async def finished() -> Any:
                work = (await body(await operator.get("/api/projections/gateway")))["work"]
                return work if work["kind"] == kind and work["finished"] else None

            return await until(finished, f"{kind} is done")

        work = await worked("verify")
        assert (work["error"], work["differences"]) == ("", []) and work["rows"] > 10
        await pool.execute("update problems set state = 'stopped'")
        work = await worked("verify")
        [difference] = work["differences"]
        assert (difference["table"], difference["live"], difference["rebuilt"]) == ("problems", 1, 1)
        assert any("stopped" in example for example in difference["examples"])
        assert (await worked("rebuild"))["error"] == ""
        read = await body(await operator.get(f"/api/problems/{problem_id}", params={"at_least": position}))
        assert read["state"] == "running"
        assert (await worked("verify"))["differences"] == []
