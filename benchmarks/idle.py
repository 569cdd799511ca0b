"""Thousands of clients that wait on one selector: what each of them costs, and how many check-ins it answers beside."""

import asyncio
import random
import re
import ssl
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, NamedTuple
from urllib.request import urlopen

import psutil

from benchmarks.crowd import Line, allow_files
from benchmarks.figures import Figure, Figures
from benchmarks.memory import status
from benchmarks.problem import Problem, running
from benchmarks.until import until
from benchmarks.world import World, environment
from fedota.events.problems import Plan
from fedota.kernel.files import free_port, private_directory
from fedota.kernel.processes import spawn
from fedota.tls import client_context
from services.orchestrator.launchers.authority import Authority

CLIENTS: Final = 10_000
HELD: Final = 40.0  # seconds: every long poll ends once and is begun again
_EAGER: Final = 64  # clients that check in again as soon as they are answered
_PUSHED: Final = 8.0  # seconds that they do
_ORGANIZATIONS: Final = 100
_CONNECTING: Final = 256  # at the same time
_PATIENCE: Final = 60.0  # seconds
_AGAINST: Final = "a bare aiohttp handler that holds the same requests"
_PLAIN: Final = "the same by plain HTTP"
_WAITING: Final = re.compile(r"^fedota_clients_waiting (\S+)$", re.MULTILINE)


class Held(NamedTuple):
    """What holding the clients took: memory for each, connections and check-ins a second when all come, a share of a
    core while they wait, and check-ins a second beside.
    """

    kilobytes: float
    connects: float
    arrivals: float
    share: float
    per_second: float


async def measure(world: World) -> Figures:
    """`idle.*` beside a bare server that holds the same requests, and `idle.tls.*` beside the same without TLS."""
    allow_files(CLIENTS + 1000)
    authority = Authority.of(private_directory(world.directory / "authority"))
    ours, bare, tls = await _ours(world), await _bare(world), await _ours(world, authority)
    return {
        f"idle.kb_per_client.{CLIENTS}": Figure(ours.kilobytes, "KB", bare.kilobytes, _AGAINST),
        f"idle.arrivals_per_s.{CLIENTS}": Figure(ours.arrivals, "check-ins/s", bare.arrivals, _AGAINST),
        f"idle.check_ins_per_s.{CLIENTS}": Figure(ours.per_second, "check-ins/s", bare.per_second, _AGAINST),
        f"idle.cpu.{CLIENTS}": Figure(ours.share, "of a core", bare.share, _AGAINST),
        f"idle.tls.kb_per_client.{CLIENTS}": Figure(tls.kilobytes, "KB", ours.kilobytes, _PLAIN),
        f"idle.tls.connects_per_s.{CLIENTS}": Figure(tls.connects, "connections/s", ours.connects, _PLAIN),
        f"idle.tls.check_ins_per_s.{CLIENTS}": Figure(tls.per_second, "check-ins/s", ours.per_second, _PLAIN),
    }


async def _ours(world: World, authority: Authority | None = None) -> Held:
    """A real selector of a problem whose goal is never reached; with an `authority`, by TLS."""
    plan = Plan(rounds=1, goal_count=100_000, minimum_fraction=1.0, selectors=1, selection_timeout=86_400)
    problem = await asyncio.to_thread(Problem, world, plan, 1)
    tokens = [problem.token(f"organization {number}")[0] for number in range(_ORGANIZATIONS)]
    context = client_context(authority.pem) if authority else None
    async with running(world, problem, authority) as processes:
        [selector] = processes.selectors
        return await _held(selector.url, selector.pid, tokens, context)


async def _bare(world: World) -> Held:
    async with _bare_server(world.directory) as (url, pid):
        return await _held(url, pid, ["none"])


@asynccontextmanager
async def _bare_server(directory: Path) -> AsyncIterator[tuple[str, int]]:
    port = free_port("127.0.0.1")
    argv = [sys.executable, "-m", "benchmarks.bare", str(port)]
    guard = await spawn(argv, directory=directory, env=environment(), log=directory / "bare.log")
    url = f"http://127.0.0.1:{port}"
    try:
        await until(lambda: _answers(url), _PATIENCE)
        [child] = psutil.Process(guard.pid).children()
        yield url, child.pid
    finally:
        await guard.stop(5.0)


async def _answers(url: str) -> bool:
    try:
        await _waiting(url)
    except OSError:
        return False
    return True


