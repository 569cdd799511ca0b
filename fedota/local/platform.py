"""The whole platform on one machine: the servers, and each service in a process of its own."""

import hashlib
import secrets
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import quote, urlsplit, urlunsplit

import aiohttp
import msgspec
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedota.contracts.runtime import Ready
from fedota.kernel.files import write_private
from fedota.kernel.migrations import PROCESSES, migrate, role_of
from fedota.local.external import External
from fedota.local.programs import READY, Program, all_kept_alive
from fedota.local.servers import Servers, embedded
from fedota.local.state import HOST, DataDirectory, LocalError

ROLES: Final = ("setter", "organization", "operator")
MODULES: Final = {
    "relay": "fedota.kernel.relay",
    "notary": "fedota.audit.notary",
    "problems": "services.problems",
    "storage": "services.storage",
    "rounds": "services.rounds",
    "orchestrator": "services.orchestrator",
    "gateway": "gateway",
}
_TIMEOUT: Final = aiohttp.ClientTimeout(total=5)


class Platform(NamedTuple):
    """A platform that runs: where people reach it, and the token of each role.

    `moved_from` is the gateway's port before this start where another program has that now, else 0.
    """

    gateway_url: str
    tokens: dict[str, str]
    moved_from: int = 0


@asynccontextmanager
async def running(path: Path, external: External, tell: Callable[[str], None]) -> AsyncIterator[Platform]:
    """The platform in a `held` data directory, answering; `tell` hears what has come up. Raises `LocalError`."""
    data = DataDirectory(path)
    before = data.remembered_port("gateway")
    async with embedded(data, external, tell) as servers:
        await migrate(servers.database_url, passwords(data))
        tell("database")
        tokens = _tokens(data)
        _write_settings(data, "auditor", _settings(data, servers, "auditor"))  # for who audits: it is no process
        more = {"orchestrator": external.selectors}
        programs = [_program(data, name, {**_settings(data, servers, name), **more.get(name, {})}) for name in MODULES]
        async with all_kept_alive(programs, tell):
            url = await address_of(data.path, "gateway")
            assert url
            yield Platform(url, tokens, moved_from=0 if before == data.remembered_port("gateway") else before)


def passwords(data: DataDirectory) -> dict[str, str]:
    """The password of each process at the database."""
    return {process: _password(data, process) for process in PROCESSES}


def process_directory(path: Path, name: str) -> Path:
    """Where a process of the platform keeps its settings, its log and its address."""
    return path / "processes" / name


def announced(path: Path, name: str) -> str | None:
    """The address that a process gave itself last."""
    try:
        return msgspec.json.decode((process_directory(path, name) / READY).read_bytes(), type=Ready).url
    except (FileNotFoundError, msgspec.DecodeError):
        return None


async def address_of(path: Path, name: str) -> str | None:
    """Where a process answers, when it is ready."""
    url = announced(path, name)
    if url is None:
        return None
    try:
        async with aiohttp.ClientSession(timeout=_TIMEOUT) as http, http.get(f"{url}/readyz") as reply:
            return url if reply.status == 200 else None
    except (aiohttp.ClientError, TimeoutError):
        return None


def _write_settings(data: DataDirectory, name: str, settings: Mapping[str, Any]) -> Path:
    """What a process is told, in a file for its owner alone."""
    data.sub("processes")
    file = data.sub(f"processes/{name}") / "settings.json"
    write_private(file, msgspec.json.encode({**settings, "directory": str(file.parent)}))
    return file


def _program(data: DataDirectory, name: str, settings: Mapping[str, Any]) -> Program:
    file = _write_settings(data, name, settings)

    async def ready() -> bool:
        return await address_of(data.path, name) is not None

    argv = [sys.executable, "-m", MODULES[name]]
    return Program(name, argv, file.parent, ready, env={"FEDOTA_SETTINGS": str(file)})


def _settings(data: DataDirectory, servers: Servers, name: str) -> dict[str, Any]:
    log = {"database_url": _role_url(servers.database_url, name, _password(data, name)), "host": HOST}
    match name:
        case "notary":
            return {**log, **_audit_store(servers, name), "key_file": str(_key_pair(data, "notary")[0])}
        case "auditor":
            return {**log, **_audit_store(servers, name), "public_key_file": str(_key_pair(data, "notary")[1])}
    common = {**log, "nats_url": servers.nats.url, "nats_credentials": str(servers.nats.keys[name])}
    match name:
        case "problems":
            return {**common, "token_key_file": str(_key_pair(data, "token")[0])}
        case "storage":
            url, access_key, secret_key, bucket, region = servers.s3
            keys = {"s3_access_key": access_key, "s3_secret_key": secret_key, "s3_region": region}
            return {**common, "s3_url": url, "s3_bucket": bucket, **keys}
        case "orchestrator":
            return {
                **common,
                "token_public_key_file": str(_key_pair(data, "token")[1]),
                **_coordinators_access(servers),
            }
        case "gateway":
            files = {"tokens_file": str(data.path / "tokens.json"), "s3_public_url": servers.s3.url}
            files["people_key_file"] = str(_people_key(data))
            return {**common, "port": data.port("gateway"), **files}
        case _:
            return common


