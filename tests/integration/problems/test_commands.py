"""Each command over NATS, recorded in PostgreSQL."""

import asyncio
import time
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest

from fedota.contracts import commands, subjects
from fedota.contracts.commands import Command, IssuedToken, Request
from fedota.contracts.participation import verify
from fedota.errors import FedotaError
from fedota.events import to_json, uuid7
from fedota.events.problems import ModelFile, Plan, ProblemCreated, ProblemRevised, ProblemStarted, ProblemStopped
from fedota.events.storage import FilesDeleted
from fedota.kernel.settings import Secret
from tests.integration.problems.world import ABOUT, World, final
from tests.support.door import Door
from tests.support.services import new_id

CLINIC = "Clinic A"


async def test_a_problem_from_publication_to_its_second_run(served: World) -> None:
    """What is asked for is recorded as it was asked for, by whom, at the position that the reply names."""
    send, problem_id = served.platform.send, new_id()
    reply = await send(commands.CreateProblem(problem_id=problem_id, **ABOUT), actor="setter")
    await send(commands.ReviseProblem(problem_id=problem_id, plan=Plan(rounds=7, goal_count=1)))
    file = await served.store_model(problem_id)
    await send(commands.StartProblem(problem_id=problem_id))
    await send(commands.StopProblem(problem_id=problem_id, reason="a pause"))
    last = await send(commands.StartProblem(problem_id=problem_id), actor="operator")

    events = await served.platform.events(f"problems/{problem_id}")
    model = ModelFile(key=file.key, sha256=file.sha256, size=file.size)
    plan = Plan(rounds=7, goal_count=1)
    assert [event.data for event in events] == [
        ProblemCreated(problem_id=problem_id, **ABOUT),
        ProblemRevised(problem_id=problem_id, **{**ABOUT, "plan": plan}),
        ProblemStarted(problem_id=problem_id, run=1, plan=plan, model=model),
        ProblemStopped(problem_id=problem_id, run=1, reason="a pause"),
        ProblemStarted(problem_id=problem_id, run=2, plan=plan, model=model),
    ]
    assert (reply.position, last.position) == (events[0].position, events[-1].position)
    assert [event.actor for event in events] == ["setter"] * 4 + ["operator"]


async def test_participations(served: World) -> None:
    """Requested, refused, requested again, approved, revoked; what is not next is refused with its code."""
    problem_id = await served.create()
    clinic: dict[str, Any] = {"problem_id": problem_id, "organization": CLINIC}
    request, approve = commands.RequestParticipation(**clinic), commands.ApproveParticipation(**clinic)
    refuse = commands.RefuseParticipation(**clinic, reason="unknown to us")
    revoke = commands.RevokeParticipation(**clinic, reason="left")

    async def code(command: Command) -> str:
        return (await served.platform.refused(command)).problem.code

    assert await code(approve) == "participation_not_found"
    await served.platform.send(request, actor=f"organization:{CLINIC}")
    assert await code(request) == "participation_state"
    await served.platform.send(refuse)
    assert await code(approve) == "participation_state"
    await served.platform.send(request)
    await served.platform.send(approve)
    assert await code(refuse) == "participation_state"
    await served.platform.send(revoke)
    assert await code(revoke) == "participation_state"
    steps = ["Requested", "Refused", "Requested", "Approved", "Revoked"]
    assert await served.types(problem_id) == ["ProblemCreated", *(f"Participation{step}" for step in steps)]


