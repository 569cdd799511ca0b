"""What a process answers when an operator asks about its projection, by NATS."""

import asyncio
from typing import Any, TypeVar

import msgspec
import nats.errors
import pytest
from msgspec import structs

from fedota.contracts import subjects
from fedota.contracts.operations import DeadLetter, DeadLetterRequest, DeadLetters, ProjectionStatus, Retried, Work
from fedota.errors import FedotaError
from fedota.events import Event, to_json
from fedota.events.problems import ProblemCreated
from fedota.kernel.bus import Bus
from fedota.kernel.database import Pool
from fedota.kernel.projection import Projection
from tests.contract.ground import Ground, created, requested
from tests.contract.models import Model, projecting
from tests.contract.test_dead_letters import park_all
from tests.support.services import new_id, until

T = TypeVar("T")


async def ask(bus: Bus, name: str, kind: type[T], body: Any = None) -> T:
    """One question to the process `gateway`."""
    reply = await bus.ask(subjects.operation("gateway", name), to_json(body or {"actor": "operator:me"}), 10)
    return msgspec.json.decode(reply, type=kind)


async def status(bus: Bus) -> ProjectionStatus | None:
    """How it is; None as long as nobody answers."""
    try:
        return await ask(bus, "status", ProjectionStatus)
    except nats.errors.NoRespondersError:
        return None


async def finished(bus: Bus) -> Work:
    """The last work, once it is over."""

    async def over() -> Work | None:
        told = await status(bus)
        return told.work if told and told.work and told.work.finished else None

    work: Work = await until(over, "the work is finished")
    return work


def about(position: int) -> DeadLetterRequest:
    """A dead letter, asked for by a person."""
    return DeadLetterRequest(position=position, actor="operator:me")


async def test_verify_rebuild_and_how_it_is(relayed: Ground) -> None:
    """A request begins the work, the status tells it."""
    await relayed.record(*(created() for _ in range(30)))
    async with projecting(relayed, Model()) as world:
        await world.reaches(30)
        told = await ask(world.bus, "status", ProjectionStatus)
        assert told == ProjectionStatus(process="gateway", position=30, head=30, parked=0)
        begun = await ask(world.bus, "verify", ProjectionStatus)
        assert begun.work is not None and begun.work.kind == "verify"
        work = await finished(world.bus)
        assert (work.kind, work.position, work.target, work.rows, work.error) == ("verify", 30, 30, 30, "")
        assert work.differences == [] and work.finished is not None and work.finished > work.started
        await world.pool.execute("delete from seen where position > 28")
        await ask(world.bus, "verify", ProjectionStatus)
        (difference,) = (await finished(world.bus)).differences
        assert (difference.table, difference.live, difference.rebuilt) == ("seen", 0, 2)
        await ask(world.bus, "rebuild", ProjectionStatus)
        work = await finished(world.bus)
        assert (work.kind, work.rows, work.error) == ("rebuild", 30, "")
        assert await world.positions() == list(range(1, 31))


async def test_who_only_reacts_has_nothing_to_rebuild(relayed: Ground) -> None:
    """It answers all the same, and its dead letters are seen to like any other's."""
    await relayed.record(created(), created())
    model = Model()
    model.projection = Projection(reactions=model.projection.reactions)
    model.poison_reaction = lambda event: ValueError("made up") if event.position == 2 else None
    async with projecting(relayed, model) as world:
        await world.reaches(2)
        for name in ("verify", "rebuild"):
            await ask(world.bus, name, ProjectionStatus)
            work = await finished(world.bus)
            assert (work.kind, work.rows, work.differences, work.error) == (name, 0, [], "")
        model.poison_reaction = lambda _: None
        assert await ask(world.bus, "retry", Retried, about(2)) == Retried(handled=1, left=0)
        assert set(model.reactions) == {1, 2}


async def test_one_piece_of_work_at_a_time(relayed: Ground) -> None:
    """The second is refused, and the first goes on."""
    await relayed.record(created())
    async with projecting(relayed, model := Model()) as world:
        await world.reaches(1)
        model.going.clear()
        await ask(world.bus, "rebuild", ProjectionStatus)
        for name in ("rebuild", "verify"):
            with pytest.raises(FedotaError, match="being rebuilt or verified already") as refused:
                await ask(world.bus, name, ProjectionStatus)
            assert refused.value.problem.code == "conflict"
        model.going.set()
        assert (await finished(world.bus)).rows == 1


async def test_work_that_fails_says_why(relayed: Ground) -> None:
    """In a sentence, with nothing changed."""
    await relayed.record(created(), created())
    async with projecting(relayed, model := Model()) as world:
        await world.reaches(2)
        model.poison = lambda event: ValueError("made up") if event.position == 2 else None
        await ask(world.bus, "rebuild", ProjectionStatus)
        error = (await finished(world.bus)).error
        assert error.startswith("The event at position 2 (ProblemCreated) cannot be projected: ValueError: made up")
        assert await world.positions() == [1, 2]


