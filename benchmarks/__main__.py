"""`python -m benchmarks [--json PATH] [--only NAME … | --large]`: measure, print a table, write the figures down."""

import argparse
import sys
import tempfile
import traceback
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final

import structlog
import uvloop

from benchmarks import appends, giant, idle, large, many, rounds, streams
from benchmarks.figures import Figures, show, write
from benchmarks.others import beside
from benchmarks.world import World, servers

Measure = Callable[[World], Awaitable[Figures]]
MEASUREMENTS: Final[dict[str, Measure]] = {
    "append": appends.measure,
    "relay": streams.measure_relay,
    "latency": streams.measure_latency,
    "replay": streams.measure_replay,
    "round": rounds.measure,
    "many": many.measure,
    "idle": idle.measure,
    "flower": beside.measure_flower,
    "flare": beside.measure_flare,
}
LARGE: Final[dict[str, Measure]] = {"log": large.measure, "model": giant.measure}


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures to this file")
    names = (*MEASUREMENTS, *LARGE)
    parser.add_argument("--only", choices=names, nargs="+", metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument(
        "--large",
        action="store_true",
        help="a log of five million events and a model of 4 GB instead; takes half an hour and 30 GB of disk",
    )
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    chosen = arguments.only or (LARGE if arguments.large else MEASUREMENTS)
    figures, failed = uvloop.run(_measure({name: (MEASUREMENTS | LARGE)[name] for name in chosen}))
    show(figures)
    if arguments.json:
        write(figures, arguments.json)
    if failed:
        sys.exit(f"not measured: {', '.join(failed)}; the reasons stand above")


async def _measure(measurements: Mapping[str, Measure]) -> tuple[Figures, list[str]]:
    """The figures, and which measurements failed: the others took too long to be thrown away."""
    figures: Figures = {}
    failed = []
    with tempfile.TemporaryDirectory(prefix="fedota-benchmark-") as directory:
        async with servers(Path(directory)) as world:
            for name, measure in measurements.items():
                print(f"measuring {name} …", flush=True)
                try:
                    figures |= await measure(world)
                except Exception:
                    traceback.print_exc()
                    failed.append(name)
    return figures, failed


if __name__ == "__main__":
    main()
