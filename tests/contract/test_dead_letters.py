"""Parked events: seen to in order, once, while others go on."""

import asyncio
from collections.abc import Callable, Sequence

import asyncpg
import pytest
from prometheus_client import generate_latest

from fedota.contracts.operations import Retried
from fedota.errors import FedotaError
from fedota.events import Event
from fedota.kernel import dead_letters
from fedota.kernel.dead_letters import drop, list_all, retry
from fedota.kernel.rebuilding import verify
from tests.contract.ground import Ground, created, requested
from tests.contract.models import Model, World, projecting
from tests.support.services import new_id, until


def fails_at(*positions: int) -> Callable[[Event], Exception | None]:
    """Poison in these events."""
    return lambda event: ValueError(f"made up at {event.position}") if event.position in positions else None


async def parked(world: World, model: Model, *poison: int) -> str:
    """Five events of one stream, of which the first one of `poison` and those behind it are parked; and two others."""
    bad = new_id()
    model.poison = fails_at(*poison)
    await world.ground.record(created(bad), created(), *(requested(bad, name) for name in "ABCD"), created())
    await world.reaches(7)
    return bad


async def park_all(world: World) -> None:
    """As if each event in the log had failed: failing one by one, with what is logged of it, takes seconds."""
    async with world.pool.acquire() as connection, connection.transaction():
        await connection.execute(
            "delete from seen; insert into dead_letters (position, subject, type, error)"
            " select position, subject, type, 'made up' from fedota.events"
        )


async def _retry(world: World, model: Model, position: int) -> Retried:
    return await retry(model.projection, world.pool, position)


@pytest.mark.parametrize("poison", [1, 4, 6])
async def test_poison_first_in_the_middle_and_last(relayed: Ground, poison: int) -> None:
    """In the batch and in its stream: what is before it and beside it is projected."""
    model, bad = Model(), new_id()
    model.poison = fails_at(poison)
    await relayed.record(created(bad), created(), *(requested(bad, name) for name in "ABCD"))
    async with projecting(relayed, model) as world:
        await world.reaches(6)
        waiting = [position for position in (1, 3, 4, 5, 6) if position >= poison]
        assert await world.parked() == waiting
        assert await world.positions() == [position for position in range(1, 7) if position not in waiting]
        model.poison = fails_at()
        assert await _retry(world, model, waiting[-1]) == Retried(handled=len(waiting), left=0)
        assert await world.positions() == list(range(1, 7))
        assert sorted(set(model.reactions)) == list(range(1, 7))
        await world.projector.check()


async def test_a_reaction_that_fails_parks_its_event_and_no_other(relayed: Ground) -> None:
    """Its rows are not written either, until both work."""
    model = Model()
    model.poison_reaction = fails_at(3)
    await relayed.record(*(created() for _ in range(6)))
    async with projecting(relayed, model) as world:
        await world.reaches(6)
        assert (await world.parked(), await world.positions()) == ([3], [1, 2, 4, 5, 6])
        assert set(model.reactions) == {1, 2, 4, 5, 6}
        assert await _retry(world, model, 3) == Retried(handled=0, left=1, error="ValueError: made up at 3")
        model.poison_reaction = fails_at()
        assert await _retry(world, model, 3) == Retried(handled=1, left=0)
        assert await world.positions() == list(range(1, 7)) and model.reactions.count(3) == 1


async def test_a_retry_goes_on_to_the_first_that_fails_again(relayed: Ground) -> None:
    """What worked has left the dead letters, what did not says why."""
    async with projecting(relayed, model := Model()) as world:
        bad = await parked(world, model, 1)
        assert await world.parked() == [1, 3, 4, 5, 6]
        model.poison = fails_at(4)
        assert await _retry(world, model, 1) == Retried(handled=2, left=3, error="ValueError: made up at 4")
        assert await world.positions() == [1, 2, 3, 7]
        letters = (await list_all(world.pool)).dead_letters
        assert [(letter.position, letter.subject, letter.state) for letter in letters] == [
            (position, f"problems/{bad}", "parked") for position in (4, 5, 6)
        ]
        assert letters[0].error == "ValueError: made up at 4" and "earlier event" in letters[1].error
        model.poison = fails_at()
        assert await _retry(world, model, 6) == Retried(handled=3, left=0)
        assert [position for position in model.reactions if position not in (2, 7)] == [1, 3, 4, 5, 6]
        assert await verify(model.projection, world.pool, world.log) == (7, [])


