"""The servers that tests run on: embedded ones, or containers where FEDOTA_TEST_SERVERS says so."""

import os
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import urlsplit, urlunsplit

import asyncpg
from testcontainers.core.container import DockerContainer

from fedota.kernel.files import write_private
from fedota.kernel.nats_accounts import Permissions
from fedota.local.nats_server import nats_server, platform_keys
from fedota.local.seaweedfs import S3Access, audit_access, seaweedfs
from fedota.local.servers import Servers, embedded
from fedota.local.state import DataDirectory
from tests.support.waiting import until

ANYTHING: Final = "anything"  # a user of the platform's account whom nothing is denied; only tests have one


class RunningServers(NamedTuple):
    """How to reach the servers of a test run; `admin_url` is a superuser's."""

    admin_url: str
    nats_url: str
    nats_keys: dict[str, Path]
    nats_operator: Path
    platform_account: str
    s3: S3Access
    s3_audit: Mapping[str, S3Access] = {}

    @classmethod
    def of(cls, servers: Servers) -> "RunningServers":
        """The same, as tests want it."""
        nats = servers.nats
        assert nats.operator is not None
        keys = {**nats.keys, ANYTHING: _key_to_anything(nats.operator.parent)}
        return cls(
            servers.database_url,
            nats.url,
            keys,
            nats.operator,
            nats.platform_account,
            servers.s3,
            servers.s3_audit,
        )


def _key_to_anything(directory: Path) -> Path:
    path = directory / f"{ANYTHING}.creds"
    everything = Permissions(publish=[">"], subscribe=[">"])
    write_private(path, platform_keys(directory).credentials(ANYTHING, everything).encode())
    return path


@asynccontextmanager
async def running_servers(directory: Path) -> AsyncIterator[RunningServers]:
    """PostgreSQL, NATS and S3, new and empty."""
    kind = os.environ.get("FEDOTA_TEST_SERVERS", "embedded")
    data = DataDirectory(directory)
    if kind == "containers":
        async with _containers(data) as servers:
            yield RunningServers.of(servers)
    elif kind == "embedded":
        async with embedded(data) as servers:
            yield RunningServers.of(servers)
    else:
        raise ValueError(f"FEDOTA_TEST_SERVERS is {kind!r}: say embedded or containers")


@asynccontextmanager
async def _containers(data: DataDirectory) -> AsyncIterator[Servers]:
    """The same servers as images, with the same configuration; their ports and files are those of this machine."""
    password, port = data.secret("postgres"), data.port("postgres")
    database = f"postgresql://postgres:{password}@127.0.0.1:{port}/postgres"
    bus, nats = nats_server(data)
    store, s3 = seaweedfs(data)
    postgres = DockerContainer("postgres:18", network_mode="host").with_envs(
        POSTGRES_PASSWORD=password, PGPORT=f"{port}"
    )
    with (
        postgres.with_envs(POSTGRES_PASSWORD=password, PGPORT=str(port)).with_command("-c listen_addresses=127.0.0.1"),
        _configured("nats:2.15", bus.directory, *bus.argv[1:]),
        _configured("chrislusf/seaweedfs:4.48", store.directory, *store.argv[1:]),
    ):
        for ready in (lambda: _accepts(database), bus.ready, store.ready):
            await until(ready, "a container answers")
        yield Servers(database, nats, s3, s3_audit=audit_access(data))


def _configured(image: str, directory: Path, *arguments: str) -> DockerContainer:
    """A container that finds its configuration where it stands on this machine."""
    path = str(directory)
    container = DockerContainer(image, network_mode="host", working_dir=path)
    return container.with_volume_mapping(path, path, "rw").with_command(list(arguments))


async def _accepts(url: str) -> bool:
    try:
        await (await asyncpg.connect(url, timeout=5)).close()
    except (OSError, asyncpg.PostgresError, TimeoutError):
        return False
    return True


@asynccontextmanager
async def fresh_database(admin_url: str, template: str = "template0") -> AsyncIterator[str]:
    """The URL of a database like `template`, as a superuser; gone afterwards, with whoever is still connected."""
    name = f"test_{secrets.token_hex(8)}"
    connection = await asyncpg.connect(admin_url)
    try:
        await connection.execute(f"create database {name} template {template}")
        yield urlunsplit(urlsplit(admin_url)._replace(path=f"/{name}"))
        await connection.execute(f"drop database {name} with (force)")
    finally:
        await connection.close()
