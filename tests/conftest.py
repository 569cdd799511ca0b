"""What every test may ask for."""

from collections.abc import AsyncIterator

import hypothesis
import pytest

from tests.support.servers import RunningServers, fresh_database, running_servers

# A test may be held up by others on the same cores: how long an example takes says nothing about the code.
hypothesis.settings.register_profile(
    "shared cores", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("shared cores")


@pytest.fixture(scope="session")
async def servers(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningServers]:
    """PostgreSQL, NATS with JetStream and S3, one set for the whole run."""
    async with running_servers(tmp_path_factory.mktemp("servers")) as running:
        yield running


@pytest.fixture
async def database_url(servers: RunningServers) -> AsyncIterator[str]:
    """The URL of a database of the test's own, empty, as a superuser."""
    async with fresh_database(servers.admin_url) as url:
        yield url
