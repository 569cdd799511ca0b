"""What the tests of rounds under faults stand on."""

from collections.abc import AsyncIterator

import pytest

from tests.faults.conftest import chance, faults, seed
from tests.faults.rounds.around import Around

__all__ = ["around", "chance", "faults", "seed"]


@pytest.fixture(scope="session")
async def around(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Around]:
    """NATS and an object store that nobody else uses."""
    async with Around.up(tmp_path_factory.mktemp("around")) as running:
        yield running


@pytest.fixture
def many(faults: int) -> int:
    """So many faults for each of the larger tests: a handful by itself, a hundred in `make faults`."""
    return faults * faults // 4


@pytest.fixture
def patient(faults: int) -> bool:
    """Whether there is time for pauses that are longer than a selector may be silent."""
    return faults >= 20
