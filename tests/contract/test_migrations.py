"""The database is brought to its newest shape once, however often and by however many it is asked for."""

import asyncio
import hashlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import asyncpg
import pytest
from click.testing import CliRunner, Result

from fedota.cli import main
from fedota.events import CATALOGUE, NewEvent, uuid7
from fedota.kernel.database import connect_pool
from fedota.kernel.event_log import Append, Context, EventLog
from fedota.kernel.migrations import (
    PROCESSES,
    ChangedFileError,
    ForeignRolesError,
    MigrationError,
    NewerDatabaseError,
    OutOfOrderError,
    migrate,
    migration_files,
    pending,
    role_of,
)
from fedota.kernel.settings import Secret
from fedota.local.postgres import postgres
from fedota.local.programs import kept_alive
from fedota.local.state import DataDirectory, held
from tests.contract.ground import Ground, created
from tests.support.servers import RunningServers, fresh_database
from tests.support.services import PASSWORD

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


NAMES = [name for name, _ in migration_files()]


async def test_what_was_applied_is_told_and_kept_with_its_hash(database_url: str) -> None:
    """Once; what is to be applied can be asked before, and asking changes nothing."""
    assert await pending(database_url) == NAMES
    assert await shape(database_url) == []
    assert await migrate(database_url, dict.fromkeys(PROCESSES, PASSWORD), share_roles=True) == NAMES
    assert await pending(database_url) == []
    assert await migrate(database_url, dict.fromkeys(PROCESSES, PASSWORD), share_roles=True) == []
    connection = await asyncpg.connect(database_url)
    try:
        rows = await connection.fetch("select name, sha256 from fedota.migrations order by name")
    finally:
        await connection.close()
    assert [tuple(row) for row in rows] == [
        (name, hashlib.sha256(text.encode()).digest()) for name, text in migration_files()
    ]


async def test_a_database_from_before_hashes_were_kept_gets_them(database_url: str) -> None:
    """They are those of the files that are here; from then on they are held to."""
    await migrate(database_url, dict.fromkeys(PROCESSES, PASSWORD), share_roles=True)
    connection = await asyncpg.connect(database_url)
    try:
        await connection.execute("alter table fedota.migrations drop column sha256")
        assert await pending(database_url) == []
        assert await migrate(database_url, dict.fromkeys(PROCESSES, PASSWORD), share_roles=True) == []
        assert await connection.fetchval("select count(sha256) from fedota.migrations") == len(NAMES)
    finally:
        await connection.close()


Files = list[tuple[str, str]]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda files: [(files[0][0], f"{files[0][1]} "), *files[1:]], ChangedFileError, "0001_log.sql was applied"),
        (lambda files: files[:-1], NewerDatabaseError, f"migrated by a newer Fedota: it has {NAMES[-1]}"),
        (lambda files: [("0000_late.sql", "select 1/0"), *files], OutOfOrderError, "0000_late.sql comes before"),
    ],
)
async def test_what_does_not_follow_is_refused(
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Files], Files],
    error: type[MigrationError],
    words: str,
) -> None:
    """An applied file that has changed, one that is not known, one that comes too late: nothing is touched."""
    await migrate(database_url, dict.fromkeys(PROCESSES, PASSWORD), share_roles=True)
    before, files = await shape(database_url), migration_files()
    monkeypatch.setattr("fedota.kernel.migrations.migration_files", lambda: change(files))
    for attempt in (
        pending(database_url),
        migrate(database_url, dict.fromkeys(PROCESSES, "another"), share_roles=True),
    ):
        with pytest.raises(error, match=words):
            await attempt
    assert await shape(database_url) == before
    connection = await asyncpg.connect(database_url, user=role_of("rounds"), password=PASSWORD)
    await connection.close()


async def command(*options: str, **environment: str) -> Result:
    """`fedota migrate …`, with nothing of our own settings."""
    ours = {name: None for name in os.environ if name.startswith("FEDOTA_")}
    invoke = partial(CliRunner().invoke, main, ["migrate", *options], env={**ours, **environment})
    return await asyncio.to_thread(invoke)


