"""PostgreSQL is killed whole, its connections are cut one by one, while clients append and command."""

import asyncio
import os
import random
import signal
from pathlib import Path
from typing import Final

import asyncpg
import pytest

from fedota.errors import FedotaError
from tests.contract.ground import created
from tests.contract.models import Model, World, projecting
from tests.contract.test_append_only import APPEND, arguments
from tests.faults.checker import check
from tests.faults.conftest import one_of_each
from tests.faults.load import Load, a_report, an_append
from tests.faults.stand import USUAL, Stand
from tests.support.services import new_id, until

_CUT: Final = 10  # connections for one fault
_CONNECTED: Final = ("fedota-relay", "fedota-problems", "fedota-gateway", "fedota-rounds")
_CUT_ONE: Final = """
select pg_terminate_backend(pid) from pg_stat_activity where application_name = $1 order by pid offset $2 % (
    select greatest(count(*), 1) from pg_stat_activity where application_name = $1
) limit 1
"""


async def test_what_was_accepted_survives_a_kill_of_postgresql(
    tmp_path: Path, chance: random.Random, faults: int
) -> None:
    """Postmaster and children with -9, all at once, in the middle of their work."""
    async with Stand.up(tmp_path) as stand:
        async with Load.on(stand, chance) as load:
            for _ in range(faults):
                await load.goes_on()
                await asyncio.sleep(chance.uniform(0, 0.5))
                await stand.postgres.kill()
                await asyncio.sleep(chance.choice((0, 0, 3)))
                await stand.postgres.start()
            await load.goes_on()
        await stand.is_well(*USUAL)
        found = await check(stand, load.ledger, chance)
        assert min(found) >= faults


async def test_rows_that_a_kill_takes_back_are_missed_though_no_event_comes(tmp_path: Path) -> None:
    """Nothing had brought the commit of rows and checkpoint to the disk: they are projected again by themselves."""
    async with Stand.up(tmp_path, ["relay"]) as stand, stand.log("problems") as log:
        stand.logs["problems"] = log
        async with projecting(stand, model := Model()) as world:
            await world.reaches(await stand.record(created()))
            async with stand.superuser() as connection:
                writer = await connection.fetchval("select pid from pg_stat_activity where backend_type = 'walwriter'")
            os.kill(writer, signal.SIGSTOP)
            await world.reaches(await stand.record(created()))
            await stand.postgres.kill()
            await stand.postgres.start()
            await until(lambda: _has_rows(world, [1, 2]), "the rows are there again")
            assert model.reactions[-2:] == [2, 2], "they had been lost"
            await world.reaches(2)
            await until(lambda: _is_well(world), "readiness has nothing to say")


async def _has_rows(world: World, positions: list[int]) -> bool:
    try:
        return await world.positions() == positions
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):  # the pool has connections that ended
        return False


async def _is_well(world: World) -> bool:
    return await world.service.failures() == {}


async def test_connections_that_are_cut_at_random_cost_nothing(
    tmp_path: Path, chance: random.Random, faults: int
) -> None:
    """Among them those that wait for a NOTIFY and those that hold a projection's lease; then the relay's at once."""
    cut: set[str] = set()
    async with Stand.up(tmp_path) as stand:
        async with Load.on(stand, chance) as load:
            for application in one_of_each(_CONNECTED, chance, faults * _CUT):
                await asyncio.sleep(chance.uniform(0, 0.2))
                async with stand.superuser() as connection:
                    if await connection.fetch(_CUT_ONE, application, chance.randrange(1000)):
                        cut.add(application)
            async with stand.superuser() as connection:
                await until(lambda: _cut(connection, "fedota-relay"), "the relay is connected, and cut off")
            await load.goes_on()
        assert cut == {*_CONNECTED}
        await stand.is_well(*USUAL)
        await check(stand, load.ledger, chance)


async def _cut(connection: "asyncpg.Connection[asyncpg.Record]", application: str) -> int:
    found: int = await connection.fetchval(
        "select count(pg_terminate_backend(pid)) from pg_stat_activity where application_name = $1", application
    )
    return found


async def test_who_sits_on_the_log_does_not_stop_the_others_for_good(tmp_path: Path, chance: random.Random) -> None:
    """A transaction that appended and never ends: others are told `unavailable` soon, and go on once it is gone."""
    async with Stand.up(tmp_path) as stand:
        async with Load.on(stand, chance) as load, stand.as_role("storage") as sitting:
            await load.goes_on()
            transaction = sitting.transaction()
            await transaction.start()
            problem_id = new_id()
            call = arguments("FilesDeleted", f"storage/{problem_id}")
            assert await sitting.fetchval(APPEND, *call) == "accepted"
            begun = asyncio.get_running_loop().time()
            with pytest.raises(FedotaError, match="unavailable"):
                async with stand.log("rounds") as log:
                    await log.append(an_append([a_report(new_id(), 1)]))
            assert asyncio.get_running_loop().time() - begun < 20
            await sitting.close()  # as when its process is killed
            await load.goes_on()
        await stand.is_well(*USUAL)
        await check(stand, load.ledger, chance)
        async with stand.superuser() as connection:
            left = await connection.fetchval(
                "select count(*) from fedota.events where subject = $1", f"storage/{problem_id}"
            )
            assert left == 0, "what was never committed is not there"
