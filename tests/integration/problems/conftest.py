"""The problems service between real servers."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.problems.world import World
from tests.support.servers import RunningServers
from tests.support.services import Platform


@pytest.fixture
async def world(servers: RunningServers, migrated_url: str, tmp_path: Path) -> AsyncIterator[World]:
    """A platform whose problems service is not there yet."""
    async with Platform.open(servers, migrated_url) as platform:
        made = World(platform, tmp_path)
        yield made
        await made.end()


@pytest.fixture
async def served(world: World) -> AsyncIterator[World]:
    """The same, with the service running."""
    async with world.running():
        yield world
