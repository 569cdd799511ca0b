"""The database's shape: numbered SQL files beside this module, applied once, in order, forward only."""

import base64
import hashlib
import hmac
import secrets
import stringprep
import unicodedata
from collections.abc import Mapping
from importlib import resources
from typing import Final, NamedTuple

import asyncpg

from fedota.events import CATALOGUE

OWNER: Final = "fedota_owner"
PROJECTING: Final = ("problems", "storage", "rounds", "orchestrator", "gateway")
PROCESSES: Final = (*PROJECTING, "relay", "notary", "auditor")  # the last three only read the log
_LOCK: Final = 0x6665646F7461  # "fedota": two migrations at once would apply a file twice


_IDLE: Final = "60s"  # no process leaves a transaction open while it waits for anything but PostgreSQL
_SCRAM_ITERATIONS: Final = 4096  # what PostgreSQL takes itself: these passwords are long and random


class MigrationError(Exception):
    """The database is left as it is; the message says why, and what to do."""


class ForeignRolesError(MigrationError):
    """The server's roles of these names belong to another platform."""


class ChangedFileError(MigrationError):
    """A file that was applied is not the one that is here: what the database looks like cannot be known."""


class OutOfOrderError(MigrationError):
    """A file is new whose number is before one that was applied."""


class NewerDatabaseError(MigrationError):
    """The database was migrated by a newer Fedota."""


def role_of(process: str) -> str:
    """The login role of a process."""
    return f"fedota_{process}"


class Migration(NamedTuple):
    """A numbered file."""

    name: str
    sql: str

    @property
    def sha256(self) -> bytes:
        """What tells it from another file of that name."""
        return hashlib.sha256(self.sql.encode()).digest()


async def migrate(admin_url: str, passwords: Mapping[str, str], *, share_roles: bool = False) -> list[str]:
    """Bring the database to the newest shape and give each process its login role; the names of the files applied.

    `admin_url` is of a role that may create roles, and schemas in this database: its owner with CREATEROLE is enough.
    `passwords` has one for each of `PROCESSES`. Roles belong to the server, so one server has one platform: raises
    `ForeignRolesError` when the roles are there and this database is not theirs, because their new passwords would
    lock the other platform out. `share_roles` is for those who know that the passwords are the same. All of it is one
    transaction, one at a time; raises another `MigrationError` when what was applied before is not what is here.
    """
    connection = await asyncpg.connect(admin_url)
    try:
        await connection.execute("select pg_advisory_lock($1)", _LOCK)
        async with connection.transaction():
            if not share_roles:
                await _require_own_roles(connection)
            await _create_roles(connection, passwords)
            names = await _apply_files(connection)
            await _grant(connection)
    finally:
        await connection.close()
    return names


async def pending(admin_url: str) -> list[str]:
    """The names of the files that `migrate` would apply. Raises `MigrationError` as it does."""
    connection = await asyncpg.connect(admin_url)
    try:
        if not await connection.fetchval("select to_regclass('fedota.migrations') is not null"):
            return [migration.name for migration in _migrations()]
        return [migration.name for migration in _pending(await _applied(connection))]
    finally:
        await connection.close()


async def _require_own_roles(connection: asyncpg.Connection) -> None:
    names = [OWNER, *map(role_of, PROCESSES)]
    taken = await connection.fetchval("select min(rolname) from pg_roles where rolname = any($1)", names)
    if taken and not await connection.fetchval("select true from pg_namespace where nspname = 'fedota'"):
        raise ForeignRolesError(
            f"The PostgreSQL server has the role {taken} already, but this database holds no platform: the role "
            "belongs to a platform in another database, which new passwords would lock out. Use that database, or a "
            "server of its own; if that platform is gone for good, drop its database and its roles first."
        )


async def _create_roles(connection: asyncpg.Connection, passwords: Mapping[str, str]) -> None:
    await _ensure_role(connection, OWNER, "nologin")
    for process in PROCESSES:
        await _ensure_role(connection, role_of(process), f"login password '{_verifier(passwords[process])}'")
        # who was left in the middle of a transaction gives back what it has locked
        await connection.execute(f"alter role {role_of(process)} set idle_in_transaction_session_timeout = '{_IDLE}'")


def _verifier(password: str) -> str:
    """What PostgreSQL keeps of a password (RFC 5803): sent in its place, no log of the server can hold the password."""
    salt = secrets.token_bytes(16)
    salted = hashlib.pbkdf2_hmac("sha256", _prepared(password).encode(), salt, _SCRAM_ITERATIONS)
    stored = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    server = hmac.digest(salted, b"Server Key", "sha256")
    salt_, stored_, server_ = (base64.b64encode(part).decode() for part in (salt, stored, server))
    return f"SCRAM-SHA-256${_SCRAM_ITERATIONS}:{salt_}${stored_}:{server_}"