async def test_what_is_refused_is_not_recorded(served: World) -> None:
    """Each refusal has its code and says what to do; nothing of it is in the log."""
    unknown = new_id()
    problem_id = await served.create()

    async def code(command: Command) -> str:
        error = await served.platform.refused(command)
        assert error.problem.detail.endswith(".")
        return error.problem.code

    assert await code(commands.CreateProblem(problem_id=problem_id, **ABOUT)) == "problem_exists"
    assert await code(commands.StartProblem(problem_id=unknown)) == "problem_not_found"
    assert await code(commands.RequestParticipation(problem_id=unknown, organization=CLINIC)) == "problem_not_found"
    assert await code(commands.IssueToken(problem_id=unknown, organization=CLINIC)) == "problem_not_found"
    assert await code(commands.StartProblem(problem_id=problem_id)) == "files_missing"
    await served.store_model(problem_id)
    await served.platform.record(FilesDeleted(problem_id=problem_id, names=["model.safetensors"]))
    assert await code(commands.StartProblem(problem_id=problem_id)) == "files_missing"
    await served.store_model(problem_id)
    assert await code(commands.StopProblem(problem_id=problem_id)) == "problem_state"
    await served.platform.send(commands.StartProblem(problem_id=problem_id))
    assert await code(commands.StartProblem(problem_id=problem_id)) == "problem_state"
    assert await code(commands.ReviseProblem(problem_id=problem_id, name="Later")) == "problem_state"
    assert await served.types(problem_id) == ["ProblemCreated", "ProblemStarted"]
    assert await served.types(unknown) == []


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"name": ""}, "name"),
        ({"plan": {"rounds": 0, "goal_count": 2}}, "plan.rounds"),
        ({"plan": {"rounds": 1, "goal_count": 2, "strategy": {"name": "magic"}}}, "plan.strategy.name"),
        ({"client_image": "Not An Image"}, "client_image"),
        ({"problem_id": "../x"}, "problem_id"),
        ({"surprise": 1}, "surprise"),
    ],
)
async def test_wrong_fields_are_named(served: World, changes: dict[str, Any], field: str) -> None:
    """The service trusts no sender: whatever comes by NATS is checked here, not only at the gateway."""
    body = {"problem_id": new_id(), **msgspec.to_builtins(ABOUT), **changes}
    request = Request(
        actor="setter", key="k", correlation=uuid7(), deadline=time.time() + 10, command=msgspec.Raw(to_json(body))
    )
    subject = subjects.command("problems", "CreateProblem")
    message = await served.platform.gateway.client.request(subject, to_json(request), timeout=10)
    assert message.headers == {"Fedota-Error": "invalid_field"}
    assert list(msgspec.json.decode(message.data)["fields"]) == [field]
    assert await served.platform.logs["problems"].head() == 0


async def test_the_same_key_gives_the_first_answer(served: World) -> None:
    """Though the state has moved on and would refuse the command now; another body or sender is another request."""
    send, refused = served.platform.send, served.platform.refused
    problem_id = new_id()
    create = commands.CreateProblem(problem_id=problem_id, **ABOUT)
    first = await send(create, key="create")
    await served.store_model(problem_id)
    start, stop = commands.StartProblem(problem_id=problem_id), commands.StopProblem(problem_id=problem_id)
    started = await send(start, key="start")
    await send(stop, key="stop")
    await send(start, key="start again")
    happened = await served.types(problem_id)

    assert await send(create, key="create") == first
    assert await send(start, key="start") == started
    assert (await send(start, key="start")).position < (await send(start, key="start again")).position
    assert (await refused(start, key="stop")).problem.code == "key_reused"  # its state would refuse it, too
    assert (
        await refused(commands.StopProblem(problem_id=problem_id, reason="r"), key="stop")
    ).problem.code == "key_reused"
    assert (await refused(start, key="start", actor="operator")).problem.code == "problem_state"
    assert await served.types(problem_id) == happened


async def test_one_request_sent_many_times_at_once(served: World) -> None:
    """Repetitions that overtake each other all get the one answer, and one thing happens."""
    problem_id = new_id()
    create = commands.CreateProblem(problem_id=problem_id, **ABOUT)
    replies = await asyncio.gather(*(served.platform.send(create, key="once") for _ in range(30)))
    assert len({reply.position for reply in replies}) == 1
    assert await served.types(problem_id) == ["ProblemCreated"]


