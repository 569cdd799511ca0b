"""A site that gives back what it got; the first one notes when each round reaches it."""

import sys
import time
from pathlib import Path

import nvflare.client as flare


def main() -> None:
    """Nothing is trained: what is measured is everything else."""
    flare.init()
    first = flare.get_site_name() == "site-1"
    while flare.is_running():
        model = flare.receive()
        if model is None:
            return
        if first:
            with Path(sys.argv[1]).open("a") as file:
                file.write(f"{time.time()}\n")
        flare.send(flare.FLModel(params=model.params, metrics={"loss": 0.0}, meta={"NUM_STEPS_CURRENT_ROUND": 1}))


if __name__ == "__main__":
    main()
