"""A client whose training gives back what it got: `python -m benchmarks.client kit.json`."""

import asyncio
import sys
from pathlib import Path
from typing import Any

from fedota.client import Model, Trained, read_kit, run


def train(model: Model, _: Path, __: dict[str, Any]) -> Trained:
    """Nothing: what is measured is everything else."""
    return model, 1, {}


if __name__ == "__main__":
    asyncio.run(run(read_kit(Path(sys.argv[1])), train, Path.cwd()))