async def test_retried_twice_it_takes_effect_once(relayed: Ground) -> None:
    """One after the other, and many at the same moment."""
    async with projecting(relayed, model := Model()) as world:
        await parked(world, model, 3)
        model.poison = fails_at()
        answers = await asyncio.gather(*(_retry(world, model, 3) for _ in range(4)))
        assert sum(answer.handled for answer in answers) == 4
        assert {(answer.left, answer.error) for answer in answers} == {(0, "")}
        assert await _retry(world, model, 3) == Retried(handled=0, left=0)
        assert await world.positions() == list(range(1, 8))
        assert [position for position in model.reactions if position in (3, 4, 5, 6)] == [3, 4, 5, 6]
        with pytest.raises(FedotaError, match="position 8 was not projected yet"):
            await _retry(world, model, 8)


async def test_more_retries_at_once_than_there_are_connections(relayed: Ground) -> None:
    """Who holds the lock needs no other connection: all the rest may be in the hands of those that wait for it."""
    async with projecting(relayed, model := Model()) as world:
        await world.reaches(await relayed.record(*(created() for _ in range(12))))
        await park_all(world)
        async with asyncio.timeout(15):
            answers = await asyncio.gather(*(_retry(world, model, position) for position in range(1, 13)))
        assert answers == [Retried(handled=1, left=0)] * 12
        assert await world.positions() == list(range(1, 13))


async def test_a_crash_between_reaction_and_commit_of_a_retry(relayed: Ground) -> None:
    """Nothing is half done: it stays parked, and the next retry gives it its effect."""
    async with projecting(relayed, model := Model()) as world:
        await parked(world, model, 6)
        react = model.projection.reactions[type(requested(""))]

        async def react_and_crash(event: Event, data: object) -> None:
            await react(event, data)
            async with relayed.superuser() as connection:
                await connection.execute(
                    "select pg_terminate_backend(pid) from pg_locks where relation = 'gateway.seen'::regclass"
                )

        model.poison = fails_at()
        crashing = {**model.projection.reactions, type(requested("")): react_and_crash}
        whole = model.projection
        model.projection = type(whole)(tables=whole.tables, names=whole.names, write=whole.write, reactions=crashing)
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
            await _retry(world, model, 6)
        assert (await world.parked(), await world.positions()) == ([6], [1, 2, 3, 4, 5, 7])
        model.projection = whole
        assert await _retry(world, model, 6) == Retried(handled=1, left=0)
        assert await world.positions() == list(range(1, 8))
        assert model.reactions.count(6) == 2, "it is keyed by the event"


async def test_what_arrives_during_a_retry_keeps_its_place(relayed: Ground) -> None:
    """The live projection waits for the retry's step, and parks behind what is still parked."""
    async with projecting(relayed, model := Model()) as world:
        bad = await parked(world, model, 5)
        handled: list[int] = []
        write = model.projection.write

        async def noting(connection: object, events: Sequence[Event]) -> None:
            handled.extend(event.position for event in events)
            assert write is not None
            await write(connection, events)  # type: ignore[arg-type]

        model.poison = fails_at()
        whole = model.projection
        slow = type(whole)(tables=whole.tables, names=whole.names, write=noting, reactions=whole.reactions)
        model.going.clear()
        retrying = asyncio.create_task(retry(slow, world.pool, 5))
        await until(lambda: _waits_for_checkpoint(relayed, 0), "the retry holds the checkpoint")
        position = await relayed.record(requested(bad, "E"), requested(bad, "F"))
        await until(lambda: _waits_for_checkpoint(relayed, 1), "the live projection waits")
        model.going.set()
        await retrying
        await world.reaches(position)
        if await world.parked():  # they came before the retry's last step, and behind what it had to do
            assert (await retry(slow, world.pool, 8)).left == 0
        assert await world.positions() == list(range(1, 10)) and await world.parked() == []
        assert [one for one in model.reactions if one in (5, 6, 8, 9)] == [5, 6, 8, 9]


