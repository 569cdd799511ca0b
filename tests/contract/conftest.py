"""The kernel on real servers: a migrated database, every owner's pen, and a relay only where a test starts one."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from fedota.kernel import projection
from fedota.kernel.migrations import PROCESSES, migrate
from fedota.kernel.relay import Relay
from fedota.kernel.service import Service
from tests.contract.ground import Ground
from tests.contract.models import Always
from tests.integration.runtime.conftest import world
from tests.support.servers import RunningServers
from tests.support.services import OWNERS, PASSWORD, forget_stream

__all__ = ["bare", "ground", "relayed", "world"]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Projections in the test's process try again soon: a fault costs no second of the test."""
    monkeypatch.setattr(projection, "_PAUSE", 0.05)


@pytest.fixture
async def bare(servers: RunningServers) -> Ground:
    """NATS alone, without a stream."""
    await forget_stream(servers.nats_url, servers.nats_keys["anything"])
    return Ground(servers, "")


@pytest.fixture
async def ground(servers: RunningServers, migrated_url: str) -> AsyncIterator[Ground]:
    """An empty log and no stream."""
    await migrate(migrated_url, dict.fromkeys(PROCESSES, PASSWORD), share_roles=True)
    await forget_stream(servers.nats_url, servers.nats_keys["anything"])
    made = Ground(servers, migrated_url)
    async with AsyncExitStack() as stack:
        for owner in OWNERS:
            made.logs[owner] = await stack.enter_async_context(made.log(owner))
        yield made


@pytest.fixture
async def relayed(ground: Ground) -> AsyncIterator[Ground]:
    """A log whose events are in the stream soon."""
    async with AsyncExitStack() as stack:
        bus = await stack.enter_async_context(ground.bus("relay"))
        log = await stack.enter_async_context(ground.log("relay"))
        await stack.enter_async_context(Service("relay").running("relay", Relay(log, bus).run(Always())))
        yield ground
