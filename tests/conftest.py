"""What every test may ask for."""

from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import hypothesis
import pytest
import structlog

from fedota.kernel.migrations import PROCESSES, migrate
from tests.support.servers import RunningServers, fresh_database, running_servers
from tests.support.services import PASSWORD

# A test may be held up by others on the same cores: how long an example takes says nothing about the code.
hypothesis.settings.register_profile(
    "shared cores", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("shared cores")

# Errors that tests provoke are told without all variables: to write those down takes up to a second, in which nothing
# else in the test's process gets on.
_PLAIN = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
structlog.configure(processors=[*structlog.get_config()["processors"][:-1], _PLAIN])


@pytest.fixture(scope="session")
async def servers(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningServers]:
    """PostgreSQL, NATS with JetStream and S3, one set for the whole run."""
    async with running_servers(tmp_path_factory.mktemp("servers")) as running:
        yield running


@pytest.fixture(scope="session")
async def migrated(servers: RunningServers) -> AsyncIterator[str]:
    """The name of a database that was migrated, and is used by nobody: to copy it takes half as long as to make it."""
    async with fresh_database(servers.admin_url) as url:
        await migrate(url, dict.fromkeys(PROCESSES, PASSWORD), share_roles=True)
        yield urlsplit(url).path[1:]


@pytest.fixture
async def migrated_url(servers: RunningServers, migrated: str) -> AsyncIterator[str]:
    """The URL of a database of the test's own, whose log is empty, as a superuser; its roles are not let in yet."""
    async with fresh_database(servers.admin_url, migrated) as url:
        yield url


@pytest.fixture
async def database_url(servers: RunningServers) -> AsyncIterator[str]:
    """The URL of a database of the test's own, empty, as a superuser."""
    async with fresh_database(servers.admin_url) as url:
        yield url