async def _held(url: str, pid: int, tokens: list[str], context: ssl.SSLContext | None = None) -> Held:
    """Let all of them wait, for longer than a long poll lasts, then let some be as fast as they can."""
    before = status(pid)["VmRSS"]
    crowd = _Crowd(url, tokens, context)
    try:
        connected = await crowd.connect()
        arrived = await crowd.arrive()
        share, most = await _watched(pid)
        per_second = await crowd.push()
    finally:
        crowd.leave()
    kilobytes = 1024 * (most - before) / CLIENTS
    return Held(kilobytes, CLIENTS / connected, CLIENTS / arrived, share, per_second)


async def _watched(pid: int) -> tuple[float, float]:
    """The share of a core and the most memory that a process needs while everybody waits."""
    process, most = psutil.Process(pid), 0.0
    begun, used = time.perf_counter(), sum(process.cpu_times()[:2])
    while time.perf_counter() - begun < HELD:
        most = max(most, status(pid)["VmRSS"])
        await asyncio.sleep(0.25)
    return (sum(process.cpu_times()[:2]) - used) / (time.perf_counter() - begun), most


async def _waiting(url: str, context: ssl.SSLContext | None = None) -> int:
    """How many clients wait, as the server counts them."""

    def read() -> str:
        with urlopen(f"{url}/metrics", timeout=_PATIENCE, context=context) as reply:
            text: str = reply.read().decode()
            return text

    found = _WAITING.search(await asyncio.to_thread(read))
    assert found is not None
    return int(float(found[1]))


class _Crowd:
    """All the clients, each a connection and a task."""

    def __init__(self, url: str, tokens: list[str], context: ssl.SSLContext | None) -> None:
        self._url = url
        self._context = context
        self._tokens = tokens
        self._lines = [self._line(number) for number in range(CLIENTS)]
        self._more: list[Line] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._answered = 0

    def _line(self, number: int) -> Line:
        return Line(self._url, self._tokens[number % len(self._tokens)], f"client-{number}", self._context)

    async def connect(self) -> float:
        """Seconds until every connection is there."""
        begun = time.perf_counter()
        turns = asyncio.Semaphore(_CONNECTING)

        async def connect(line: Line) -> None:
            async with turns:
                await line.connect()

        await asyncio.gather(*(connect(line) for line in self._lines))
        return time.perf_counter() - begun

    async def arrive(self) -> float:
        """Seconds from the first check-in until all wait."""
        begun = time.perf_counter()
        self._tasks = [asyncio.create_task(self._wait(line)) for line in self._lines]
        async with asyncio.timeout(_PATIENCE):
            while (waiting := await _waiting(self._url, self._context)) < CLIENTS:
                self._raise()
                await asyncio.sleep(0.02 if waiting > 0.8 * CLIENTS else 0.1)
        return time.perf_counter() - begun

    async def push(self) -> float:
        """Check-ins answered in a second while the others wait: two connections of a client send each other away."""
        for task in self._tasks[: 2 * _EAGER]:  # twice as many: a selector that is full would send everybody away
            task.cancel()
        await asyncio.wait(self._tasks[: 2 * _EAGER])
        self._more = [self._line(number) for number in range(_EAGER) for _ in range(2)]
        self._tasks += [asyncio.create_task(self._hurry(line)) for line in self._more]
        begun, before = time.perf_counter(), self._answered
        await asyncio.sleep(_PUSHED)
        self._raise()
        return (self._answered - before) / (time.perf_counter() - begun)

    def leave(self) -> None:
        """Everybody goes."""
        for task in self._tasks:
            task.cancel()
        for line in (*self._lines, *self._more):
            line.close()

    async def _wait(self, line: Line) -> None:
        while True:
            seconds = await self._checked_in(line)
            await asyncio.sleep(seconds * random.uniform(1.0, 1.2))

    async def _hurry(self, line: Line) -> None:
        while True:
            await self._checked_in(line)
            self._answered += 1

    async def _checked_in(self, line: Line) -> float:
        """Check in; the seconds after which to do so again."""
        answer = await line.ask("POST", "/v1/check-in")
        if answer.status != 200 or answer.json["status"] != "come_back":
            raise RuntimeError(f"An idle client was answered with {answer.status}: {answer.json}")
        return float(answer.json["seconds"])

    def _raise(self) -> None:
        """What one client met concerns all: the figures would be of fewer."""
        for task in self._tasks:
            if task.done() and not task.cancelled():
                task.result()
