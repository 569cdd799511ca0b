"""What every fault test may ask for: its chance, which can be had again, and how many faults it is to make."""

import os
import random
import secrets
import sys
from collections.abc import Sequence
from typing import Final

import pytest

from tests.contract.conftest import ground
from tests.integration.runtime.conftest import world

__all__ = ["chance", "faults", "ground", "one_of_each", "seed", "world"]

SEED: Final = "FEDOTA_FAULTS_SEED"
COUNT: Final = "FEDOTA_FAULTS"


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> str:
    """What the test's chance is made from: pytest shows the line below when the test fails.

    The seed decides which faults there are, in which order and after which pauses; how the machine schedules the
    processes meanwhile is not in its hands.
    """
    chosen = os.environ.get(SEED) or secrets.token_hex(4)
    sys.stdout.write(f"The same faults again: {SEED}={chosen} pytest '{request.node.nodeid}'\n")
    return f"{chosen}/{request.node.name}"


@pytest.fixture
def chance(seed: str) -> random.Random:
    """The test's own dice."""
    return random.Random(seed)


@pytest.fixture
def faults() -> int:
    """How many faults a test makes: a few by itself, as many as `make faults` was told there."""
    return int(os.environ.get(COUNT, "4"))


def one_of_each(kinds: Sequence[str], chance: random.Random, count: int) -> list[str]:
    """So many of these, in any order: each kind once before any kind again."""
    drawn: list[str] = []
    while len(drawn) < max(count, len(kinds)):
        drawn += chance.sample(kinds, len(kinds))
    return drawn[: max(count, len(kinds))]
