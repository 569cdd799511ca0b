"""What the orchestrator is told."""

import ipaddress
import math
import re
from pathlib import Path
from typing import Final

from fedota.kernel.settings import ProcessSettings
from fedota.tls import is_loopback
from services.orchestrator.launchers import Exposure

_NAME: Final = re.compile(r"(?=.{1,253}$)[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63})*")
_EVERYWHERE: Final = "0.0.0.0"  # noqa: S104 - what stands there speaks TLS
_ALL: Final = (_EVERYWHERE, "::")


class Settings(ProcessSettings, frozen=True, kw_only=True):
    """What the launched processes need, and where they live.

    `runtime_directory` (default: `namespaces` in `directory`) holds one directory a namespace. `token_public_key_file`
    is the public key (PEM) that selectors verify participation tokens with. Coordinators reach NATS at
    `runtime_nats_url` (default: `nats_url`), in one of two ways:

    - With `operator_seed_file`, `system_credentials` and `platform_account` (its public key) each problem gets a NATS
      account of its own, and reaches its own subjects only.
    - With `runtime_credentials`, for a NATS server without operator mode, every coordinator gets a copy of that file.
      Problems are then not isolated from each other: whoever takes over one coordinator can speak for all.

    Clients reach selectors at `selectors_host`, a name or address of this machine. They speak TLS with certificates of
    an authority that each launch has for itself and that the join kit carries; on loopback only with `selectors_tls`.
    They listen at the address `selectors_bind`, by default at `selectors_host`, and at all addresses where that is a
    name.

    When a run is over its coordinator and selectors stay up for `farewell` seconds: clients that are not in a check-in
    at that moment hear later that it is finished, and why. A new start of the problem does not wait for that.
    """

    token_public_key_file: Path
    runtime_directory: Path | None = None
    runtime_nats_url: str = ""
    operator_seed_file: Path | None = None
    system_credentials: Path | None = None
    platform_account: str = ""
    runtime_credentials: Path | None = None
    selectors_host: str = "127.0.0.1"
    selectors_bind: str = ""
    selectors_tls: bool = False
    farewell: float = 60.0

    def __post_init__(self) -> None:
        if not (self.runtime_directory or self.directory):
            raise ValueError("runtime_directory says where namespaces live, and is missing")
        operator = (self.operator_seed_file, self.system_credentials, self.platform_account)
        if any(operator) and (self.runtime_credentials or not all(operator)):
            raise ValueError(
                "operator_seed_file, system_credentials and platform_account belong together, without "
                "runtime_credentials"
            )
        if not any(operator) and not self.runtime_credentials:
            raise ValueError(
                "operator_seed_file, system_credentials and platform_account give each problem its own NATS account, "
                "and are missing; for a NATS server without operator mode runtime_credentials stands in their place"
            )
        if self.selectors_host in _ALL or not (
            _is_address(self.selectors_host) or _NAME.fullmatch(self.selectors_host)
        ):
            raise ValueError(
                f"selectors_host is the name or address that clients connect to, but it is {self.selectors_host!r}"
            )
        if self.selectors_bind and not _is_address(self.selectors_bind):
            raise ValueError(f"selectors_bind is an address of this machine, but it is {self.selectors_bind!r}")
        if not (math.isfinite(self.farewell) and self.farewell >= 0):
            raise ValueError(f"farewell is a number of seconds, 0 or more, but it is {self.farewell}")

    @property
    def exposure(self) -> Exposure:
        """Where selectors listen: by plain HTTP only where nobody but this machine can."""
        host = self.selectors_bind or _listening(self.selectors_host)
        on_loopback = is_loopback(self.selectors_host) and is_loopback(host)
        return Exposure(host, self.selectors_host, self.selectors_tls or not on_loopback)

    @property
    def namespaces_directory(self) -> Path:
        """Where namespaces live."""
        if self.runtime_directory:
            return self.runtime_directory
        assert self.directory
        return self.directory / "namespaces"


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _listening(host: str) -> str:
    if _is_address(host):
        return host
    return "127.0.0.1" if is_loopback(host) else _EVERYWHERE
