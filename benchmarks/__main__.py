"""`python -m benchmarks [--json PATH] [--only NAME]`: measure, print a table, write the figures down."""

import argparse
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import structlog
import uvloop

from benchmarks import appends, rounds, streams
from benchmarks.figures import Figures, show, write
from benchmarks.world import World, servers

MEASUREMENTS: Final[dict[str, Callable[[World], Awaitable[Figures]]]] = {
    "append": appends.measure,
    "relay": streams.measure_relay,
    "latency": streams.measure_latency,
    "replay": streams.measure_replay,
    "round": rounds.measure,
}


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures to this file")
    parser.add_argument("--only", choices=MEASUREMENTS, metavar="NAME", help=f"one of {', '.join(MEASUREMENTS)}")
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    figures = uvloop.run(_measure([arguments.only] if arguments.only else list(MEASUREMENTS)))
    show(figures)
    if arguments.json:
        write(figures, arguments.json)


async def _measure(names: list[str]) -> Figures:
    figures: Figures = {}
    with tempfile.TemporaryDirectory(prefix="fedota-benchmark-") as directory:
        async with servers(Path(directory)) as world:
            for name in names:
                print(f"measuring {name} …", flush=True)
                figures |= await MEASUREMENTS[name](world)
    return figures


if __name__ == "__main__":
    main()
