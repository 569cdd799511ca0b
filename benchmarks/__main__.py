"""`python -m benchmarks [--json PATH] [--only NAME | --large]`: measure, print a table, write the figures down."""

import argparse
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final

import structlog
import uvloop

from benchmarks import appends, large, rounds, streams
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
    parser.add_argument(
        "--large", action="store_true", help="a log of five million events instead; takes minutes and 10 GB"
    )
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    chosen = {name: work for name, work in MEASUREMENTS.items() if arguments.only in (None, name)}
    figures = uvloop.run(_measure({"large": large.measure} if arguments.large else chosen))
    show(figures)
    if arguments.json:
        write(figures, arguments.json)


async def _measure(measurements: Mapping[str, Callable[[World], Awaitable[Figures]]]) -> Figures:
    figures: Figures = {}
    with tempfile.TemporaryDirectory(prefix="fedota-benchmark-") as directory:
        async with servers(Path(directory)) as world:
            for name, measure in measurements.items():
                print(f"measuring {name} …", flush=True)
                figures |= await measure(world)
    return figures


if __name__ == "__main__":
    main()
