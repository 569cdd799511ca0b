"""The hash chain can be checked by anyone who can read the table, and shows what even a superuser did."""

import hashlib
from collections.abc import Sequence

import asyncpg

from fedota.events import NewEvent, uuid7
from fedota.kernel.event_log import Append, Context
from tests.contract.ground import Ground, created, requested
from tests.support.services import new_id


def first_break(rows: Sequence[asyncpg.Record]) -> int | None:
    """The position where the chain is broken, from the stored bytes alone; None where it is whole."""
    before = bytes(32)
    for row in rows:
        lines = [
            *(row["position"], row["id"], row["type"], row["schema"], row["subject"], row["version"]),
            row["time"].strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            *(row["actor"], row["correlation"], row["causation"] or "", row["traceparent"] or ""),
        ]
        head = "".join(f"{line}\n" for line in lines).encode()
        before = hashlib.sha256(before + head + row["data"]).digest()
        if before != row["hash"]:
            return int(row["position"])
    return None


async def rows(connection: "asyncpg.Connection[asyncpg.Record]") -> list[asyncpg.Record]:
    """The log as it is stored."""
    return await connection.fetch("select * from fedota.events order by position")


async def test_the_chain_is_whole_and_shows_each_change(ground: Ground) -> None:
    """Over several batches, with and without a cause; every column is covered, a missing event too."""
    problem_id = new_id()
    for number in range(3):
        await ground.record(created(), requested(new_id(), f"Spital Zürich {number}"))
        context = Context(actor="ä: setter", correlation=uuid7(), causation=uuid7(), traceparent="00-ab-cd-01")
        events = [NewEvent(data=requested(problem_id, f"{number}/{one}")) for one in range(3)]
        await ground.logs["problems"].append(Append(subject=f"problems/{problem_id}", events=events, context=context))
    async with ground.superuser() as connection:
        whole = await rows(connection)
        assert len(whole) == 15 and first_break(whole) is None
        assert await connection.fetchval("select hash from fedota.head") == whole[-1]["hash"]
        await connection.execute("alter table fedota.events disable trigger append_only")
        for change in (
            "type = 'ProblemStopped'",
            "schema = 2",
            "actor = 'nobody'",
            "time = time + interval '1 microsecond'",
            "data = data || ' '::bytea",
            "id = gen_random_uuid()",
            "correlation = gen_random_uuid()",
            "causation = gen_random_uuid()",
            "traceparent = 'x'",
            "subject = subject || '0'",
            "version = version + 100",
            "hash = sha256(hash)",
        ):
            transaction = connection.transaction()
            await transaction.start()
            await connection.execute(f"update fedota.events set {change} where position = 7")
            assert first_break(await rows(connection)) == 7, change
            await transaction.rollback()
        await connection.execute("delete from fedota.events where position = 7")
        assert first_break(await rows(connection)) == 8
