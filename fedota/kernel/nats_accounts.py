"""Who may say what on NATS: accounts and users as signed JWTs (NATS decentralized authentication, operator mode).

The platform's processes share one account, each as a user that reaches its own subjects only. Each problem has an
account of its own: inside one shared account a publish permission does not cover the reply subject, so a coordinator
could make the server write into another problem's subject. A problem's account imports the platform's services for its
own problem and nothing else.
"""

import base64
import hashlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import nats.errors
import nkeys
from nats.aio.client import Client

from fedota.contracts import subjects
from fedota.errors import FedotaError
from fedota.events import to_json

_SECOND: Final = 1_000_000_000  # NATS counts nanoseconds
_UNLIMITED: Final = {"subs": -1, "data": -1, "payload": -1}
_ACCOUNT_LIMITS: Final = {**_UNLIMITED, "imports": -1, "exports": -1, "wildcards": True, "conn": -1, "leaf": 0}
_JETSTREAM_LIMITS: Final = {"mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1}
_PROBLEM_LIMITS: Final = {"conn": 16, "subs": 64}  # one coordinator, and what reconnects before its old self is gone


class Permissions(NamedTuple):
    """Subjects that a user may publish to and subscribe to; replies to what it received are always allowed."""

    publish: list[str]
    subscribe: list[str]


def _consumes(process: str) -> list[str]:
    verbs = ("DURABLE.CREATE", "DELETE", "MSG.NEXT", "INFO")
    return [f"$JS.API.CONSUMER.{verb}.{subjects.STREAM}.{process}" for verb in verbs]


def _service(process: str, *answers: str) -> Permissions:
    return Permissions(
        publish=_consumes(process),
        subscribe=[
            f"_INBOX_{process}.>",
            "$SRV.>",
            subjects.command(process, "*"),
            subjects.operation(process, "*"),
            *answers,
        ],
    )


PERMISSIONS: Final[dict[str, Permissions]] = {
    "relay": Permissions(
        publish=[
            subjects.inlet("*"),
            *(f"$JS.API.STREAM.{verb}.{subjects.STREAM}" for verb in ("INFO", "CREATE", "MSG.GET")),
            f"$JS.API.DIRECT.GET.{subjects.STREAM}",
        ],
        subscribe=["_INBOX_relay.>"],
    ),
    "problems": _service("problems"),
    "storage": _service("storage", subjects.runtime("*", "presign")),
    "orchestrator": _service("orchestrator"),
    "rounds": _service("rounds", *(subjects.runtime("*", verb) for verb in ("report", "resume", "revoked"))),
    "gateway": Permissions(
        publish=[subjects.command("*", "*"), subjects.operation("*", "*"), *_consumes("gateway")],
        subscribe=["_INBOX_gateway.>", "$SRV.>", subjects.operation("gateway", "*")],
    ),
}
_SYSTEM: Final = Permissions(
    publish=["$SYS.REQ.CLAIMS.UPDATE", "$SYS.REQ.CLAIMS.DELETE"], subscribe=["_INBOX.>", "_INBOX_system.>"]
)


class Minted(NamedTuple):
    """An account: its public key, its JWT for the server, and one user's credentials (the text of a `.creds` file)."""

    account: str
    jwt: str
    credentials: str


class Operator:
    """Signs accounts. Who holds its seed decides who may say what."""

    def __init__(self, seed: str) -> None:
        self._keys = nkeys.from_seed(seed.encode())

    @classmethod
    def create(cls) -> tuple["Operator", str]:
        """A new operator, and the seed that it can be read again from."""
        seed = _new_seed(nkeys.PREFIX_BYTE_OPERATOR)
        return cls(seed), seed

    @classmethod
    def read(cls, path: Path) -> "Operator":
        """The operator whose seed stands in a file."""
        return cls(path.read_text().strip())

    @property
    def public_key(self) -> str:
        """What the server knows the operator by."""
        return _public(self._keys)

    def jwt(self, system_account: str) -> str:
        """The operator's own JWT, for the server's configuration."""
        return _sign(self._keys, self.public_key, "fedota", {"type": "operator", "system_account": system_account})

    def platform_account(self) -> tuple["AccountKeys", str]:
        """A new account for the platform's processes, with JetStream, and its JWT."""
        keys = AccountKeys(_new_seed(nkeys.PREFIX_BYTE_ACCOUNT))
        exports = [{"name": "runtime", "subject": subjects.runtime("*", "*"), "type": "service"}]
        return keys, self._account(keys, "platform", limits=_JETSTREAM_LIMITS, exports=exports)

    def system_account(self) -> tuple["AccountKeys", str]:
        """A new account for the server's own subjects, and its JWT."""
        keys = AccountKeys(_new_seed(nkeys.PREFIX_BYTE_ACCOUNT))
        return keys, self._account(keys, "system")

    def problem_account(self, problem_id: str, *, platform: str) -> Minted:
        """A new account that reaches the platform's (its public key) services for this problem, and nothing else."""
        keys = AccountKeys(_new_seed(nkeys.PREFIX_BYTE_ACCOUNT))
        subject = subjects.runtime(problem_id, "*")
        imports = [{"name": "runtime", "subject": subject, "account": platform, "type": "service"}]
        jwt = self._account(keys, f"problem {problem_id}", limits=_PROBLEM_LIMITS, imports=imports)
        user = Permissions(publish=[subject], subscribe=["_INBOX.>"])
        return Minted(keys.public_key, jwt, keys.credentials(f"coordinator {problem_id}", user))

    def deletion(self, account: str) -> str:
        """The request that makes a server forget an account and cut its connections."""
        return _sign(self._keys, self.public_key, "delete", {"accounts": [account]})

    def _account(
        self,
        keys: "AccountKeys",
        name: str,
        *,
        limits: Mapping[str, int] | None = None,
        imports: list[dict[str, Any]] | None = None,
        exports: list[dict[str, Any]] | None = None,
    ) -> str:
        claims = {
            "type": "account",
            "limits": {**_ACCOUNT_LIMITS, **(limits or {})},
            "imports": imports or [],
            "exports": exports or [],
        }
        return _sign(self._keys, keys.public_key, name, claims)


class AccountKeys:
    """An account's own keys: they sign its users."""

    def __init__(self, seed: str) -> None:
        self.seed = seed
        self._keys = nkeys.from_seed(seed.encode())

    @property
    def public_key(self) -> str:
        """What everybody knows the account by."""
        return _public(self._keys)

    def process_credentials(self, process: str) -> str:
        """The credentials of one of the platform's processes."""
        return self.credentials(process, PERMISSIONS[process])

    def system_credentials(self) -> str:
        """The credentials with which accounts are pushed to the server."""
        return self.credentials("system", _SYSTEM)

    def credentials(self, name: str, permissions: Permissions) -> str:
        """A new user's credentials: the text of a `.creds` file, its secret included."""
        seed = _new_seed(nkeys.PREFIX_BYTE_USER)
        claims = {
            "type": "user",
            "pub": {"allow": permissions.publish},
            "sub": {"allow": permissions.subscribe},
            "resp": {"max": 1, "ttl": 60 * _SECOND},
            **_UNLIMITED,
        }
        jwt = _sign(self._keys, _public(nkeys.from_seed(seed.encode())), name, claims)
        return _CREDENTIALS.format(jwt=jwt, seed=seed)


_CREDENTIALS: Final = """-----BEGIN NATS USER JWT-----
{jwt}
------END NATS USER JWT------

-----BEGIN USER NKEY SEED-----
{seed}
------END USER NKEY SEED------
"""


async def push_account(system: Client, jwt: str) -> None:
    """Make the server know an account; `system` is connected to the system account. Harmless when repeated."""
    await _claims(system, "UPDATE", jwt)


async def delete_account(system: Client, operator: Operator, account: str) -> None:
    """Make the server forget an account, which cuts its connections. Harmless when it is not known."""
    await _claims(system, "DELETE", operator.deletion(account))


async def _claims(system: Client, verb: str, jwt: str) -> None:
    try:
        reply = await system.request(f"$SYS.REQ.CLAIMS.{verb}", jwt.encode(), timeout=5)
    except (nats.errors.Error, TimeoutError):
        raise FedotaError("unavailable", "NATS does not take accounts now. Try again.", retry_after=2) from None
    answer = msgspec.json.decode(reply.data)
    if "error" in answer:
        raise FedotaError("unavailable", f"NATS refused the account: {answer['error'].get('description', '')}.")


def _new_seed(prefix: int) -> str:
    seed: bytes = nkeys.encode_seed(os.urandom(32), prefix)
    return seed.decode()


def _public(keys: Any) -> str:
    public: bytes = keys.public_key
    return public.decode()


def _sign(signer: Any, subject: str, name: str, nats_claims: Mapping[str, Any]) -> str:
    """A NATS JWT, version 2; its id is the hash of what it says."""
    claims = {
        "iat": int(time.time()),
        "iss": _public(signer),
        "name": name,
        "sub": subject,
        "nats": {**nats_claims, "version": 2},
    }
    claims["jti"] = base64.b32encode(hashlib.sha256(to_json(claims)).digest()).decode().rstrip("=")
    signed = b".".join(_base64(to_json(part)) for part in ({"typ": "JWT", "alg": "ed25519-nkey"}, claims))
    return (signed + b"." + _base64(signer.sign(signed))).decode()


def _base64(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")