def _audit_store(servers: Servers, name: str) -> dict[str, str]:
    url, access_key, secret_key, bucket, region = servers.s3_audit[name]
    keys = {"s3_audit_access_key": access_key, "s3_audit_secret_key": secret_key, "s3_region": region}
    return {"s3_url": url, "s3_audit_bucket": bucket, **keys}


def _coordinators_access(servers: Servers) -> dict[str, str]:
    nats = servers.nats
    if nats.operator is None:
        return {"runtime_credentials": str(servers.nats_runtime_credentials)}
    return {
        "operator_seed_file": str(nats.operator),
        "system_credentials": str(nats.keys["system"]),
        "platform_account": nats.platform_account,
    }


def _password(data: DataDirectory, process: str) -> str:
    return data.secret(f"database-{process}")


def _role_url(admin_url: str, process: str, password: str) -> str:
    parts = urlsplit(admin_url)
    place = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{role_of(process)}:{quote(password)}@{place}"))


def _tokens(data: DataDirectory) -> dict[str, str]:
    """One token a role, kept in files for their owner; the gateway is told digests only, and those of people."""
    data.sub("tokens")
    for role, token_file in token_files(data.path).items():
        if not token_file.exists():
            write_private(token_file, f"fdt_{role}_{secrets.token_urlsafe(32)}".encode())
    tokens = read_tokens(data.path)
    entries = [{"role": role, "sha256": hashlib.sha256(token.encode()).hexdigest()} for role, token in tokens.items()]
    file = data.path / "tokens.json"
    write_private(file, msgspec.json.encode([*entries, *_of_people(file)]))
    return tokens


def _of_people(file: Path) -> list[dict[str, Any]]:
    """The tokens that name a person: whoever runs the platform has written these here."""
    try:
        entries = msgspec.json.decode(file.read_bytes(), type=list[dict[str, Any]])
    except FileNotFoundError:
        return []
    except msgspec.DecodeError as error:
        raise LocalError(f"{file} is not valid: {error}. Correct it, or remove it.") from None
    return [entry for entry in entries if "person" in entry]


def read_tokens(path: Path) -> dict[str, str]:
    """The token of each role of the platform in this data directory."""
    return {role: file.read_text() for role, file in token_files(path).items()}


def token_files(path: Path) -> dict[str, Path]:
    """The file that holds the token of each role, and nothing else."""
    return {role: path / "tokens" / role for role in ROLES}


def _key_pair(data: DataDirectory, name: str) -> tuple[Path, Path]:
    """The files of a key and its public key: `token` signs participation tokens, `notary` checkpoints of the log.

    A key that was lost is not replaced: what it has signed would be refused. A public one follows from its key.
    """
    directory = data.sub("keys")
    private_file, public_file = directory / f"{name}.pem", directory / f"{name}.public.pem"
    if not private_file.exists():
        if public_file.exists():
            raise LocalError(
                f"The key {private_file} is gone. Restore it from a copy. Where there is none, move {public_file} away "
                "and keep it: a new pair is made then, which does not vouch for what the old key has signed."
            )
        key = Ed25519PrivateKey.generate()
        write_private(private_file, key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, _NO_PASSWORD))
    if not public_file.exists():
        write_private(public_file, _public(private_file))
    return private_file, public_file


def _public(private_file: Path) -> bytes:
    try:
        key = serialization.load_pem_private_key(private_file.read_bytes(), password=None)
    except ValueError:
        raise LocalError(f"{private_file} is damaged: it holds no key. Restore it from a copy.") from None
    return key.public_key().public_bytes(_PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _people_key(data: DataDirectory) -> Path:
    """What the keys of people's names are wrapped under; lost, nobody can read the names, so it is made once only."""
    file = data.sub("keys") / "people.key"
    if not file.exists():
        if data.has_made(file.name):
            raise LocalError(
                f"The key file {file} is gone. Restore it from a copy: without it nobody can read the names of the "
                "people who acted here, and another one cannot take its place. Only where nobody has acted by name: "
                f"remove {file.name} from `made` in {data.path / 'state.json'}, and a new one is made."
            )
        write_private(file, secrets.token_hex(32).encode())
    data.note_made(file.name)
    return file


_PEM: Final = serialization.Encoding.PEM
_NO_PASSWORD: Final = serialization.NoEncryption()