async def test_dead_letters_are_listed_retried_and_dropped(relayed: Ground) -> None:
    """In the words of the contract."""
    model, bad = Model(), new_id()
    model.poison = lambda event: ValueError("made up") if event.position == 1 else None
    await relayed.record(created(bad), requested(bad, "A"), requested(bad, "B"))
    async with projecting(relayed, model) as world:
        await world.reaches(3)
        assert (await ask(world.bus, "status", ProjectionStatus)).parked == 3
        first, *_ = letters = (await ask(world.bus, "dead_letters", DeadLetters)).dead_letters
        assert (first.position, first.type, first.error) == (1, "ProblemCreated", "ValueError: made up")
        assert [letter.position for letter in letters] == [1, 2, 3]
        dropped = await ask(world.bus, "drop", DeadLetter, about(1))
        assert (dropped.state, dropped.dropped_by) == ("dropped", "operator:me")
        assert await ask(world.bus, "retry", Retried, about(2)) == Retried(handled=2, left=0)
        assert (await ask(world.bus, "status", ProjectionStatus)).parked == 0
        with pytest.raises(FedotaError, match="no dead letter"):
            await ask(world.bus, "drop", DeadLetter, about(2))


async def test_many_retries_at_once_leave_connections_to_their_reactions(relayed: Ground) -> None:
    """On as many streams, and more of them than the pool has connections."""
    model, pools = Model(), list[Pool]()

    async def react(event: Event, _: ProblemCreated) -> None:
        await pools[0].fetchval("select 1")
        model.reactions.append(event.position)

    model.projection = structs.replace(model.projection, reactions={ProblemCreated: react})
    async with projecting(relayed, model) as world:
        pools.append(world.pool)
        await world.reaches(await relayed.record(*(created() for _ in range(12))))
        await park_all(world)
        model.reactions.clear()
        asking = [ask(world.bus, "retry", Retried, about(position)) for position in range(1, 13)]
        assert await asyncio.gather(*asking) == [Retried(handled=1, left=0)] * 12
        assert sorted(model.reactions) == await world.positions() == list(range(1, 13))


async def test_the_metric_counts_what_is_parked_without_being_asked_for_readiness(relayed: Ground) -> None:
    """After a restart, after a drop and after a retry."""
    await relayed.record(created(), created())
    async with projecting(relayed, Model()) as world:
        await world.reaches(2)
        await park_all(world)
    async with projecting(relayed, Model()) as world:

        async def counted(parked: float) -> bool:
            return world.service.registry.get_sample_value("fedota_dead_letters") == parked

        await until(lambda: status(world.bus), "it answers")
        await until(lambda: counted(2))
        await ask(world.bus, "drop", DeadLetter, about(1))
        assert await counted(1)
        await ask(world.bus, "retry", Retried, about(2))
        assert await counted(0)


@pytest.mark.parametrize(
    ("body", "code"),
    [(b"{", "invalid_request"), (b'{"position":0,"actor":"a"}', "invalid_field"), (b'{"position":1}', "invalid_field")],
)
async def test_what_is_not_well_formed_is_refused(relayed: Ground, body: bytes, code: str) -> None:
    """With what is wrong with it."""
    async with projecting(relayed, Model()) as world:
        await until(lambda: status(world.bus), "it answers")
        with pytest.raises(FedotaError) as refused:
            await world.bus.ask(subjects.operation("gateway", "retry"), body, 5)
        assert refused.value.problem.code == code


async def test_a_stop_gives_the_work_up(relayed: Ground) -> None:
    """At once, with nothing changed and nothing left over for the next."""
    await relayed.record(created())
    async with projecting(relayed, model := Model()) as world:
        await world.reaches(1)
        model.going.clear()
        await ask(world.bus, "rebuild", ProjectionStatus)
        async with asyncio.timeout(5):
            await world.projector._operations.stop()
        assert await status(world.bus) is None
        assert [task.get_name() for task in asyncio.all_tasks() if task.get_name() == "rebuild"] == []
        model.going.set()
    async with projecting(relayed, Model()) as world:
        await until(lambda: status(world.bus), "the next one answers")
        await ask(world.bus, "rebuild", ProjectionStatus)
        assert (await finished(world.bus)).rows == 1


async def test_only_who_keeps_the_projection_answers(relayed: Ground) -> None:
    """Of two processes of a name the one that waits is silent, until it is its turn."""
    await relayed.record(created())
    async with projecting(relayed, waiting := Model()) as first:
        await first.reaches(1)
        await until(lambda: status(first.bus), "the first answers")
        stack = projecting(relayed, Model())
        second = await stack.__aenter__()
        try:
            waiting.going.clear()
            await ask(first.bus, "verify", ProjectionStatus)
            for _ in range(20):
                told = await status(first.bus)
                assert told is not None and told.work is not None, "the one that works answers, and no other"
            assert second.projector._operations._answering is None
            waiting.going.set()
            await finished(first.bus)
        finally:
            await stack.__aexit__(None, None, None)


async def test_the_next_one_answers_when_the_first_has_gone(relayed: Ground) -> None:
    """It takes the projection over, and with it the questions."""
    await relayed.record(created())
    first_stack, second_stack = projecting(relayed, Model()), projecting(relayed, Model())
    first = await first_stack.__aenter__()
    await first.reaches(1)
    second = await second_stack.__aenter__()
    await first_stack.__aexit__(None, None, None)
    try:
        await until(lambda: status(second.bus), "the second answers")
        await ask(second.bus, "rebuild", ProjectionStatus)
        assert (await finished(second.bus)).rows == 1
    finally:
        await second_stack.__aexit__(None, None, None)
