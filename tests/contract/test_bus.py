"""Commands by request-reply: answered, refused or unknown, and the caller always learns which."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
import nats.errors
import pytest
from nats.aio.msg import Msg

from fedota.contracts import subjects
from fedota.contracts.commands import Command, CreateProblem, Reply, Request, RequestParticipation, StartProblem
from fedota.errors import FedotaError, Problem
from fedota.events import to_json, uuid7
from fedota.events.problems import Plan
from fedota.kernel import bus as bus_module
from fedota.kernel.bus import ERROR_HEADER, Bus, Consumer
from tests.contract.ground import Ground
from tests.support.services import new_id, until

Handler = Callable[[Request, Any], Awaitable[Reply]]
NAMES = {"name": "n", "description": "d", "data_format": "f", "client_image": "i"}


@pytest.fixture
async def gateway(bare: Ground) -> AsyncIterator[Bus]:
    """Who sends commands."""
    async with bare.bus("gateway") as bus:
        yield bus


async def refused(bus: Bus, command: Command, **more: Any) -> Problem:
    """What the command is refused with."""
    with pytest.raises(FedotaError) as caught:
        await bus.command(command, actor="setter", **more)
    return caught.value.problem


async def test_a_command_and_its_answer(bare: Ground, gateway: Bus) -> None:
    """Nothing of either is lost on the way."""
    seen: list[tuple[Request, Command]] = []

    async def handle(request: Request, command: Command) -> Reply:
        seen.append((request, command))
        return Reply(position=7, result={"a": [1, "ä"]})

    command = CreateProblem(problem_id=new_id(), plan=Plan(rounds=1, goal_count=1), **NAMES)
    async with bare.bus("problems") as problems:
        await problems.answer_commands({CreateProblem: handle})
        reply = await gateway.command(command, actor="setter", key="k", timeout=5)
    assert reply == Reply(position=7, result={"a": [1, "ä"]})
    [(request, arrived)] = seen
    assert (arrived, request.actor, request.key) == (command, "setter", "k")
    assert 0 < request.deadline - time.time() <= 5
    assert request.correlation.version == 7


async def test_commands_do_not_wait_for_each_other(bare: Ground, gateway: Bus) -> None:
    """A slow one holds up nobody, of the same kind neither; too many at once are asked to come back."""
    gate, waiting = asyncio.Event(), 0

    async def handle(_: Request, command: Command) -> Reply:
        nonlocal waiting
        if isinstance(command, StartProblem):
            waiting += 1
            await gate.wait()
        return Reply()

    async with bare.bus("problems") as problems:
        await problems.answer_commands({StartProblem: handle, RequestParticipation: handle})
        slow = [asyncio.create_task(gateway.command(StartProblem(problem_id=new_id()), actor="a")) for _ in range(255)]
        await until(lambda: _is(lambda: waiting == 255))
        await gateway.command(RequestParticipation(problem_id=new_id(), organization="A"), actor="a")
        last = asyncio.create_task(gateway.command(StartProblem(problem_id=new_id()), actor="a"))
        await until(lambda: _is(lambda: waiting == 256))
        problem = await refused(gateway, StartProblem(problem_id=new_id()))
        assert (problem.code, problem.retry_after) == ("unavailable", 1)
        gate.set()
        assert await asyncio.gather(*slow, last) == [Reply()] * 256


async def _is(condition: Callable[[], bool]) -> bool:
    return condition()


async def test_nobody_answers(gateway: Bus) -> None:
    """That is known at once, and the command was not begun."""
    begun = time.monotonic()
    problem = await refused(gateway, StartProblem(problem_id=new_id()))
    assert (problem.code, problem.status, problem.retry_after) == ("unavailable", 503, 2)
    assert time.monotonic() - begun < 2


async def test_an_answer_that_does_not_come(bare: Ground, gateway: Bus) -> None:
    """The outcome is unknown: the caller is told to ask again with the same key."""

    async def never(_: Request, __: Command) -> Reply:
        await asyncio.Event().wait()
        raise AssertionError

    async with bare.bus("problems") as problems:
        await problems.answer_commands({StartProblem: never})
        problem = await refused(gateway, StartProblem(problem_id=new_id()), timeout=0.2)
        assert (problem.code, problem.status) == ("timeout", 504) and "same Idempotency-Key" in problem.detail
        for task in problems._tasks:
            task.cancel()


async def test_a_command_whose_caller_has_gone_is_not_begun(bare: Ground, gateway: Bus) -> None:
    """Its deadline has passed: nobody would hear the answer."""
    begun: list[Command] = []

    async def handle(_: Request, command: Command) -> Reply:
        begun.append(command)
        return Reply()

    body = to_json(StartProblem(problem_id=new_id()))
    request = Request(actor="a", key="k", correlation=uuid7(), deadline=time.time() - 0.001, command=msgspec.Raw(body))
    async with bare.bus("problems") as problems:
        await problems.answer_commands({StartProblem: handle})
        subject = subjects.command("problems", "StartProblem")
        late = await gateway.client.request(subject, to_json(request), timeout=5)
        assert late.headers == {ERROR_HEADER: "timeout"} and not begun
        in_time = msgspec.structs.replace(request, deadline=time.time() + 5)
        assert (await gateway.client.request(subject, to_json(in_time), timeout=5)).headers is None
        assert len(begun) == 1


async def test_an_unforeseen_error_keeps_its_text_to_itself(bare: Ground, gateway: Bus) -> None:
    """The caller hears that something went wrong, and nothing of what it was; the service goes on."""
    answers: list[Exception | Reply] = [RuntimeError("hunter2"), ExceptionGroup("hunter2", [ValueError("x")]), Reply()]

    async def handle(_: Request, __: Command) -> Reply:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async with bare.bus("problems") as problems:
        await problems.answer_commands({StartProblem: handle})
        for _ in range(2):
            problem = await refused(gateway, StartProblem(problem_id=new_id()))
            assert (problem.code, problem.status) == ("internal_error", 500)
            assert b"hunter2" not in to_json(problem)
        assert await gateway.command(StartProblem(problem_id=new_id()), actor="a") == Reply()


async def test_a_reply_that_nats_does_not_take(bare: Ground, gateway: Bus) -> None:
    """The caller hears at once that something went wrong, and not after its timeout that nobody answered."""

    async def handle(_: Request, __: Command) -> Reply:
        return Reply(result="x" * gateway.client.max_payload)

    async with bare.bus("problems") as problems:
        await problems.answer_commands({StartProblem: handle})
        assert (await refused(gateway, StartProblem(problem_id=new_id()), timeout=5)).code == "internal_error"


async def test_an_answer_without_a_connection(bare: Ground, gateway: Bus) -> None:
    """Nobody can be told, and nothing is left behind for the garbage collector to complain of."""
    begun, gate = asyncio.Event(), asyncio.Event()

    async def handle(_: Request, __: Command) -> Reply:
        begun.set()
        await gate.wait()
        return Reply()

    async with bare.bus("problems") as problems:
        await problems.answer_commands({StartProblem: handle})
        asked = asyncio.create_task(refused(gateway, StartProblem(problem_id=new_id()), timeout=1))
        await begun.wait()
        await problems.client.close()
        gate.set()
        [task] = problems._tasks
        await task
        assert (await asked).code == "timeout"


async def test_a_foreseen_error_arrives_whole(bare: Ground, gateway: Bus) -> None:
    """Code, words, fields and when to come back."""
    error = FedotaError("problem_state", "It runs already.", fields={"a.b": "c"}, retry_after=9)

    async def handle(_: Request, __: Command) -> Reply:
        raise error

    async with bare.bus("problems") as problems:
        await problems.answer_commands({StartProblem: handle})
        assert await refused(gateway, StartProblem(problem_id=new_id())) == error.problem


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"plan": {"rounds": 0, "goal_count": 1}}, "plan.rounds"),
        ({"plan": {"goal_count": 1}}, "plan.rounds"),
        (
            {"plan": {"rounds": 1, "goal_count": 1, "strategy": {"parameters": {"a": "b"}}}},
            "plan.strategy.parameters[...]",
        ),
        ({"name": ""}, "name"),
        ({"name": None}, "name"),
        ({"surprise": 1}, "surprise"),
    ],
)
async def test_a_field_that_is_wrong_is_named(bare: Ground, gateway: Bus, changed: dict[str, Any], field: str) -> None:
    """By its dotted path; the handler never sees the command."""

    async def handle(_: Request, __: Command) -> Reply:
        raise AssertionError

    good = {"problem_id": new_id(), "plan": {"rounds": 1, "goal_count": 1}, **NAMES}
    request = Request(
        actor="a",
        key="k",
        correlation=uuid7(),
        deadline=time.time() + 5,
        command=msgspec.Raw(to_json({**good, **changed})),
    )
    async with bare.bus("problems") as problems:
        await problems.answer_commands({CreateProblem: handle})
        answer = await gateway.client.request(
            subjects.command("problems", "CreateProblem"), to_json(request), timeout=5
        )
    assert answer.headers == {ERROR_HEADER: "invalid_field"}
    problem = msgspec.json.decode(answer.data, type=Problem)
    assert list(problem.fields) == [field] and problem.status == 422


async def test_a_bus_that_closes_answers_what_it_has_begun(bare: Ground, gateway: Bus) -> None:
    """A stop of the service loses no answer."""
    begun, gate = asyncio.Event(), asyncio.Event()

    async def handle(_: Request, __: Command) -> Reply:
        begun.set()
        await gate.wait()
        return Reply(position=3)

    async with bare.bus("problems") as problems:
        await problems.answer_commands({StartProblem: handle})
        asked = asyncio.create_task(gateway.command(StartProblem(problem_id=new_id()), actor="a"))
        await begun.wait()
        asyncio.get_running_loop().call_later(0.05, gate.set)
    assert await asked == Reply(position=3)


async def test_two_of_a_service_share_the_work(bare: Ground, gateway: Bus) -> None:
    """Each command goes to one of them."""
    seen: list[str] = []

    def handler(name: str) -> Handler:
        async def handle(_: Request, __: Command) -> Reply:
            seen.append(name)
            return Reply()

        return handle

    async with bare.bus("problems") as one, bare.bus("problems") as other:
        await one.answer_commands({StartProblem: handler("one")})
        await other.answer_commands({StartProblem: handler("other")})
        for _ in range(60):
            await gateway.command(StartProblem(problem_id=new_id()), actor="a")
    assert len(seen) == 60 and set(seen) == {"one", "other"}


@pytest.mark.parametrize("fails", ["an endpoint", "the last word"])
async def test_who_cannot_answer_all_answers_nothing(
    bare: Ground, gateway: Bus, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """A service that was set up half way is taken back: nobody knows of it who could stop it later."""

    async def answer(_: str, body: bytes) -> bytes:
        return body

    async def never_arrives(_: object) -> None:
        raise nats.errors.TimeoutError

    endpoints = {subjects.command("problems", "StartProblem"): answer}
    if fails == "an endpoint":
        endpoints["no subject"] = answer
    else:
        monkeypatch.setattr(bus_module, "arrived", never_arrives)
    async with bare.bus("problems") as problems, bare.nats() as anybody:
        with pytest.raises((ValueError, nats.errors.TimeoutError)):
            await problems.answer(endpoints)
        assert (await refused(gateway, StartProblem(problem_id=new_id()), timeout=2)).code == "unavailable"
        with pytest.raises(nats.errors.NoRespondersError):
            await anybody.request("$SRV.PING.fedota-problems", timeout=2)


@pytest.mark.parametrize("moments", range(4))
async def test_who_is_told_to_stop_while_an_event_arrives_stops(bare: Ground, moments: int) -> None:
    """However close the two are: a cancellation that is lost there would keep the process from ending."""
    async with bare.nats() as client:
        consumer = Consumer(client, "gateway")
        fetching = asyncio.create_task(consumer.fetch())
        await until(lambda: _is(lambda: bool(consumer._wanted)))
        await asyncio.sleep(0)
        await consumer.receive(Msg(client))
        for _ in range(moments):
            await asyncio.sleep(0)
        if fetching.cancel():
            with pytest.raises(asyncio.CancelledError):
                await fetching
