"""The database itself keeps the log as it was written."""

import asyncpg
import pytest

from fedota.events import CATALOGUE, to_json, uuid7
from fedota.kernel.database import Connection
from fedota.kernel.migrations import OWNER, PROCESSES, role_of
from tests.contract.ground import Ground, created, requested
from tests.support.services import new_id

CHANGES = (
    "update fedota.{table} set {column} = {column}",
    "delete from fedota.{table}",
    "truncate fedota.{table}",
    "update fedota.{table} set {column} = {column} where false",
)
TABLES = {"events": "actor", "requests": "key"}
STATEMENTS = [change.format(table=table, column=column) for table, column in TABLES.items() for change in CHANGES]
APPEND = "select * from fedota.append($1,$2,$3,$4,$5,$6,$7,$8,$9,$10,$11,$12,$13,$14)"


def arguments(type_: str, subject: str) -> list[list[object]]:
    """A call of the append function by hand."""
    data = to_json(requested(new_id()))
    return [
        [uuid7().hex], [b""], [subject], [None], [None], [1], ["actor"], [uuid7()], [None], [None],
        [uuid7()], [type_], [1], [data],
    ]  # fmt: skip


async def is_refused(connection: Connection, statement: str, *args: object) -> None:
    """It fails for want of the right, and leaves the connection as it was."""
    transaction = connection.transaction()
    await transaction.start()
    try:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.fetch(statement, *args)
    finally:
        await transaction.rollback()


@pytest.fixture
async def filled(ground: Ground) -> Ground:
    """A log with something in it."""
    await ground.record(created(problem_id := new_id()), requested(problem_id))
    return ground


async def test_nobody_changes_what_was_recorded(filled: Ground) -> None:
    """Not a superuser, not the owner, not with triggers switched off for the session, not any process."""
    async with filled.superuser() as connection:
        before = await connection.fetch("select * from fedota.events order by position")
        for preparation in ("select 1", "set session_replication_role = replica", f"set role {OWNER}"):
            await connection.execute(preparation)
            for statement in STATEMENTS:
                await is_refused(connection, statement)
        await connection.execute("reset role; reset session_replication_role")
        assert await connection.fetch("select * from fedota.events order by position") == before
    for process in PROCESSES:
        async with filled.as_role(process) as connection:
            for statement in STATEMENTS:
                await is_refused(connection, statement)


@pytest.mark.parametrize("process", PROCESSES)
async def test_a_process_may_append_its_own_and_read(filled: Ground, process: str) -> None:
    """Its own types to its own streams, by the function; everything else is refused."""
    async with filled.as_role(process) as connection:
        assert await connection.fetchval("select count(*) from fedota.events") == 2
        for type_, entry in CATALOGUE.items():
            if entry.owner == process:
                row = await connection.fetchrow(APPEND, *arguments(type_, f"{process}/{new_id()}"))
                assert row is not None and row["outcome"] == "accepted"
            else:
                await is_refused(connection, APPEND, *arguments(type_, f"{process}/{new_id()}"))
        own = next((type_ for type_, entry in CATALOGUE.items() if entry.owner == process), "ProblemCreated")
        for stranger in {"problems", "rounds"} - {process}:
            await is_refused(connection, APPEND, *arguments(own, f"{stranger}/{new_id()}"))


@pytest.mark.parametrize("process", PROCESSES)
async def test_a_process_reaches_nothing_else(filled: Ground, process: str) -> None:
    """No table of the log directly, no other's schema, no way to more rights."""
    async with filled.as_role(process) as connection:
        other = "gateway" if process != "gateway" else "rounds"
        for statement in (
            "insert into fedota.events select * from fedota.events limit 1",
            "insert into fedota.writers values (current_user, 'InfraFailed')",
            "select * from fedota.requests",
            "select * from fedota.writers",
            "update fedota.head set position = 0",
            "select from fedota.head for update",
            "set session_replication_role = replica",
            f"set role {OWNER}",
            f"set role {role_of(other)}",
            f"create table {other}.mine (a int)",
            "create table fedota.mine (a int)",
            "create table public.mine (a int)",
            "alter table fedota.events disable trigger append_only",
            "drop trigger append_only on fedota.events",
            "drop table fedota.events",
            "create or replace function fedota.refuse_change() returns trigger language sql as ''",
            f"alter role {role_of(process)} superuser",
        ):
            await is_refused(connection, statement)
        if process in ("relay", "gateway"):
            await is_refused(connection, "select * from fedota.recorded('k')")


async def test_the_append_function_looks_up_nothing_in_the_callers_schema(filled: Ground) -> None:
    """It runs with the owner's rights: a caller's function of a known name must not be what it calls."""
    async with filled.as_role("problems") as connection:
        await connection.execute(
            "create function problems.sha256(bytea) returns bytea language sql as"
            " 'select decode(repeat(''66'', 32), ''hex'')';"
            "create temporary table writers as select session_user::text as role, 'InfraFailed'::text as type;"
            "set search_path = problems, pg_temp, pg_catalog, fedota"
        )
        row = await connection.fetchrow(APPEND, *arguments("ProblemStopped", f"problems/{new_id()}"))
        assert row is not None
        newest = await connection.fetchval("select hash from fedota.events order by position desc limit 1")
        assert newest != b"\x66" * 32
        await is_refused(connection, APPEND, *arguments("InfraFailed", f"problems/{new_id()}"))


async def test_a_caller_cannot_skew_the_arrays(filled: Ground) -> None:
    """Arrays that do not fit each other append nothing, whatever is wrong with them."""
    async with filled.as_role("problems") as connection:
        for index, value in ((5, [2]), (5, [None]), (0, [None]), (2, [None]), (10, [None]), (13, [None]), (12, [])):
            skewed = arguments("ProblemStopped", f"problems/{new_id()}")
            skewed[index] = list(value)
            with pytest.raises(asyncpg.PostgresError):
                await connection.fetch(APPEND, *skewed)
        assert await connection.fetchval("select position from fedota.head") == 2
        assert await connection.fetchval("select count(*) from fedota.events") == 2