async def _waits_for_checkpoint(ground: Ground, waiting: int) -> bool:
    query = """
    select count(*) filter (where wait_event_type = 'Lock') as waiting,
        count(*) filter (where state = 'idle in transaction') as holding
    from pg_stat_activity where datname = current_database() and application_name = 'fedota-gateway'
    """
    async with ground.superuser() as connection:
        row = await connection.fetchrow(query)
        assert row is not None
        return bool(row["holding"] > 0 and row["waiting"] >= waiting)


async def test_what_is_dropped_never_takes_effect(relayed: Ground) -> None:
    """Who dropped it stays with it; those behind it stay parked until they are retried, and then the stream flows."""
    async with projecting(relayed, model := Model()) as world:
        bad = await parked(world, model, 3)
        letter = await drop(world.pool, 3, "operator:me")
        assert (letter.position, letter.state, letter.dropped_by) == (3, "dropped", "operator:me")
        assert await drop(world.pool, 3, "another") == letter, "to drop it again changes nothing"
        await world.reaches(await relayed.record(requested(bad, "E")))
        assert await world.parked() == [4, 5, 6, 8]
        with pytest.raises(FedotaError, match="dropped by operator:me"):
            await _retry(world, model, 3)
        assert await _retry(world, model, 5) == Retried(handled=4, left=0)
        await world.reaches(await relayed.record(requested(bad, "F")))
        assert await world.positions() == [1, 2, 4, 5, 6, 7, 8, 9] and 3 not in model.reactions
        await world.projector.check()
        assert await verify(model.projection, world.pool, world.log) == (8, [])
        with pytest.raises(FedotaError, match="no dead letter"):
            await drop(world.pool, 4, "operator:me")


async def test_not_while_the_read_model_is_built_anew(relayed: Ground) -> None:
    """What is left out of the new one must not take effect in the old one meanwhile."""
    async with projecting(relayed, model := Model()) as world:
        await parked(world, model, 3)
        model.poison = fails_at()
        async with world.pool.acquire() as connection:
            await connection.execute("select pg_advisory_lock(hashtext(current_schema()), 2)")
            with pytest.raises(FedotaError, match="Retry when that has finished"):
                await _retry(world, model, 3)
        assert (await _retry(world, model, 3)).handled == 4


async def test_a_stream_with_very_many(relayed: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asked is answered in time, and the next retry goes on."""
    monkeypatch.setattr(dead_letters, "_SECONDS", 0.0)
    async with projecting(relayed, model := Model()) as world:
        await parked(world, model, 3)
        model.poison = fails_at()
        first = await _retry(world, model, 3)
        assert (first.handled, first.left) == (1, 3) and "goes on from here" in first.error
        assert [(await _retry(world, model, 6)).left for _ in range(3)] == [2, 1, 0]


async def test_readiness_and_metrics_count_what_is_parked(relayed: Ground) -> None:
    """What was dropped is not counted: somebody has seen to it."""

    def counted() -> bytes:
        return next(
            line for line in generate_latest(world.service.registry).splitlines() if line.startswith(b"fedota_dead")
        )

    async with projecting(relayed, model := Model()) as world:
        assert counted() == b"fedota_dead_letters 0.0"
        await parked(world, model, 5)
        assert counted() == b"fedota_dead_letters 2.0"
        await drop(world.pool, 5, "operator:me")
        assert "1 events are parked" in (await world.service.failures())["projection"]
        assert counted() == b"fedota_dead_letters 1.0"
        await drop(world.pool, 6, "operator:me")
        assert await world.service.failures() == {}
        assert counted() == b"fedota_dead_letters 0.0"