async def test_many_organizations_join_at_once(served: World) -> None:
    """None of them fails because of the others, and none is lost."""
    problem_id = await served.create()
    names = [f"Clinic {number}" for number in range(60)]
    asked = [commands.RequestParticipation(problem_id=problem_id, organization=name) for name in names]
    await asyncio.gather(*(served.platform.send(command) for command in asked))
    events = await served.platform.events(f"problems/{problem_id}")
    assert sorted(event.data.organization for event in events[1:]) == sorted(names)  # type: ignore[attr-defined]


async def test_two_services_share_the_work_and_decide_once(world: World) -> None:
    """Of starts that come at once to two processes, one wins; each other one is told that it runs, or to try again."""
    async with world.running(), world.running():
        problem_id = await world.create()
        await world.store_model(problem_id)

        async def start() -> str:
            try:
                await world.platform.send(commands.StartProblem(problem_id=problem_id))
            except FedotaError as error:
                return error.problem.code
            return "started"

        outcomes = Counter(await asyncio.gather(*(start() for _ in range(40))))
        assert outcomes == {"started": 1, "problem_state": 39}
        assert await world.types(problem_id) == ["ProblemCreated", "ProblemStarted"]


async def test_tokens(served: World) -> None:
    """An approved organization gets a token that a selector can verify; before and after nobody does."""
    problem_id = await served.create()
    clinic: dict[str, Any] = {"problem_id": problem_id, "organization": CLINIC}
    issue = commands.IssueToken(**clinic)
    assert (await served.platform.refused(issue)).problem.code == "participation_not_found"
    await served.platform.send(commands.RequestParticipation(**clinic))
    assert (await served.platform.refused(issue)).problem.code == "participation_state"
    await served.platform.send(commands.ApproveParticipation(**clinic))
    head = await served.platform.logs["problems"].head()
    reply = await served.platform.send(issue)
    issued = msgspec.convert(reply.result, IssuedToken)
    assert verify(served.public_key, issued.token, problem_id) == CLINIC
    assert 29 * 86_400 < issued.expires - time.time() <= 30 * 86_400
    with pytest.raises(FedotaError, match="token_refused"):
        verify(served.public_key, issued.token, new_id())
    assert (reply.position, await served.platform.logs["problems"].head()) == (0, head), "it was recorded"
    await served.platform.send(commands.RevokeParticipation(**clinic, reason="left"))
    assert (await served.platform.refused(issue)).problem.code == "participation_state"


async def test_nothing_is_startable_after_the_end(served: World) -> None:
    """A completed problem takes no start, no stop and no new organization."""
    problem_id = await served.start()
    await served.platform.record(final(problem_id, "completed"))
    await served.happens(problem_id, "ProblemCompleted")
    for command in (
        commands.StartProblem(problem_id=problem_id),
        commands.StopProblem(problem_id=problem_id),
        commands.RequestParticipation(problem_id=problem_id, organization=CLINIC),
    ):
        error = await served.platform.refused(command)
        assert error.problem.code == "problem_state" and "completed" in error.problem.detail


async def test_a_log_that_does_not_answer_is_said_to_be_unavailable(world: World) -> None:
    """Who asks meanwhile is told to come back; afterwards all is as before."""
    direct = world.settings.database_url.reveal()
    place = urlsplit(direct)
    async with Door.to(direct) as door:
        await door.open()
        through = place._replace(netloc=f"{place.username}:{place.password}@{urlsplit(door.url).netloc}").geturl()
        world.settings = msgspec.structs.replace(world.settings, database_url=Secret(through))
        async with world.running():
            problem_id = await world.create()
            command = commands.RequestParticipation(problem_id=problem_id, organization=CLINIC)
            issue = commands.IssueToken(problem_id=problem_id, organization=CLINIC)
            await door.shut()
            for refused in (command, issue):
                error = await world.platform.refused(refused, key="k")
                assert (error.problem.code, error.problem.retry_after) == ("unavailable", 2)
            await door.open()
            await world.platform.send(command, key="k")
            assert await world.types(problem_id) == ["ProblemCreated", "ParticipationRequested"]