async def test_the_command_migrates_a_database_anywhere(tmp_path: Path) -> None:
    """On a server of its own: says what it would do and what it did, in words, and with an exit status."""
    program, url = await postgres(DataDirectory(tmp_path / "server"))
    roles = tmp_path / "roles.json"
    roles.write_text(json.dumps(dict.fromkeys(PROCESSES, "made-up")))
    async with kept_alive(program):
        open_file = await command("--roles", str(roles), FEDOTA_DATABASE_URL=url)
        assert open_file.exit_code == 1 and "Others may read the passwords" in open_file.stderr
        roles.chmod(0o600)
        for options, code, words in (
            (["--check"], 1, f"To be applied: {', '.join(NAMES)}."),
            (["--roles", str(roles)], 0, f"Applied: {', '.join(NAMES)}."),
            (["--roles", str(roles)], 0, "Nothing to apply"),
            (["--check"], 0, "Nothing to apply"),
        ):
            found = await command(*options, FEDOTA_DATABASE_URL=url)
            assert (found.exit_code, words in found.stdout) == (code, True), found.output
        rounds = await asyncpg.connect(url, user=role_of("rounds"), password="made-up")
        await rounds.close()
        without = await command(FEDOTA_DATABASE_URL=url)
        assert without.exit_code == 1 and "needs --roles FILE" in without.stderr
        roles.write_text('{"rounds": "x"}')
        incomplete = await command("--roles", str(roles), FEDOTA_DATABASE_URL=url)
        assert incomplete.exit_code == 1 and "must have a password for each of these" in incomplete.stderr
    gone = await command("--check", FEDOTA_DATABASE_URL=url)
    assert gone.exit_code == 1 and "could not be found out" in gone.stderr and "Traceback" not in gone.output
    roles.write_text(json.dumps(dict.fromkeys(PROCESSES, "made-up")))
    gone = await command("--roles", str(roles), FEDOTA_DATABASE_URL=url)
    assert gone.exit_code == 1 and "was not migrated, it is as it was" in gone.stderr


async def test_a_data_directory_on_the_command_line_wins(tmp_path: Path) -> None:
    """Over a variable that is forgotten in the shell; an empty one is none at all; a wrong one is told in words."""
    path, url = str(tmp_path / "none"), "postgresql://a:b@127.0.0.1:99999/x"
    for options, given, words in (
        (["--data-dir", path], url, f"There is no embedded database in {path}"),
        ([], "", "There is no embedded database in"),
        ([], url, "FEDOTA_DATABASE_URL is not a valid address: Port out of range"),
        ([], url.replace("99999", "many"), "FEDOTA_DATABASE_URL is not a valid address"),
    ):
        found = await command("--check", *options, FEDOTA_DATABASE_URL=given, XDG_DATA_HOME=str(tmp_path))
        assert (found.exit_code, found.stdout) == (1, "") and words in found.stderr, found.output
        assert found.stderr.count("\n") == 1


@pytest.mark.parametrize("change", ["position = 0", "time = '1999-12-31T23:59:59Z'", "time = '2026-01-31 BC'"])
async def test_what_an_audit_would_pass_by_is_not_taken(ground: Ground, change: str) -> None:
    """Not even from a superuser who has shut off the guard."""
    await ground.record(created())
    connection = await asyncpg.connect(ground.database_url)
    try:
        await connection.execute("alter table fedota.events disable trigger append_only")
        with pytest.raises(asyncpg.CheckViolationError):
            await connection.execute(f"update fedota.events set {change}")
    finally:
        await connection.close()


async def test_the_command_migrates_the_platform_of_a_data_directory(tmp_path: Path) -> None:
    """While it is down its database is started for that, and stopped again; while it runs it is that one."""
    path = tmp_path / "data"
    nothing = await command("--data-dir", str(path))
    assert nothing.exit_code == 1 and "no embedded database" in nothing.stderr
    program, url = await postgres(DataDirectory(path))
    with held(path):
        async with kept_alive(program):
            older = await command("--data-dir", str(path))
            assert older.exit_code == 1 and "was started by an older Fedota" in older.stderr
    down = await command("--data-dir", str(path))
    assert (down.exit_code, down.stdout) == (0, f"Applied: {', '.join(NAMES)}.\n"), down.output
    with pytest.raises(OSError):
        await asyncpg.connect(url)
    with held(path):
        async with kept_alive((await postgres(DataDirectory(path)))[0]):
            up = await command("--data-dir", str(path), "--check")
            assert (up.exit_code, "Nothing to apply" in up.stdout) == (0, True), up.output
            assert "Nothing to apply" in (await command("--data-dir", str(path))).stdout


async def test_the_roles_of_another_platform_are_left_alone(ground: Ground, servers: RunningServers) -> None:
    """They belong to the server: with new passwords, a platform in another database would be locked out."""
    async with fresh_database(servers.admin_url) as other:
        with pytest.raises(ForeignRolesError, match="has the role fedota_auditor already"):
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
