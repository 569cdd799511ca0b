"""Read models as they were."""

import pytest

from fedota.kernel.rebuilding import as_of
from gateway.projection import PROJECTION
from tests.contract.ground import Ground, created, requested
from tests.contract.models import Model, projecting
from tests.support.services import new_id


async def test_a_read_model_as_of_each_position(relayed: Ground) -> None:
    """It holds what the events up to there make of it, of the streams that were asked for, and then it is gone."""
    model, one, other = Model(), new_id(), new_id()
    await relayed.record(created(one), created(other), requested(one, "A"), requested(other, "B"), requested(one, "C"))
    async with projecting(relayed, model) as world:
        await world.reaches(5)
        streams = [f"problems/{one}"]
        for position, expected in ((0, []), (1, [1]), (2, [1]), (3, [1, 3]), (5, [1, 3, 5]), (99, [1, 3, 5])):
            async with as_of(model.projection, world.pool, world.log, position, streams) as then:
                assert [row["position"] for row in await then.fetch("select * from seen order by 1")] == expected
        async with as_of(model.projection, world.pool, world.log, 4, [*streams, f"problems/{other}"]) as then:
            assert await then.fetchval("select count(*) from seen") == 4
            assert await world.positions() == [1, 2, 3, 4, 5], "others see the live one meanwhile"
        with pytest.raises(ZeroDivisionError):
            async with as_of(model.projection, world.pool, world.log, 4, streams):
                raise ZeroDivisionError
        assert await world.positions() == [1, 2, 3, 4, 5] and model.reactions == [1, 2, 3, 4, 5]
        for _ in range(8):  # whichever connection it was
            async with world.pool.acquire() as connection:
                assert await connection.fetchval("select count(*) from seen") == 5
                assert await connection.fetchval("select to_regclass('pg_temp.seen')") is None


async def test_what_is_parked_had_no_effect_then(relayed: Ground) -> None:
    """As in the live one."""
    model, one = Model(), new_id()
    model.poison = lambda event: ValueError("made up") if event.position == 2 else None
    await relayed.record(created(one), requested(one, "A"), requested(one, "B"))
    async with projecting(relayed, model) as world:
        await world.reaches(3)
        async with as_of(model.projection, world.pool, world.log, 3, [f"problems/{one}"]) as then:
            assert [row["position"] for row in await then.fetch("select * from seen")] == [1]


async def test_the_gateways_tables(relayed: Ground) -> None:
    """All of them, with their keys: a later word on an organization replaces the earlier one here too."""
    one = new_id()
    await relayed.record(created(one), requested(one, "A"), requested(one, "A"))
    model = Model()
    model.projection = PROJECTION
    async with projecting(relayed, model) as world:
        await world.reaches(3)
        async with as_of(PROJECTION, world.pool, world.log, 3, [f"problems/{one}"]) as then:
            assert await then.fetchval("select count(*) from participations") == 1
            assert await then.fetchval("select count(*) from feed") == 3
            assert {name: await then.fetchval(f"select count(*) from {name}") for name in PROJECTION.names} == {
                "problems": 1,
                "files": 0,
                "participations": 1,
                "infrastructure": 0,
                "rounds": 0,
                "contributions": 0,
                "feed": 3,
            }
