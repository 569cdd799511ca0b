"""The database's shape: numbered SQL files beside this module, applied once, in order, forward only."""

from importlib import resources
from typing import Final

import asyncpg

from fedota.events import CATALOGUE

OWNER: Final = "fedota_owner"
PROCESSES: Final = ("relay", "problems", "storage", "rounds", "orchestrator", "gateway")
_LOCK: Final = 0x6665646F7461  # "fedota": two migrations at once would apply a file twice


def role_of(process: str) -> str:
    """The login role of a process."""
    return f"fedota_{process}"


async def migrate(admin_url: str, passwords: dict[str, str]) -> None:
    """Bring the database to the newest shape and give each process its login role.

    `admin_url` is of a role that may create roles and schemas; `passwords` has one for each of `PROCESSES`.
    """
    connection = await asyncpg.connect(admin_url)
    try:
        await connection.execute("select pg_advisory_lock($1)", _LOCK)
        async with connection.transaction():
            await _create_roles(connection, passwords)
            await _apply_files(connection)
            await _grant(connection)
    finally:
        await connection.close()


async def _create_roles(connection: asyncpg.Connection, passwords: dict[str, str]) -> None:
    await _ensure_role(connection, OWNER, "nologin")
    await connection.execute(f"grant {OWNER} to current_user")
    # passwords never stand in the server's log, not even of failed statements
    await connection.execute("set local log_statement = 'none'; set local log_min_error_statement = 'panic'")
    for process in PROCESSES:
        secret = await connection.fetchval("select quote_literal($1::text)", passwords[process])
        await _ensure_role(connection, role_of(process), f"login password {secret}")


async def _ensure_role(connection: asyncpg.Connection, role: str, attributes: str) -> None:
    exists = await connection.fetchval("select true from pg_roles where rolname = $1", role)
    await connection.execute(f"{'alter' if exists else 'create'} role {role} {attributes}")


async def _apply_files(connection: asyncpg.Connection) -> None:
    await connection.execute(
        f"create schema if not exists fedota authorization {OWNER};"
        "create table if not exists fedota.migrations (name text primary key, applied timestamptz default now())"
    )
    applied = {row["name"] for row in await connection.fetch("select name from fedota.migrations")}
    for name, sql in migration_files():
        if name not in applied:
            await connection.execute(f"set local role {OWNER}")
            await connection.execute(sql)
            await connection.execute("reset role")
            await connection.execute("insert into fedota.migrations (name) values ($1)", name)


def migration_files() -> list[tuple[str, str]]:
    """Name and text of each migration, in order."""
    folder = resources.files(__name__)
    return sorted((file.name, file.read_text()) for file in folder.iterdir() if file.name.endswith(".sql"))


async def _grant(connection: asyncpg.Connection) -> None:
    for process in PROCESSES:
        role = role_of(process)
        # a schema of its own, where it alone keeps its read model
        await connection.execute(f"create schema if not exists {process} authorization {role}")
        await connection.execute(f"grant usage on schema fedota to {role}")
        await connection.execute(f"grant select on fedota.events, fedota.head to {role}")
    owners = [(role_of(entry.owner), name) for name, entry in CATALOGUE.items()]
    await connection.execute("delete from fedota.writers")
    await connection.executemany("insert into fedota.writers (role, type) values ($1, $2)", owners)
    for role in {role for role, _ in owners}:
        await connection.execute(f"grant execute on function fedota.append, fedota.recorded to {role}")
