"""A client whose training takes a moment and changes the model a little: `python -m tests.faults.client kit.json`."""

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from fedota.client import Model, Trained, read_kit, run


def train(model: Model, _: Path, config: dict[str, Any]) -> Trained:
    """One step: the model after a round is a matter of its number, whoever took part."""
    time.sleep(config["seconds"])
    return {name: values + np.float32(1) for name, values in model.items()}, 1, {"loss": 1.0}


if __name__ == "__main__":
    asyncio.run(run(read_kit(Path(sys.argv[1])), train, Path.cwd()))
