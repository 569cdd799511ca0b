"""Seconds a round without training, and memory: real coordinator, selectors and store, a process for each client."""

import asyncio
import socket
import sys
import threading
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from benchmarks.figures import Figure, Figures
from benchmarks.memory import Peaks, watched
from benchmarks.problem import MEGABYTE, Infrastructure, Problem, running
from benchmarks.world import World, environment
from fedota.contracts.kit import Kit
from fedota.events import to_json
from fedota.events.problems import Plan
from fedota.kernel.files import write_private
from fedota.kernel.processes import spawn

_SELECTORS: Final = 2
_PATIENCE: Final = 120.0  # seconds
_AGAINST: Final = "the bytes over loopback both ways, and the sum"


class Shape(NamedTuple):
    """So many clients with a model of so many megabytes; the first of the rounds warms up."""

    clients: int
    megabytes: int
    rounds: int

    def __str__(self) -> str:
        return f"{self.clients}x{self.megabytes}MB"


SHAPES: Final = (Shape(8, 40, 4), Shape(4, 4, 8))


class Measured(NamedTuple):
    """Seconds of a round, and megabytes of all server processes together, each at its peak.

    Of ours, also by how much the memory of the coordinator and of the largest selector has grown.
    """

    seconds: float
    megabytes: float
    selector: float = 0.0
    coordinator: float = 0.0

    @classmethod
    def of(cls, seconds: float, processes: Infrastructure, peaks: Peaks) -> "Measured":
        """What a problem's processes needed."""
        selector = max(peaks[one.pid].grown for one in processes.selectors)
        return cls(seconds, peaks.whole, selector, peaks[processes.coordinator.pid].grown)


async def measure(world: World) -> Figures:
    """`round.*` beside the same bytes over a bare socket and the same sum in numpy."""
    figures: Figures = {}
    for shape in SHAPES:
        ours = await ours_of(world, shape)
        floor = await asyncio.to_thread(floor_of, shape.clients, shape.megabytes * MEGABYTE)
        figures |= {
            f"round.seconds.{shape}": Figure(ours.seconds, "s", floor, _AGAINST),
            f"round.server_mb.{shape}": Figure(ours.megabytes, "MB"),
            f"round.selector_mb.{shape}": Figure(ours.selector, "MB", shape.megabytes, "the model"),
        }
    return figures


async def ours_of(world: World, shape: Shape) -> Measured:
    """Rounds of this shape."""
    plan = Plan(rounds=shape.rounds, goal_count=shape.clients, minimum_fraction=1.0, selectors=_SELECTORS)
    problem = await asyncio.to_thread(Problem, world, plan, shape.megabytes)
    async with AsyncExitStack() as stack:
        processes = await stack.enter_async_context(running(world, problem))
        peaks = await stack.enter_async_context(watched(lambda: processes.pids))
        for number in range(shape.clients):
            argv = [sys.executable, "-m", "benchmarks.client", str(_kit(problem, f"client {number}", processes))]
            log = problem.directory / f"client-{number}.log"
            child = await spawn(argv, directory=problem.directory, env=environment(), log=log)
            stack.push_async_callback(child.stop, 5.0)
        await problem.over(_PATIENCE)
    return Measured.of(problem.seconds, processes, peaks)


def _kit(problem: Problem, organization: str, processes: Infrastructure) -> Path:
    """An organization's join kit, in its file."""
    token, expires = problem.token(organization)
    path = problem.directory / f"{organization}.json"
    kit = Kit(
        problem_id=problem.id,
        name="Benchmark",
        organization=organization,
        token=token,
        selectors=[selector.url for selector in processes.selectors],
        expires=expires,
    )
    write_private(path, to_json(kit))
    return path


def floor_of(clients: int, size: int) -> float:
    """Seconds for the least that a round needs: every client gets the model, sends it back, and all are summed."""
    model = np.ones(size // 4, dtype=np.float32)
    updates = [np.empty_like(model) for _ in range(clients)]
    here, there = _loopback()
    with here, there:
        begun = time.perf_counter()
        _carry(here, there, [model] * clients, updates)
        _carry(there, here, [model] * clients, updates)
        total = updates[0].copy()
        for update in updates[1:]:
            total += update
        return time.perf_counter() - begun


def _loopback() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = socket.create_connection(server.getsockname())
        there, _ = server.accept()
    return here, there


def _carry(sender: socket.socket, receiver: socket.socket, sent: list[Any], received: list[Any]) -> None:
    def send() -> None:
        for array in sent:
            sender.sendall(array.data.cast("B"))

    sending = threading.Thread(target=send)
    sending.start()
    for array in received:
        view, filled = array.data.cast("B"), 0
        while filled < len(view):
            filled += receiver.recv_into(view[filled:])
    sending.join()
