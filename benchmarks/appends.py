"""How fast the log takes events, against PostgreSQL doing less."""

import asyncio
import sys
from asyncio.subprocess import PIPE, Process, create_subprocess_exec
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from statistics import median
from typing import Final

import asyncpg
import msgspec

from benchmarks.figures import Figure, Figures
from benchmarks.world import Database, World, database, environment
from benchmarks.writers import PLAIN_TABLE, Opening, Side, Slice, Written

_WRITERS: Final = (1, 8, 32, 256)
_PROCESSES: Final = 5  # as many as the product has that could append
_CONNECTIONS: Final = 32  # of the anchors, in all: more than this makes them slower on a few cores
_SECONDS: Final = 0.5  # a slice
_SLICES: Final = 9  # of each side, in turns; a noisy machine hits all sides
_UNIT: Final = "events/s"
_AGAINST: Final = "single-row inserts into the same table"


async def measure(world: World) -> Figures:
    """`append.full.*` beside plain single-row inserts and an advisory lock for each append."""
    figures: Figures = {}
    for writers in _WRITERS:
        figures |= await _figures(world, writers, 1)
        if writers > 1:  # one writer cannot be spread
            figures |= await _figures(world, writers, _PROCESSES)
    return figures


async def _figures(world: World, writers: int, processes: int) -> Figures:
    name = f"{writers}" if processes == 1 else f"{writers}.over{processes}"
    sides: list[Side] = ["full", "plain_insert", *(["advisory_lock"] if writers == 32 else [])]  # type: ignore[list-item]
    async with database(world) as made, Writers.started(made, writers, processes, connections=_CONNECTIONS) as started:
        rates = await _in_turns(started, sides)
    plain = rates["plain_insert"]
    figures = {
        f"append.full.{name}": Figure(rates["full"], _UNIT, plain, _AGAINST),
        f"append.plain_insert.{name}": Figure(plain, _UNIT),
    }
    if "advisory_lock" in rates:
        figures[f"append.advisory_lock.{name}"] = Figure(
            rates["advisory_lock"], _UNIT, plain, "the same, without the lock"
        )
    return figures


async def _in_turns(writers: "Writers", sides: list[Side]) -> dict[Side, float]:
    """Events in a second on each side: the median of slices that take turns; the first of each warms up."""
    rates: dict[Side, list[float]] = {side: [] for side in sides}
    for _ in range(1 + _SLICES):
        for side in sides:
            rates[side].append(rate(await writers.write(side, _SECONDS)))
    return {side: median(found[1:]) for side, found in rates.items()}


def rate(written: list[Written]) -> float:
    """Events in a second, of all processes together."""
    return sum(one.count / one.seconds for one in written)


class Writers:
    """Processes that write at the same time."""

    def __init__(self, children: list[Process]) -> None:
        self._children = children

    @classmethod
    @asynccontextmanager
    async def started(
        cls, made: Database, writers: int, processes: int, *, connections: int
    ) -> AsyncIterator["Writers"]:
        """So many writers, spread over so many processes, ready to write; without `connections` to the log only."""
        if connections:
            await _make_plain_table(made)
        async with AsyncExitStack() as stack:
            children = [await stack.enter_async_context(_child()) for _ in range(processes)]
            started = cls(children)
            shares = [len(range(number, writers, processes)) for number in range(processes)]
            openings = [
                Opening(
                    log_url=made.url("rounds").reveal(),
                    plain_url=made.admin_url,
                    writers=share,
                    connections=min(share, -(-connections // processes)),
                )
                for share in shares
            ]
            await asyncio.gather(*map(_asked, children, openings))
            yield started

    async def write(self, side: Side, seconds: float) -> list[Written]:
        """Let all of them write, and hear from each what came of it."""
        told = Slice(side=side, seconds=seconds)
        answers = await asyncio.gather(*(_asked(child, told) for child in self._children))
        return [msgspec.json.decode(answer, type=Written) for answer in answers]


async def _make_plain_table(made: Database) -> None:
    connection = await asyncpg.connect(made.admin_url)
    try:
        await connection.execute(PLAIN_TABLE)
    finally:
        await connection.close()


@asynccontextmanager
async def _child() -> AsyncIterator[Process]:
    """A process that ends when we close its input, or are no more."""
    child = await create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.writers"), stdin=PIPE, stdout=PIPE, env=environment()
    )
    try:
        yield child
    finally:
        assert child.stdin is not None
        child.stdin.close()
        await child.wait()


async def _asked(child: Process, said: msgspec.Struct) -> bytes:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(msgspec.json.encode(said) + b"\n")
    answer = await child.stdout.readline()
    if not answer:
        raise RuntimeError("A process that writes has ended; what it said is above.")
    return answer
