"""The database is brought to its newest shape once, however often and by however many it is asked for."""

import asyncio

import asyncpg
import pytest

from fedota.events import CATALOGUE
from fedota.kernel.migrations import PROCESSES, migrate, migration_files, role_of
from tests.contract.ground import PASSWORD, Ground, created
from tests.support.servers import RunningServers

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
    await migrate(ground.database_url, dict.fromkeys(PROCESSES, PASSWORD))
    assert await shape(ground.database_url) == before
    assert await ground.logs["problems"].head() == 1
    await ground.record(created())


async def test_many_at_once(database_url: str) -> None:
    """Each file is applied by one of them."""
    await asyncio.gather(*(migrate(database_url, dict.fromkeys(PROCESSES, PASSWORD)) for _ in range(6)))
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
        await migrate(database_url, dict.fromkeys(PROCESSES, PASSWORD))
    assert await shape(database_url) == []
    monkeypatch.undo()
    await migrate(database_url, dict.fromkeys(PROCESSES, PASSWORD))
    assert await shape(database_url) != []


async def test_a_password_is_whatever_it_is(servers: RunningServers, database_url: str) -> None:
    """Quotes and backslashes too; a new one takes the place of the old."""
    odd = 'it\'s \\ "odd" $1 ä'
    try:
        await migrate(database_url, {**dict.fromkeys(PROCESSES, PASSWORD), "rounds": odd})
        connection = await asyncpg.connect(database_url, user=role_of("rounds"), password=odd)
        await connection.close()
        with pytest.raises(asyncpg.InvalidPasswordError):
            await asyncpg.connect(database_url, user=role_of("rounds"), password=PASSWORD)
    finally:  # roles belong to the server, and so to every test
        await migrate(database_url, dict.fromkeys(PROCESSES, PASSWORD))
