"""The three servers that the platform stands on: embedded ones, or those that stand elsewhere."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

from fedota.kernel.nats_accounts import PERMISSIONS
from fedota.local.external import External
from fedota.local.nats_server import NatsAccess, nats_server
from fedota.local.postgres import postgres
from fedota.local.programs import Program, all_kept_alive
from fedota.local.seaweedfs import S3Access, audit_access, forget_sockets, seaweedfs
from fedota.local.state import DataDirectory


class Servers(NamedTuple):
    """How to reach them; `database_url` is a superuser's."""

    database_url: str
    nats: NatsAccess
    s3: S3Access
    nats_runtime_credentials: Path | None = None
    s3_audit: Mapping[str, S3Access] = {}  # of the notary and the auditor


def _ignore(_: str) -> None:
    """Nobody wants to know."""


@asynccontextmanager
async def embedded(
    data: DataDirectory, external: External | None = None, tell: Callable[[str], None] = _ignore
) -> AsyncIterator[Servers]:
    """All three, answering; `tell` hears the name of each one that is started here once it does."""
    external = external or External()
    external.require_whole()
    programs: list[Program] = []
    if external.database_url:
        database_url = external.database_url.reveal()
    else:
        program, database_url = await postgres(data)
        programs.append(program)
    if external.nats_url and external.nats_credentials:
        nats = NatsAccess(external.nats_url, dict.fromkeys(PERMISSIONS, external.nats_credentials))
    else:
        program, nats = nats_server(data)
        programs.append(program)
    s3_audit: Mapping[str, S3Access] = external.s3_audit
    if (s3 := external.s3) is None:
        program, s3 = seaweedfs(data)
        programs.append(program)
        s3_audit = audit_access(data)
    forget_sockets(data)
    try:
        async with all_kept_alive(programs, tell):
            yield Servers(database_url, nats, s3, external.nats_runtime_credentials, s3_audit)
    finally:
        forget_sockets(data)
