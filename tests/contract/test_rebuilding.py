"""A read model is verified, and built anew, while it lives."""

import asyncio
import signal
from collections.abc import Awaitable
from pathlib import Path

import msgspec
import pytest

from fedota.contracts.operations import Difference
from fedota.errors import FedotaError
from fedota.events import Event
from fedota.kernel import rebuilding
from fedota.kernel.database import Pool
from fedota.kernel.event_log import OUTAGES
from fedota.kernel.read_models import Projection
from fedota.kernel.rebuilding import rebuild, verify
from fedota.kernel.tables import Put, writing
from tests.contract.ground import Ground, created, requested
from tests.contract.models import TABLES, Model, World, projecting
from tests.support.services import new_id, until

REBUILDER = "tests.contract.rebuilder"


async def test_a_rebuild_while_events_arrive_loses_and_doubles_nothing(
    relayed: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    """500 a second: the live projection goes on meanwhile, readers find everything at each moment, nothing reacts."""
    monkeypatch.setattr(rebuilding, "_BATCH", 200)
    model = Model()
    for _ in range(20):
        await asyncio.gather(*(relayed.record(created()) for _ in range(150)))
    async with projecting(relayed, model) as world:
        await world.reaches(3000)
        stop, seen = asyncio.Event(), list[int]()
        arriving = asyncio.create_task(_arrive(relayed, 1000, per_second=500))
        reading = asyncio.create_task(_read(world.pool, seen, stop))
        begun = world.projector.position
        rows = await rebuild(model.projection, world.pool, world.log)
        ended = world.projector.position
        last = await arriving
        stop.set()
        await reading
        await world.reaches(last)
        assert last == 4000 and await world.positions() == list(range(1, 4001))
        assert model.reactions == list(range(1, 4001))
        assert begun < ended <= 4000 and begun <= rows <= 4000, "the live one went on meanwhile"
        assert min(seen) >= begun and seen == sorted(seen) and len(set(seen)) > 2
        assert await verify(model.projection, world.pool, world.log) == (4000, [])
        assert await _left_over(relayed) == []


async def _arrive(ground: Ground, count: int, *, per_second: int) -> int:
    """Appends by the clock."""
    loop = asyncio.get_running_loop()
    begun, tasks = loop.time(), []
    for number in range(count):
        await asyncio.sleep(max(0.0, begun + number / per_second - loop.time()))
        tasks.append(asyncio.create_task(ground.record(created())))
    return max(await asyncio.gather(*tasks))


async def _read(pool: Pool, seen: list[int], stop: asyncio.Event) -> None:
    """How many rows a reader finds, over and over."""
    while not stop.is_set():
        seen.append(await pool.fetchval("select count(*) from seen"))


async def _left_over(ground: Ground) -> list[str]:
    async with ground.superuser() as connection:
        query = "select relname from pg_class where relnamespace = 'gateway_next'::regnamespace"
        return [row["relname"] for row in await connection.fetch(query)]


async def test_what_nobody_wrote_from_the_log_is_found(relayed: Ground) -> None:
    """A row that was edited, one that was taken and one that was added: by table, counted, with examples."""
    model = Model()
    one = new_id()
    await relayed.record(created(one), *(requested(one, str(number)) for number in range(5)))
    async with projecting(relayed, model) as world:
        await world.reaches(6)
        assert await verify(model.projection, world.pool, world.log) == (6, [])
        await world.pool.execute("update seen set data = 'edited' where position = 2")
        rows, [found] = await verify(model.projection, world.pool, world.log)
        assert (rows, found.table, found.live, found.rebuilt) == (6, "seen", 1, 1)
        live, rebuilt = found.examples
        assert live == f"live (2,problems/{one},edited)" and rebuilt.startswith(f"rebuilt (2,problems/{one},")
        await world.pool.execute("delete from seen where position in (3, 4)")
        await world.pool.execute("insert into seen select * from seen where position = 5")  # the same row once more
        rows, [found] = await verify(model.projection, world.pool, world.log)
        assert (found.live, found.rebuilt, len(found.examples)) == (2, 3, 5)
        assert await world.pool.fetchval("select count(*) from seen where data = 'edited'") == 1, "it changes nothing"
        assert await rebuild(model.projection, world.pool, world.log) == 6
        assert await verify(model.projection, world.pool, world.log) == (6, [])
        assert model.reactions == [*range(1, 7)]


async def test_a_verification_compares_one_moment(relayed: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events that are projected between its look at the checkpoint and its look at the tables make no difference."""
    model, compare = Model(), rebuilding._Copy.compare
    await relayed.record(created(), created())
    async with projecting(relayed, model) as world:
        await world.reaches(2)

        async def compare_later(copy: rebuilding._Copy, name: str) -> Difference | None:
            await world.reaches(await relayed.record(created()))
            return await compare(copy, name)

        monkeypatch.setattr(rebuilding._Copy, "compare", compare_later)
        assert await verify(model.projection, world.pool, world.log) == (2, [])
        assert await verify(model.projection, world.pool, world.log) == (3, [])
        assert await world.positions() == [1, 2, 3, 4]


async def test_tables_that_were_emptied_come_back(relayed: Ground) -> None:
    """Or that somebody dropped altogether."""
    model = Model()
    await relayed.record(*(created() for _ in range(20)))
    async with projecting(relayed, model) as world:
        await world.reaches(20)
        for harm in ("truncate seen", "drop table seen"):
            await world.pool.execute(harm)
            assert await rebuild(model.projection, world.pool, world.log) == 20
            assert await verify(model.projection, world.pool, world.log) == (20, [])


async def test_what_is_parked_or_dropped_stays_so(relayed: Ground) -> None:
    """It has no effect in the live tables and none in those that are built anew, and it can be retried as before."""
    model, bad = Model(), new_id()
    model.poison = lambda event: ValueError("made up") if event.position == 2 else None
    await relayed.record(created(), created(bad), requested(bad), created())
    async with projecting(relayed, model) as world:
        await world.reaches(4)
        assert await verify(model.projection, world.pool, world.log) == (2, [])
        assert await rebuild(model.projection, world.pool, world.log) == 2
        assert (await world.positions(), await world.parked()) == ([1, 4], [2, 3])
        await world.pool.execute("update dead_letters set state = 'dropped' where position = 2")
        assert await rebuild(model.projection, world.pool, world.log) == 2
        assert await verify(model.projection, world.pool, world.log) == (2, [])


async def test_a_handler_that_fails_ends_it(relayed: Ground) -> None:
    """In a plain sentence that names the event; the live tables stay as they are, and nothing is left over."""
    model = Model()
    await relayed.record(*(created() for _ in range(50)))
    async with projecting(relayed, model) as world:
        await world.reaches(50)
        model.poison = lambda event: ValueError("made up") if event.position == 33 else None
        for work in (rebuild, verify):
            with pytest.raises(FedotaError, match=r"position 33 \(ProblemCreated\) cannot be projected: .*made up"):
                await work(model.projection, world.pool, world.log)
        assert await world.positions() == list(range(1, 51))
        assert await _left_over(relayed) == []
        model.poison = lambda _: None
        assert await rebuild(model.projection, world.pool, world.log) == 50


@pytest.mark.parametrize("told", [{"KILL_AT": "120"}, {}])
async def test_a_rebuild_that_is_killed(relayed: Ground, tmp_path: Path, told: dict[str, str]) -> None:
    """With -9, in the middle or one moment before its commit: the live tables are untouched, the next one works."""
    model = Model()
    await relayed.record(*(created() for _ in range(150)))
    async with projecting(relayed, model) as world:
        await world.reaches(150)
        await world.pool.execute("insert into seen values (0, 'mark', '')")
        child = await relayed.program(REBUILDER, "gateway", tmp_path / "rebuilder", **told)
        await asyncio.wait_for(child.communicate(), 30)
        assert child.returncode == -signal.SIGKILL
        await world.reaches(await relayed.record(created()))
        assert await world.positions() == [0, *range(1, 152)]
        await until(lambda: _rebuilt(model, world), "what was killed has let go")
        assert await world.positions() == [*range(1, 152)]
        assert await _left_over(relayed) == []


async def _rebuilt(model: Model, world: World) -> bool:
    try:
        return await rebuild(model.projection, world.pool, world.log) == 151
    except FedotaError as error:
        assert error.problem.code == "conflict"
        return False


async def test_two_at_once(relayed: Ground) -> None:
    """The second one is refused plainly, whatever both are."""
    model = Model()
    await relayed.record(*(created() for _ in range(20)))
    async with projecting(relayed, model) as world:
        await world.reaches(20)
        model.going.clear()
        for first in (rebuild, verify):
            working = asyncio.create_task(_coroutine(first(model.projection, world.pool, world.log)))
            await until(lambda: _is_locked(relayed), "the first one has begun")
            for second in (rebuild, verify):
                with pytest.raises(FedotaError, match="being rebuilt or verified already"):
                    await second(model.projection, world.pool, world.log)
            model.going.set()
            await working
            model.going.clear()
        model.going.set()


async def _coroutine(work: Awaitable[object]) -> object:
    return await work


async def _is_locked(ground: Ground) -> bool:
    async with ground.superuser() as connection:
        query = "select exists (select from pg_locks where locktype = 'advisory' and objid = 2 and objsubid = 2)"
        return bool(await connection.fetchval(query))


async def _is_free(ground: Ground) -> bool:
    return not await _is_locked(ground)


async def test_one_who_reads_on_and_on_does_not_hold_up_the_others(
    relayed: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The swap gives way after a moment and is tried again, and the rows that it had written come again too."""
    monkeypatch.setattr(rebuilding, "_LOCK_SECONDS", 1)
    model = Model()
    await relayed.record(*(created() for _ in range(20)))
    async with projecting(relayed, model) as world:
        await world.reaches(20)
        async with relayed.as_role("gateway") as reader:
            transaction = reader.transaction()
            await transaction.start()
            await reader.fetch("select * from gateway.seen")
            working = asyncio.create_task(rebuild(model.projection, world.pool, world.log))
            for _ in range(2):
                await until(lambda: _waits(relayed, True), "the rebuild waits for the reader")
                position = await relayed.record(created())
                await until(lambda: _waits(relayed, False), "it has given way")
                await world.reaches(position)
                assert await world.pool.fetchval("select count(*) from seen") == position
            await transaction.rollback()
        assert await working == 22
        assert await world.positions() == list(range(1, 23))


async def _waits(ground: Ground, wanted: bool) -> bool:
    async with ground.superuser() as connection:
        query = "select exists (select from pg_locks where not granted and mode = 'AccessExclusiveLock')"
        return bool(await connection.fetchval(query)) == wanted


async def test_one_who_never_stops_reading(relayed: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the end it is said, and nothing was changed."""
    monkeypatch.setattr(rebuilding, "_LOCK_SECONDS", 0.05)
    monkeypatch.setattr(rebuilding, "_SWAPS", 2)
    model = Model()
    await relayed.record(created())
    async with projecting(relayed, model) as world, relayed.as_role("gateway") as reader, reader.transaction():
        await world.reaches(1)
        await reader.fetch("select * from gateway.seen")
        with pytest.raises(FedotaError, match="Somebody went on reading"):
            await rebuild(model.projection, world.pool, world.log)
        assert await _left_over(relayed) == [] and await world.positions() == [1]


async def test_a_database_that_goes_away_on_the_way(relayed: Ground) -> None:
    """The rebuild ends with it, and nothing has changed."""
    model = Model()
    await relayed.record(*(created() for _ in range(20)))
    async with projecting(relayed, model) as world:
        await world.reaches(20)
        hit = False

        def cut_off(event: Event) -> Exception | None:
            nonlocal hit
            hit = True
            return None

        model.going.clear()
        model.poison = cut_off
        working = asyncio.create_task(rebuild(model.projection, world.pool, world.log))
        await until(lambda: _is_locked(relayed), "it has begun")
        async with relayed.superuser() as connection:
            await connection.execute(
                "select pg_terminate_backend(pid) from pg_locks where locktype = 'advisory' and objid = 2"
            )
        model.going.set()
        with pytest.raises(OUTAGES):
            await working
        # a backend that is told to go says so to its client first, and lets go of its locks then
        await until(lambda: _is_free(relayed), "nobody works on it any more")
        assert await rebuild(model.projection, world.pool, world.log) == 20 and hit


async def test_one_who_is_cancelled_leaves_no_tables(relayed: Ground) -> None:
    """Not even those that were made a moment before: in a pooled connection they would hide the live ones."""
    model = Model()
    await relayed.record(created())
    async with projecting(relayed, model) as world:
        await world.reaches(1)
        slow = msgspec.structs.replace(model.projection, tables=f"{TABLES} commit; select pg_sleep(60)")
        working = asyncio.create_task(_coroutine(verify(slow, world.pool, world.log)))
        await until(lambda: _has_temporary(relayed, True), "its tables are made")
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working
        await until(lambda: _has_temporary(relayed, False), "they are gone")


async def _has_temporary(ground: Ground, wanted: bool) -> bool:
    async with ground.superuser() as connection:
        query = "select exists (select from pg_class where relname = 'seen' and relpersistence = 't')"
        return bool(await connection.fetchval(query)) == wanted


@pytest.mark.parametrize("trouble", [ValueError("made up"), asyncio.CancelledError()])
async def test_what_fails_when_all_is_done(
    relayed: Ground, monkeypatch: pytest.MonkeyPatch, trouble: BaseException
) -> None:
    """It does not make a rebuild fail whose tables are in place, and no connection is given back with tables in it."""
    model, clear, calls = Model(), rebuilding._Copy._clear, list[rebuilding._Copy]()

    async def clear_once(copy: rebuilding._Copy) -> None:
        calls.append(copy)
        if calls.count(copy) > 1:
            raise trouble
        await clear(copy)

    await relayed.record(created(), created())
    async with projecting(relayed, model) as world:
        await world.reaches(2)
        monkeypatch.setattr(rebuilding._Copy, "_clear", clear_once)
        await world.pool.execute("truncate seen")
        assert await rebuild(model.projection, world.pool, world.log) == 2
        assert await world.positions() == [1, 2]
        if isinstance(trouble, Exception):
            assert await verify(model.projection, world.pool, world.log) == (2, [])
        else:
            with pytest.raises(asyncio.CancelledError):
                await verify(model.projection, world.pool, world.log)
        await until(lambda: _has_temporary(relayed, False), "they are gone with their session")


async def test_one_who_is_cancelled_too_late_succeeds(relayed: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is committed meanwhile is not said to have failed."""
    model, replace, replaced = Model(), rebuilding._Copy.replace_live, asyncio.Event()

    async def replace_and_tell(copy: rebuilding._Copy) -> int:
        rows = await replace(copy)
        replaced.set()
        return rows

    monkeypatch.setattr(rebuilding._Copy, "replace_live", replace_and_tell)
    await relayed.record(created(), created())
    async with projecting(relayed, model) as world:
        await world.reaches(2)
        await world.pool.execute("truncate seen")
        working = asyncio.create_task(_coroutine(rebuild(model.projection, world.pool, world.log)))
        await replaced.wait()
        working.cancel()
        assert await working == 2
        assert await world.positions() == [1, 2]


async def test_several_readers_one_after_another(relayed: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is for all tables together: who waits for the first does not wait for the readers of the others too."""
    monkeypatch.setattr(rebuilding, "_LOCK_SECONDS", 0.4)
    model, tries = _with_more(Model()), _tries(monkeypatch)
    await relayed.record(created())
    async with projecting(relayed, model) as world:
        await world.reaches(1)
        async with asyncio.TaskGroup() as readers:
            for name in ("more", "most"):
                begun = asyncio.Event()
                readers.create_task(_read_until_waited_for(relayed, name, begun))
                await begun.wait()
            assert await rebuild(model.projection, world.pool, world.log) == 1
    assert len(tries) > 1


def _with_more(model: Model) -> Model:
    """Two more tables."""
    tables = f"{TABLES} create table if not exists more (x int); create table if not exists most (x int);"
    model.projection = msgspec.structs.replace(model.projection, tables=tables, names=("seen", "more", "most"))
    return model


def _tries(monkeypatch: pytest.MonkeyPatch) -> list[rebuilding._Copy]:
    tries, replace = list[rebuilding._Copy](), rebuilding._Copy.replace_live

    async def replace_and_count(copy: rebuilding._Copy) -> int:
        tries.append(copy)
        return await replace(copy)

    monkeypatch.setattr(rebuilding._Copy, "replace_live", replace_and_count)
    return tries


async def _read_until_waited_for(ground: Ground, name: str, begun: asyncio.Event) -> None:
    """And then for 0.3 seconds more, which alone is not too long."""
    async with ground.as_role("gateway") as reader, reader.transaction():
        await reader.fetch(f"select from gateway.{name}")
        begun.set()
        await until(lambda: _is_waited_for(ground, name), f"the rebuild waits for {name}")
        await reader.execute("select pg_sleep(0.3)")


async def _is_waited_for(ground: Ground, name: str) -> bool:
    async with ground.superuser() as connection:
        query = "select exists (select from pg_locks where not granted and relation = to_regclass($1))"
        return bool(await connection.fetchval(query, f"gateway.{name}"))


async def test_a_reader_who_waits_for_it_too(relayed: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deadlock, which PostgreSQL ends: the rebuild is tried again."""
    monkeypatch.setattr(rebuilding, "_LOCK_SECONDS", 20)
    model, tries = _with_more(Model()), _tries(monkeypatch)
    await relayed.record(created())
    async with projecting(relayed, model) as world, relayed.as_role("gateway") as reader:
        await world.reaches(1)
        async with reader.transaction():
            await reader.fetch("select from gateway.more")
            working = asyncio.create_task(rebuild(model.projection, world.pool, world.log))
            await until(lambda: _is_waited_for(relayed, "more"), "the rebuild waits for the reader")
            assert await reader.fetchval("select count(*) from gateway.seen") == 1
        assert await working == 1 and len(tries) > 1


async def test_tables_of_another_version(relayed: Ground) -> None:
    """What they do not take is not parked: a rebuild is asked for, gives them their new shape, and all goes on."""
    old, new = Model(), Model()
    columns = "position bigint primary key, subject text not null"
    old.projection = _projection(f"create table if not exists seen ({columns});", "subject")
    index = "create index if not exists seen_by_type on seen (type);"
    new.projection = _projection(
        f"create table if not exists seen ({columns}, type text not null); {index}", "subject", "type"
    )
    await relayed.record(created(), created(), created())
    async with projecting(relayed, old) as world:
        await world.reaches(3)
    await relayed.record(created())
    async with projecting(relayed, new) as world:
        await until(lambda: _says(world, "Run `fedota projections rebuild gateway`"), "it says what to do")
        with pytest.raises(FedotaError, match=r"another version of this program made its tables \(seen\)"):
            await world.projector.check()
        assert (await world.positions(), await world.parked()) == ([1, 2, 3], [])
        assert await rebuild(new.projection, world.pool, world.log) == 3
        await world.reaches(4)
        await world.reaches(await relayed.record(created()))
        assert await verify(new.projection, world.pool, world.log) == (5, [])
        assert await world.pool.fetchval("select count(*) from seen where type = 'ProblemCreated'") == 5
        assert await world.parked() == []
        await until(lambda: _says(world, ""), "it says nothing any more")


def _projection(tables: str, *names: str) -> Projection:
    def changes(event: Event) -> list[Put]:
        return [Put("seen", {"position": event.position}, {name: getattr(event, name) for name in names})]

    return Projection(tables=tables, names=("seen",), write=writing(changes, "seen"))


async def _says(world: World, wanted: str) -> bool:
    said = world.projector.stopped or ""
    return wanted in said if wanted else not said
