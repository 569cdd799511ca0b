"""What a launcher is: the one thing between the orchestrator and whatever runs coordinators and selectors."""

from collections.abc import AsyncIterator
from typing import NamedTuple, Protocol

import msgspec

from services.orchestrator.domain import Death, Infra, Spec


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """Something in a namespace is not as it was; `death` when a component that had answered died."""

    namespace: str
    death: Death | None = None


class Exposure(NamedTuple):
    """Where selectors listen (`host`), how clients name that (`address`), and whether they speak TLS there."""

    host: str = "127.0.0.1"
    address: str = "127.0.0.1"
    tls: bool = False


class Launcher(Protocol):
    """Brings namespaces up, keeps what dies in them alive again, and removes them.

    It remembers the addresses and the internal key of a run across its own restarts, in whatever its backend keeps,
    and starts a component again at the address that it had. It gives up on a run by an `Infra` with a `failure`.
    """

    async def launch(self, spec: Spec) -> Infra:
        """Begin to bring this up, and what there is of it at once; `watch` tells when there is more."""
        ...

    async def stop(self, namespace: str) -> None:
        """End everything in the namespace gracefully, then leave nothing of it. Harmless when there is nothing."""
        ...

    async def namespaces(self) -> list[str]:
        """The namespaces that exist, running or left behind."""
        ...

    async def find(self, namespace: str) -> Infra | None:
        """What there is of a namespace now."""
        ...

    def watch(self) -> AsyncIterator[Change]:
        """Each change from now on, in order, for one listener."""
        ...

    async def check(self) -> None:
        """Raise when nothing could be launched now."""
        ...