def _prepared(password: str) -> str:
    """The password as clients normalize it before they prove that they know it (RFC 4013)."""
    kept = (character for character in password if not stringprep.in_table_b1(character))
    spaced = (" " if stringprep.in_table_c12(character) else character for character in kept)
    return unicodedata.normalize("NFKC", "".join(spaced))


async def _ensure_role(connection: asyncpg.Connection, role: str, attributes: str) -> None:
    exists = await connection.fetchval("select true from pg_roles where rolname = $1", role)
    await connection.execute(f"{'alter' if exists else 'create'} role {role} {attributes}")
    # who is no superuser may administer the roles that it made, but not yet act as them: it makes schemas in their name
    await connection.execute(f"grant {role} to current_user with inherit true, set true")


async def _apply_files(connection: asyncpg.Connection) -> list[str]:
    await connection.execute(
        f"create schema if not exists fedota authorization {OWNER};"
        f"create schema if not exists people authorization {OWNER};"
        "create table if not exists fedota.migrations (name text primary key, applied timestamptz default now());"
        "alter table fedota.migrations add column if not exists sha256 bytea"
    )
    applied = await _applied(connection)
    coming = _pending(applied)
    for migration in coming:
        await connection.execute(f"set local role {OWNER}")
        await connection.execute(migration.sql)
        await connection.execute("reset role")
    for migration in _migrations():  # those of the time before hashes were kept are taken for what is here
        if applied.get(migration.name) is None:
            await connection.execute(_RECORD, migration.name, migration.sha256)
    return [migration.name for migration in coming]


_RECORD: Final = (
    "insert into fedota.migrations (name, sha256) values ($1, $2) on conflict (name) do update set sha256 = $2"
)


async def _applied(connection: asyncpg.Connection) -> dict[str, bytes | None]:
    """The hash of each file that was applied; None where none was kept."""
    rows = await connection.fetch("select name, to_jsonb(m) ->> 'sha256' as sha256 from fedota.migrations m")
    return {row["name"]: bytes.fromhex(row["sha256"][2:]) if row["sha256"] else None for row in rows}


def _pending(applied: Mapping[str, bytes | None]) -> list[Migration]:
    """What is still to be applied. Raises when the database is not one that these files made."""
    known = {migration.name: migration for migration in _migrations()}
    if unknown := sorted(applied.keys() - known.keys()):
        raise NewerDatabaseError(
            f"The database was migrated by a newer Fedota: it has {unknown[0]}, which this version does not know. "
            "Install that version, or restore the copy of the database from before."
        )
    for name, sha256 in applied.items():
        if sha256 is not None and sha256 != known[name].sha256:
            raise ChangedFileError(
                f"{name} was applied to this database with other content than it has here. What was applied must not "
                "change: restore that file, and make a new one for what is to change."
            )
    coming = [migration for name, migration in known.items() if name not in applied]
    if coming and applied and coming[0].name < max(applied):
        raise OutOfOrderError(
            f"{coming[0].name} comes before {max(applied)}, which was applied already. Migrations go forward only: "
            "give the file a number behind that."
        )
    return coming


def _migrations() -> list[Migration]:
    return [Migration(name, sql) for name, sql in migration_files()]


def migration_files() -> list[tuple[str, str]]:
    """Name and text of each migration, in order."""
    folder = resources.files(__name__)
    return sorted((file.name, file.read_text()) for file in folder.iterdir() if file.name.endswith(".sql"))


async def _grant(connection: asyncpg.Connection) -> None:
    database = await connection.fetchval("select quote_ident(current_database())")
    for process in PROCESSES:
        role = role_of(process)
        await connection.execute(f"grant connect on database {database} to {role}")  # everybody may, unless revoked
        await connection.execute(f"grant usage on schema fedota to {role}")
        await connection.execute(f"grant select on fedota.events, fedota.head to {role}")
    for process in PROJECTING:
        # where the past is worked out, and a rebuild is compared
        await connection.execute(f"grant temporary on database {database} to {role_of(process)}")
        # a schema of its own, where it alone keeps its read model, and one where it builds the next
        for schema in (process, f"{process}_next"):
            await connection.execute(f"create schema if not exists {schema} authorization {role_of(process)}")
    await connection.execute(f"grant usage on schema people to {role_of('gateway')}")
    await connection.execute(f"grant select, insert, delete on all tables in schema people to {role_of('gateway')}")
    owners = [(role_of(entry.owner), name) for name, entry in CATALOGUE.items()]
    await connection.execute("delete from fedota.writers")
    await connection.executemany("insert into fedota.writers (role, type) values ($1, $2)", owners)
    for role in {role for role, _ in owners}:
        await connection.execute(f"grant execute on function fedota.append, fedota.recorded to {role}")
