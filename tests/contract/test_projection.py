"""Rows exactly once, whatever is delivered, killed or poisoned."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import asyncpg
import pytest
from msgspec import structs

from fedota.contracts import subjects
from fedota.errors import FedotaError
from fedota.events import Event, uuid7
from fedota.kernel.bus import StreamLostError
from fedota.kernel.database import Connection
from fedota.kernel.event_log import is_outage
from fedota.kernel.projection import _passes
from fedota.kernel.relay import Relay
from fedota.kernel.service import Service
from tests.contract.ground import Ground, OwnNats, created, deleted, kill, requested
from tests.contract.models import Always, Model, Unreliable, World, projecting
from tests.support.events import recorded
from tests.support.services import new_id, until

PROJECTOR = "tests.contract.projector"


async def test_rows_are_written_once_though_events_come_twice_late_or_never(relayed: Ground) -> None:
    """The stream repeats, reorders and leaves out, the consumer is taken away, the process starts again."""
    model = Model()
    for life in range(3):
        async with projecting(relayed, model, Unreliable) as world:
            for turn in range(4):
                position = await relayed.record(*(created() for _ in range(25)))
                if turn % 2:
                    async with relayed.nats() as client:
                        await client.jetstream().delete_consumer(subjects.STREAM, "gateway")
                await world.reaches(position)
            assert await world.positions() == list(range(1, position + 1))
            assert position == 100 * (life + 1)
            await world.projector.check()
    assert model.reactions == list(range(1, 301))


async def test_a_crash_between_reaction_and_commit(relayed: Ground, tmp_path: Path) -> None:
    """The reaction runs again in the next life and what it did is there once; so are the rows."""
    await relayed.record(created(), created(), requested(new_id()))
    crash = tmp_path / "crashed"
    child = await relayed.program(PROJECTOR, "rounds", tmp_path / "rounds", CRASH=str(crash))
    out, _ = await asyncio.wait_for(child.communicate(), 20)
    assert (child.returncode, out) == (9, b"")
    log = relayed.logs["storage"]
    assert await log.head() == 4, "the reaction had appended"
    assert await _seen(relayed) == []
    async with relayed.running(PROJECTOR, "rounds", tmp_path / "rounds", CRASH=str(crash)):
        await until(lambda: _stands_at(relayed, 5), "both reactions are recorded, and projected")
        assert [position for position, _ in await _seen(relayed)] == [1, 2, 3]
    types = [(event.type, event.causation) for event in await log.read(0)]
    first, second = (event.id for event in (await log.read(0))[:2])
    assert types[3:] == [("RoundUpdated", first), ("RoundUpdated", second)]


async def test_two_processes_of_one_name_never_project_twice(relayed: Ground, tmp_path: Path) -> None:
    """One works and one waits; when the one is killed with -9 the other goes on, and no row is there twice."""
    children = [await relayed.program(PROJECTOR, "rounds", tmp_path / str(number)) for number in range(2)]
    try:
        at = 0
        for _ in range(2):
            story = [requested(new_id()) for _ in range(150)]
            appending = asyncio.create_task(relayed.record(*story))
            await until(lambda least=at: _more_than(relayed, least), "rows are written")  # type: ignore[misc]
            leader = (await _seen(relayed))[-1][1]
            victim = next(child for child in children if child.pid == leader)
            await kill(victim)
            children.remove(victim)
            children.append(await relayed.program(PROJECTOR, "rounds", tmp_path / "again"))
            at = await appending
            await until(lambda end=at: _stands_at(relayed, end), "all is projected")  # type: ignore[misc]
        rows = await _seen(relayed)
        assert [position for position, _ in rows] == list(range(1, 301))
        pids = [pid for _, pid in rows]
        turns = [pid for number, pid in enumerate(pids) if number == 0 or pids[number - 1] != pid]
        assert 2 <= len(turns) == len(set(turns)), "they took turns"
    finally:
        for child in children:
            await kill(child)


async def test_a_process_that_is_killed_in_the_middle_of_batches(relayed: Ground, tmp_path: Path) -> None:
    """With -9, again and again, at the beginning of a batch, within it and at its end: each row is there once."""
    await relayed.record(*(requested(new_id()) for _ in range(120)))
    lives = 0
    while not lives or not await _stands_at(relayed, 120):
        kill_at = "1,2,60,99,120"
        child = await relayed.program(PROJECTOR, "rounds", tmp_path / "rounds", KILL_AT=kill_at)
        lives += 1
        ended = asyncio.create_task(child.wait())
        try:
            await until(lambda end=ended: _over(relayed, end), "it was killed, or all is projected")  # type: ignore[misc]
        finally:
            await kill(child)
        assert lives <= 6
    assert lives == 6
    assert [position for position, _ in await _seen(relayed)] == list(range(1, 121))


async def _over(ground: Ground, ended: "asyncio.Task[int]") -> bool:
    return ended.done() or (bool(await _seen(ground)) and await _stands_at(ground, 120))


async def _seen(ground: Ground) -> list[tuple[int, int]]:
    async with ground.superuser() as connection:
        if not await connection.fetchval("select to_regclass('rounds.seen')"):
            return []
        return [tuple(row) for row in await connection.fetch("select position, pid from rounds.seen order by 1")]


async def _more_than(ground: Ground, count: int) -> bool:
    return len(await _seen(ground)) > count


async def _stands_at(ground: Ground, position: int) -> bool:
    async with ground.superuser() as connection:
        return bool(await connection.fetchval("select position from rounds.checkpoint") == position)


async def test_who_waits_for_its_turn_reads_along(relayed: Ground) -> None:
    """The second gateway answers readers from what the first one writes."""
    async with projecting(relayed, Model()) as first, projecting(relayed, second := Model()) as waiting:
        for _ in range(30):
            await first.reaches(await relayed.record(created()))
        await waiting.reaches(30)
        await waiting.projector.check()
    assert second.reactions == []


async def test_who_has_lost_its_turn_without_knowing_it_does_no_harm(relayed: Ground) -> None:
    """What another process of the name has projected meanwhile is skipped, and the position never goes back."""
    async with projecting(relayed, model := Model()) as world:
        await world.reaches(await relayed.record(created(), created(), created()))
        async with world.pool.acquire() as connection:
            await world.projector._project((await world.log.read(0))[:2], connection)
        assert await world.positions() == model.reactions == [1, 2, 3]
        assert world.projector.position == await world.pool.fetchval("select position from checkpoint") == 3


async def test_a_lease_that_is_lost_is_taken_again_though_no_event_comes(relayed: Ground) -> None:
    """Its connection was cut while nothing happened: another of the name would think that it is alone."""
    leases = """
    select pid from pg_locks where locktype = 'advisory' and objsubid = 2 and objid = 1 and granted
        and database = (select oid from pg_database where datname = current_database())
    """
    async with projecting(relayed, Model()) as world, relayed.superuser() as connection:
        await world.reaches(await relayed.record(created()))
        holder = await connection.fetchval(leases)
        await connection.execute("select pg_terminate_backend($1)", holder)

        async def held_again() -> bool:
            return await connection.fetchval(leases) not in (None, holder)

        await until(held_again, "somebody holds the lease")


async def test_poison_parks_its_stream_and_the_rest_goes_on(relayed: Ground) -> None:
    """In its order, from the poisoned event on; what is parked shows in readiness; nothing of it is half done."""
    model, bad, good = Model(), new_id(), new_id()
    model.poison = lambda event: ValueError("made-up poison") if event.position == 3 else None
    await relayed.record(created(good), created(bad), requested(bad, "A"), requested(good, "A"), requested(bad, "B"))
    async with projecting(relayed, model) as world:
        await world.reaches(5)
        position = await relayed.record(requested(bad, "C"), requested(good, "B"), deleted(bad))
        await world.reaches(position)
        assert await world.positions() == [1, 2, 4, 7, 8]  # another owner's stream of the same problem goes on
        letters = await world.pool.fetch("select position, subject, error from dead_letters order by position")
        assert [(row["position"], row["subject"]) for row in letters] == [
            (3, f"problems/{bad}"),
            (5, f"problems/{bad}"),
            (6, f"problems/{bad}"),
        ]
        assert "made-up poison" in letters[0]["error"] and "earlier event" in letters[1]["error"]
        assert "3 events are parked" in (await world.service.failures())["projection"]


async def test_what_may_pass_is_waited_for(relayed: Ground) -> None:
    """A service that does not answer is no poison: the event is tried again until it works, nothing is parked."""
    model, tries = Model(), 0

    def down_twice(event: Event) -> Exception | None:
        nonlocal tries
        tries += 1
        return FedotaError("unavailable", "made up") if tries <= 2 else None

    model.poison = down_twice
    await relayed.record(created(), created())
    async with projecting(relayed, model) as world:
        await world.reaches(2)
        assert tries > 2 and await world.positions() == [1, 2]
        await world.projector.check()


@pytest.mark.parametrize(
    "fault",
    [
        asyncpg.TooManyConnectionsError,
        asyncpg.DiskFullError,
        asyncpg.OutOfMemoryError,
        asyncpg.DeadlockDetectedError,
        asyncpg.SerializationError,
        asyncpg.LockNotAvailableError,
        asyncpg.QueryCanceledError,
        asyncpg.PostgresIOError,
        asyncpg.ReadOnlySQLTransactionError,
    ],
)
def test_what_postgresql_cannot_do_now_is_no_poison(fault: type[asyncpg.PostgresError]) -> None:
    """It is the same for the projection and for who appends."""
    assert is_outage(fault("made up")) and _passes(fault("made up"))


def test_what_postgresql_will_never_take_is_poison() -> None:
    """Waiting for it would hold up all that follows."""
    unencodable = asyncpg.exceptions._base.DataError("made up")
    for error in (asyncpg.UniqueViolationError("made up"), asyncpg.UndefinedTableError("made up"), unencodable):
        assert not is_outage(error) and not _passes(error)


async def test_a_real_fault_of_postgresql_is_waited_for(relayed: Ground) -> None:
    """A statement that ran out of its time is tried again until it works, and its event is not parked."""
    model, tries = Model(), 0

    async def slow_at_first(connection: Connection, events: Sequence[Event]) -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            await connection.execute("set local statement_timeout = 10")
            await connection.execute("select pg_sleep(10)")
        if tries == 2:
            await connection.execute("set transaction read only")
        await model.write(connection, events)

    model.projection = structs.replace(model.projection, write=slow_at_first)
    await relayed.record(created())
    async with projecting(relayed, model) as world:
        await world.reaches(1)
        assert tries == 3 and await world.positions() == [1]
        await world.projector.check()


async def test_what_nobody_foresaw_ends_nothing(relayed: Ground) -> None:
    """Not even an event that cannot be parked: readiness says so, and it goes on by itself once it can."""
    model = Model()
    model.poison = lambda _: ValueError("made-up poison")
    async with projecting(relayed, model) as world, relayed.superuser() as connection:
        await connection.execute("alter table gateway.dead_letters add constraint none check (position < 0)")
        await relayed.record(created())
        await until(lambda: _says(world, "is tried again: CheckViolationError"), "readiness names the fault")
        await connection.execute("alter table gateway.dead_letters drop constraint none")
        await world.reaches(1)
        await until(lambda: _says(world, "1 events are parked"), "what stood in the way is over")


async def test_an_error_that_no_column_takes_is_parked_all_the_same(relayed: Ground) -> None:
    """It may quote the event, and an event may hold any character."""
    model = Model()
    model.poison = lambda _: ValueError("made-up \0 and \ud800")
    await relayed.record(created())
    async with projecting(relayed, model) as world:
        await world.reaches(1)
        assert "made-up \ufffd and ?" in await world.pool.fetchval("select error from dead_letters")


async def test_an_unknown_type_stops_loudly(relayed: Ground) -> None:
    """What a newer version recorded is not skipped, and neither is what follows it: readiness says so."""
    async with projecting(relayed, Model()) as world:
        await world.reaches(await relayed.record(created()))
        async with relayed.superuser() as connection:
            await connection.execute("insert into fedota.writers values ('fedota_problems', 'SomethingNew')")
        async with relayed.as_role("problems") as connection:
            await connection.execute(
                "select fedota.append(array['k'], array[''::bytea], array[$1], array[null::int], array[null::bytea],"
                " array[1], array['a'], array[$2::uuid], array[null::uuid], array[null::text], array[$2::uuid],"
                " array['SomethingNew'], array[1], array['{}'::bytea])",
                f"problems/{new_id()}",
                uuid7(),
            )
        await relayed.record(created())
        await until(lambda: _says(world, "SomethingNew"), "readiness names the type")
        assert await world.positions() == [1] and world.projector.position == 1
        await relayed.reaches(3)  # the relay passes on what it does not know


async def _says(world: World, word: str) -> bool:
    return word in (await world.service.failures()).get("projection", "")


async def test_a_reader_waits_for_what_it_wrote(relayed: Ground) -> None:
    """And hears where the read model stands when that takes too long."""
    async with projecting(relayed, Model()) as world:
        await relayed.record(created(), created())
        await world.projector.catch_up()
        assert await world.positions() == [1, 2]
        with pytest.raises(FedotaError, match="reached position 2, not yet 3"):
            await world.projector.wait_for(3, timeout=0.01)


async def test_a_stream_that_is_ahead_of_the_log_is_not_believed(relayed: Ground) -> None:
    """The log is the truth: an event that it does not have is not projected, and breaks nothing."""
    async with projecting(relayed, Model()) as world:
        async with world.pool.acquire() as connection:
            with pytest.raises(StreamLostError, match="the stream is at 99, the log only at 0"):
                await world.projector._take([recorded(created(), position=99)], connection)
        await world.reaches(await relayed.record(created()))


async def test_a_wiped_stream_and_a_killed_server_are_gone_through(ground: Ground, tmp_path: Path) -> None:
    """The projection goes on by itself, and no row is missing or there twice."""
    own = OwnNats(tmp_path / "nats")
    await own.start()
    try:
        beside = Ground(own.beside(ground.servers), ground.database_url)
        beside.logs = ground.logs
        async with (
            beside.bus("relay") as bus,
            beside.log("relay") as log,
            Service("relay").running("relay", Relay(log, bus).run(Always())),
            projecting(beside, model := Model()) as world,
        ):
            await world.reaches(await ground.record(*(created() for _ in range(20))))
            async with beside.nats() as client:
                await client.jetstream().delete_stream(subjects.STREAM)
            await world.reaches(await ground.record(*(created() for _ in range(20))))
            await own.kill()
            position = await ground.record(*(created() for _ in range(20)))
            await own.start()
            await world.reaches(position)
            assert await world.positions() == model.reactions == list(range(1, 61))
    finally:
        await own.kill()
