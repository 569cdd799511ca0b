"""The database is brought to its newest shape once, however often and by however many it is asked for."""

import asyncio
from pathlib import Path

import asyncpg
import pytest

from fedota.events import CATALOGUE, NewEvent, uuid7
from fedota.kernel.database import connect_pool
from fedota.kernel.event_log import Append, Context, EventLog
from fedota.kernel.migrations import PROCESSES, ForeignRolesError, migrate, migration_files, role_of
from fedota.kernel.settings import Secret
from fedota.local.postgres import postgres
from fedota.local.programs import kept_alive
from fedota.local.state import DataDirectory
from tests.contract.ground import PASSWORD, Ground, created
from tests.support.servers import RunningServers, fresh_database

SHAPE = """
select n.nspname, c.relname, c.relkind::text, c.relacl::text
from pg_class c join pg_namespace n on n.oid = c.relnamespace
where n.nspname = 'fedota' or n.nspname = any($1) order by 1, 2
"""


async def shape(url: str) -> list[tuple[object, ...]]:
    """Everything that is in the database, and who may use it."""
    connection = await asyncpg.connect(url)
    try:
        return [tuple(row) for row in await connection.fetch(SHAPE, list(PROCESSES))]
    finally:
        await connection.close()


async def test_twice_is_once(ground: Ground) -> None:
    """The second time changes nothing and keeps what was recorded."""
    await ground.record(created())
    before = await shape(ground.database_url)
    await migrate(ground.database_url, dict.fromkeys(PROCESSES, PASSWORD), share_roles=True)
    assert await shape(ground.database_url) == before
    assert await ground.logs["problems"].head() == 1
    await ground.record(created())


async def test_many_at_once(database_url: str) -> None:
    """Each file is applied by one of them."""
    await asyncio.gather(
        *(migrate(database_url, dict.fromkeys(PROCESSES, PASSWORD), share_roles=True) for _ in range(6))
    )
    connection = await asyncpg.connect(database_url)
    try:
        applied = await connection.fetch("select name from fedota.migrations order by name")
        writers = await connection.fetch("select * from fedota.writers")
    finally:
        await connection.close()
    assert [row["name"] for row in applied] == [name for name, _ in migration_files()]
    assert {(row["role"], row["type"]) for row in writers} == {
        (role_of(entry.owner), type_) for type_, entry in CATALOGUE.items()
    }


async def test_a_failed_migration_leaves_nothing(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All or nothing: what failed can be mended and run again."""
    files = migration_files()
    monkeypatch.setattr("fedota.kernel.migrations.migration_files", lambda: [*files, ("9999_wrong.sql", "select 1/0")])
    with pytest.raises(asyncpg.DivisionByZeroError):
        await migrate(database_url, dict.fromkeys(PROCESSES, PASSWORD), share_roles=True)
    assert await shape(database_url) == []
    monkeypatch.undo()
    await migrate(database_url, dict.fromkeys(PROCESSES, PASSWORD), share_roles=True)
    assert await shape(database_url) != []


async def test_a_password_is_whatever_it_is(servers: RunningServers, database_url: str) -> None:
    """Quotes and backslashes too; a new one takes the place of the old."""
    odd = 'it\'s \\ "odd" $1 ä'
    try:
        await migrate(database_url, {**dict.fromkeys(PROCESSES, PASSWORD), "rounds": odd}, share_roles=True)
        connection = await asyncpg.connect(database_url, user=role_of("rounds"), password=odd)
        await connection.close()
        with pytest.raises(asyncpg.InvalidPasswordError):
            await asyncpg.connect(database_url, user=role_of("rounds"), password=PASSWORD)
        await migrate(
            database_url, {**dict.fromkeys(PROCESSES, PASSWORD), "rounds": "\u00a0\ufb01\u00ad"}, share_roles=True
        )
        connection = await asyncpg.connect(database_url, user=role_of("rounds"), password=" fi")
        await connection.close()
    finally:  # roles belong to the server, and so to every test
        await migrate(database_url, dict.fromkeys(PROCESSES, PASSWORD), share_roles=True)


async def test_the_roles_of_another_platform_are_left_alone(ground: Ground, servers: RunningServers) -> None:
    """They belong to the server: with new passwords, a platform in another database would be locked out."""
    async with fresh_database(servers.admin_url) as other:
        with pytest.raises(ForeignRolesError, match="has the role fedota_gateway already"):
            await migrate(other, dict.fromkeys(PROCESSES, "another"))
        assert await shape(other) == []
    await migrate(ground.database_url, dict.fromkeys(PROCESSES, PASSWORD))  # this one is theirs
    await ground.record(created())


async def test_the_owner_of_the_database_need_not_be_a_superuser(tmp_path: Path) -> None:
    """On a server of its own, which logs every statement and never a password."""
    program, url = await postgres(DataDirectory(tmp_path))
    passwords = {process: f"hunter2-{process}" for process in PROCESSES}
    async with kept_alive(program):
        root = await asyncpg.connect(url)
        try:
            await root.execute("alter system set log_statement = 'all'")
            await root.execute("select pg_reload_conf()")
            await root.execute("create role admin login createrole noinherit password 'made-up'")
            await root.execute("create database theirs owner admin")
        finally:
            await root.close()
        place = url.rpartition("@")[2].partition("/")[0]
        for _ in range(2):
            await migrate(f"postgresql://admin:made-up@{place}/theirs", passwords)
        gateway = Secret(f"postgresql://{role_of('gateway')}:{passwords['gateway']}@{place}/theirs")
        problems = Secret(f"postgresql://{role_of('problems')}:{passwords['problems']}@{place}/theirs")
        async with connect_pool(problems, "problems") as pool, EventLog.open(pool) as log:
            data = created()
            context = Context(actor="test", correlation=uuid7())
            request = Append(subject=f"problems/{data.problem_id}", events=[NewEvent(data=data)], context=context)
            assert (await log.append(request)).position == 1
        async with connect_pool(gateway, "gateway") as pool:
            await pool.execute("create table mine (a int)")
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await pool.execute("delete from fedota.events")
    text = program.log.read_text()
    assert "alter role fedota_gateway login password" in text and "hunter2" not in text
