"""One model of gigabytes, two clients, one selector: that it passes, how long it takes, and what the servers need."""

import asyncio
import hashlib
from typing import Final

from benchmarks.crowd import Sink
from benchmarks.figures import Figure, Figures
from benchmarks.many import taken_part, told
from benchmarks.problem import Problem
from benchmarks.world import World
from fedota.events.problems import Plan

MEGABYTES: Final = 4000
_CLIENTS: Final = 2
_PATIENCE: Final = 1800.0  # seconds


async def measure(world: World) -> Figures:
    """`giant.*`: the first and only round, from its first check-in until its checkpoint is stored."""
    plan = Plan(
        rounds=1,
        goal_count=_CLIENTS,
        minimum_fraction=1.0,
        selectors=1,
        selection_timeout=_PATIENCE,
        report_timeout=_PATIENCE,
        attempts=1,
    )
    problem = await asyncio.to_thread(Problem, world, plan, MEGABYTES)
    digests: list[hashlib._Hash] = []

    def sink() -> Sink:
        digests.append(hashlib.sha256())
        return digests[-1].update

    met, measured = await taken_part(world, problem, sink, _PATIENCE)
    print(told(met), flush=True)
    await _require_whole(problem, digests)
    of_it = (float(MEGABYTES), "the model")
    return {
        f"giant.seconds.{_CLIENTS}x{MEGABYTES}MB": Figure(measured.seconds, "s"),
        f"giant.server_mb.{_CLIENTS}x{MEGABYTES}MB": Figure(measured.megabytes, "MB", *of_it),
        f"giant.selector_mb.{_CLIENTS}x{MEGABYTES}MB": Figure(measured.selector, "MB", *of_it),
        f"giant.coordinator_mb.{_CLIENTS}x{MEGABYTES}MB": Figure(measured.coordinator, "MB", *of_it),
    }


async def _require_whole(problem: Problem, digests: list["hashlib._Hash"]) -> None:
    """Raise unless every client got the model as it was stored."""
    with problem.model.open("rb") as file:
        stored = await asyncio.to_thread(hashlib.file_digest, file, "sha256")
    whole = sum(digest.digest() == stored.digest() for digest in digests)
    if whole != _CLIENTS:  # one whose connection broke has begun again
        raise RuntimeError("A client got another model than the one that was stored.")
