"""A round of a thousand clients: how long it takes, and how much the selectors grow with them."""

import asyncio
import mmap
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final

from benchmarks.crowd import LightClient, Line, Sink, allow_files, drop
from benchmarks.figures import Figure, Figures
from benchmarks.memory import watched
from benchmarks.problem import MEGABYTE, Infrastructure, Problem, running
from benchmarks.rounds import Measured, Shape, floor_of
from benchmarks.world import World
from fedota.events.problems import Plan

SHAPE: Final = Shape(1000, 1, 4)
_FEWER: Final = 10
_ORGANIZATIONS: Final = 50
_PATIENCE: Final = 600.0  # seconds


async def measure(world: World) -> Figures:
    """`many.*`: seconds beside the same bytes over a bare socket and their sum, memory beside fewer clients'."""
    allow_files(3 * SHAPE.clients)
    fewer = await _measured(world, SHAPE._replace(clients=SHAPE.clients // _FEWER))
    many = await _measured(world, SHAPE)
    floor = await asyncio.to_thread(floor_of, SHAPE.clients, SHAPE.megabytes * MEGABYTE)
    against = f"the same with a {_FEWER}th of the clients"
    return {
        f"many.seconds.{SHAPE}": Figure(many.seconds, "s", floor, "the bytes over loopback both ways, and the sum"),
        f"many.server_mb.{SHAPE}": Figure(many.megabytes, "MB", fewer.megabytes, against),
        f"many.selector_mb.{SHAPE}": Figure(many.selector, "MB", fewer.selector, against),
    }


async def _measured(world: World, shape: Shape) -> Measured:
    plan = Plan(rounds=shape.rounds, goal_count=shape.clients, minimum_fraction=1.0, selectors=2)
    problem = await asyncio.to_thread(Problem, world, plan, shape.megabytes)
    met, measured = await taken_part(world, problem, lambda: drop)
    print(f"{shape}: {told(met)}", flush=True)
    return measured._replace(seconds=problem.seconds)


def told(met: Counter[str]) -> str:
    """What clients were told, in words."""
    return "clients were told: " + ", ".join(f"{what} {count}×" for what, count in met.most_common())


async def taken_part(
    world: World, problem: Problem, sink: Callable[[], Sink], patience: float = _PATIENCE
) -> tuple[Counter[str], Measured]:
    """What as many light clients as the goal asks for were told in a whole training, and what the servers needed."""
    met: Counter[str] = Counter()
    async with running(world, problem) as processes, watched(lambda: processes.pids) as peaks:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one.take_part()) for one in _clients(problem, processes, met, sink)]
            await problem.over(patience)
            seconds = loop.time() - begun
            await asyncio.wait(tasks, timeout=10)  # they are told that it is finished; those who sleep long need not be
            for task in tasks:
                task.cancel()
    return met, Measured.of(seconds, processes, peaks)


def _clients(
    problem: Problem, processes: Infrastructure, met: Counter[str], sink: Callable[[], Sink]
) -> list[LightClient]:
    update = mapped(problem.model)
    tokens = [problem.token(f"organization {number}")[0] for number in range(_ORGANIZATIONS)]
    return [
        LightClient(_line(processes, number, tokens[number % _ORGANIZATIONS]), update, met, sink)
        for number in range(problem.plan.goal_count)
    ]


def _line(processes: Infrastructure, number: int, token: str) -> Line:
    return Line(processes.selectors[number % len(processes.selectors)].url, token, f"client-{number}")


def mapped(path: Path) -> memoryview:
    """A file's bytes, read when they are looked at."""
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
