"""The database itself keeps the log as it was written."""

from contextlib import suppress

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


@pytest.mark.parametrize("process", PROCESSES)
async def test_no_table_of_the_platform_yields(filled: Ground, process: str) -> None:
    """Whatever tables there are: none is written, locked, given away, or rid of its triggers, by whom it is not of."""
    async with filled.superuser() as connection:
        tables = await connection.fetch(
            "select c.oid::regclass::text as name, n.nspname as schema, (select attname from pg_attribute"
            " where attrelid = c.oid and attnum = 1) as first from pg_class c join pg_namespace n on"
            " n.oid = relnamespace where relkind = 'r' and n.nspname <> all (array['pg_catalog', 'information_schema'])"
        )
    assert {"fedota.events", "fedota.head", "fedota.requests", "fedota.writers"} <= {table["name"] for table in tables}
    async with filled.as_role(process) as connection:
        for table in tables:
            name, first = table["name"], table["first"]
            if process == "gateway" and table["schema"] == "people":
                continue  # its own
            for statement in (
                f"insert into {name} default values",
                f"update {name} set {first} = {first}",
                f"delete from {name}",
                f"truncate {name}",
                f"alter table {name} disable trigger all",
                f"alter table {name} owner to {role_of(process)}",
                f"create trigger mine before insert on {name} execute function suppress_redundant_updates_trigger()",
                f"create policy mine on {name}",
                f"lock table {name} in share mode",
                f"select from {name} for update",
                f"drop table {name}",
            ):
                await is_refused(connection, statement)


@pytest.mark.parametrize("process", PROCESSES)
async def test_a_process_is_nobody_on_the_server(filled: Ground, process: str) -> None:
    """No file, no program, no role, no other's schema, and no word in what the log is made of."""
    other = "gateway" if process != "gateway" else "rounds"
    async with filled.superuser() as connection:
        await connection.execute(f"create table {other}.theirs (a int); insert into {other}.theirs values (1)")
        await connection.execute(f"alter table {other}.theirs owner to {role_of(other)}")
    async with filled.as_role(process) as connection:
        for statement in (
            f"select * from {other}.theirs",
            f"insert into {other}.theirs values (2)",
            f"drop table {other}.theirs",
            f"create table {other}_next.mine (a int)",
            f"drop schema {other} cascade",
            "alter schema fedota rename to mine",
            "select pg_read_file('postgresql.conf')",
            "select pg_ls_dir('.')",
            "select lo_import('/etc/passwd')",
            "copy (select 1) to '/tmp/mine'",
            "copy (select 1) to program 'true'",
            "copy pg_class from program 'true'",
            "create function pg_temp.mine() returns int language c as '/lib/mine', 'mine'",
            "set session authorization postgres",
            "create role mine",
            f"grant {OWNER} to {role_of(process)}",
            f"alter role {role_of(other)} password 'mine'",
            f"reassign owned by {OWNER} to {role_of(process)}",
            f"alter default privileges for role {OWNER} grant all on tables to public",
            "create or replace function fedota.append() returns void language sql as ''",
            "alter function fedota.append security invoker",
            "alter function fedota.append set search_path = pg_temp",
            "drop function fedota.append",
            "create function fedota.sha256(bytea) returns bytea language sql as 'select $1'",
            "create publication mine for table fedota.events",
            "select pg_create_logical_replication_slot('mine', 'pgoutput')",
        ):
            await is_refused(connection, statement)
        for statement in ("alter system set fsync = off", "create database mine"):  # never within a transaction
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(statement)


async def test_the_append_function_calls_nothing_of_the_callers(filled: Ground) -> None:
    """Functions, an operator and a cast of the names that it uses: each would say so if it were called."""
    bodies = {
        "cardinality(anyarray) returns int": "int",
        "array_dims(anyarray) returns text": "text",
        "array_position(anycompatiblearray, anycompatible) returns int": "int",
        "starts_with(text, text) returns boolean": "boolean",
        "clock_timestamp() returns timestamptz": "timestamptz",
        "to_char(timestamp, text) returns text": "text",
        "convert_to(text, name) returns bytea": "bytea",
        "sha256(bytea) returns bytea": "bytea",
        "pg_notify(text, text) returns void": "void",
        "joined(bytea, bytea) returns bytea": "bytea",
        "contained(text[], text[]) returns boolean": "boolean",
    }
    async with filled.as_role("problems") as connection:
        await connection.execute("create type pg_temp.events as (position bigint); set search_path = problems, public")
        for signature in bodies:
            await connection.execute(
                f"create function problems.{signature} language plpgsql as"
                " $$ begin raise exception 'the caller was called'; end $$"
            )
        await connection.execute(
            "create operator problems.|| (function = problems.joined, leftarg = bytea, rightarg = bytea);"
            "create operator problems.<@ (function = problems.contained, leftarg = text[], rightarg = text[]);"
            "create temporary table head as select 0::bigint as position, ''::bytea as hash;"
            "create temporary table requests (key text, fingerprint bytea, position bigint, version int, result bytea)"
        )
        with pytest.raises(asyncpg.RaiseError, match="the caller was called"):
            await connection.fetch("select problems.sha256('')")
        row = await connection.fetchrow(APPEND, *arguments("ProblemStopped", f"problems/{new_id()}"))
        assert row is not None and (row["outcome"], row["position"]) == ("accepted", 3)
        assert await connection.fetchval("select count(*) from pg_temp.requests") == 0


@pytest.mark.parametrize("place", range(14))
async def test_arrays_of_no_ordinary_form_append_nothing(filled: Ground, place: int) -> None:
    """None at all, none in it, of two dimensions, with one element more: each argument in turn."""
    async with filled.as_role("problems") as connection:
        plain = arguments("ProblemStopped", f"problems/{new_id()}")
        odd: list[list[object] | None] = [None, [], [plain[place]], plain[place] * 2]
        for value in odd:
            skewed: list[object] = [*plain]
            skewed[place] = value
            with suppress(asyncpg.PostgresError):
                assert await connection.fetch(APPEND, *skewed) == [], "no request is answered"
        assert await connection.fetchval("select position from fedota.head") == 2
        assert await connection.fetchval("select count(*) from fedota.events") == 2


async def test_anybody_may_cry_wolf(filled: Ground) -> None:
    """A NOTIFY is no right of anybody: it only wakes who then looks for himself and finds nothing."""
    async with filled.as_role("auditor") as connection:
        for _ in range(50):
            await connection.execute("notify fedota_events, '999999'")
    await filled.record(created())
    assert await filled.logs["problems"].head() == 3
