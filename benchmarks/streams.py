"""From the log to the stream, to the read model, and back again."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import aclosing, asynccontextmanager
from statistics import median, quantiles
from typing import Any, Final
from uuid import uuid4

import asyncpg
import msgspec

from benchmarks.figures import Figure, Figures
from benchmarks.stories import tell
from benchmarks.world import Database, World, an_append, an_event, database
from fedota.contracts import subjects
from fedota.events import to_json
from fedota.kernel.event_log import EventLog
from fedota.kernel.files import write_private
from fedota.kernel.projection import Projector
from fedota.kernel.rebuilding import rebuild
from fedota.kernel.relay import Relay, ensure_stream
from fedota.kernel.service import Service
from gateway.projection import PROJECTION

_EVENTS: Final = 20_000
_STORIES: Final = 160  # problems, of some 120 events each
_REBUILDS: Final = 3  # the median counts
_INSERTED: Final = 4_000
_PUBLISHED: Final = 1_000  # by the relay's anchor
_RATES: Final = (100, 500)  # events/s
_SECONDS: Final = 5.0  # at each rate
_PATIENCE: Final = 60.0  # seconds
_STREAMS: Final = 16
_UNIT: Final = "events/s"


async def measure_relay(world: World) -> Figures:
    """`relay.events_per_s` beside the same messages published one by one, each awaited."""
    async with database(world) as made, made.log("relay") as log, made.bus("relay") as bus:
        await _fill(made, _EVENTS)
        relay, begun = Relay(log, bus), time.perf_counter()
        async with Service("relay").running("relay", relay.run(asyncio.Event())), asyncio.timeout(_PATIENCE):
            while relay.position < _EVENTS:  # noqa: ASYNC110 - a look costs nothing, the relay tells nobody
                await asyncio.sleep(0.01)
        rate = _EVENTS / (time.perf_counter() - begun)
        stream, body, begun = bus.client.jetstream(), to_json(an_event(str(uuid4()))), time.perf_counter()
        subject = subjects.into(await ensure_stream(stream), subjects.event("RoundUpdated", "benchmark"))
        for _ in range(_PUBLISHED):
            await stream.publish(subject, body)
        one_by_one = _PUBLISHED / (time.perf_counter() - begun)
    return {"relay.events_per_s": Figure(rate, _UNIT, one_by_one, "publishes awaited one by one")}


async def measure_replay(world: World) -> Figures:
    """`replay.events_per_s` beside the same rows without decoding, `rebuild.*` beside as many plain inserts."""
    async with database(world) as made, made.log("gateway") as log:
        await _fill(made, _EVENTS)
        await _rate(_raw(log))  # what comes first finds the pages on the disk
        raw, decoded = await _rate(_raw(log)), await _rate(log.replay())
    rebuilt, inserted = await _rebuild(world)
    return {
        "replay.events_per_s": Figure(decoded, _UNIT, raw, "rows read without decoding"),
        "rebuild.gateway.events_per_s": Figure(rebuilt, _UNIT, inserted, "two plain inserts an event, one transaction"),
    }


async def measure_latency(world: World) -> Figures:
    """`latency.*` from the call of append to a row that the gateway reads, beside append alone."""
    figures: Figures = {}
    for rate in _RATES:
        async with database(world) as made, _chain(made), made.log("rounds") as log:
            appended, readable = await _latencies(made, log, rate)
        for name, part in (("p50", 49), ("p99", 98)):
            value, anchor = (1000 * quantiles(seconds, n=100)[part] for seconds in (readable, appended))
            figures[f"latency.append_to_read_model.{rate}.{name}_ms"] = Figure(value, "ms", anchor, "append alone")
    return figures


async def _fill(made: Database, count: int) -> None:
    async with made.log("rounds") as log:
        await asyncio.gather(*(log.append(an_append(str(uuid4()), 50)) for _ in range(count // 50)))


async def _raw(log: EventLog) -> AsyncGenerator[list[asyncpg.Record], None]:
    after = 0
    while page := await log.records(after):
        yield page
        after = page[-1]["position"]


async def _rate(pages: AsyncGenerator[list[Any], None]) -> float:
    count, begun = 0, time.perf_counter()
    async with aclosing(pages):
        async for page in pages:
            count += len(page)
    assert count == _EVENTS
    return count / (time.perf_counter() - begun)


async def _rebuild(world: World) -> tuple[float, float]:
    async with (
        database(world) as made,
        made.process("relay", "fedota.kernel.relay"),
        made.pool("gateway") as pool,
        made.bus("gateway") as bus,
        EventLog.open(pool) as log,
        Projector.open(Service("gateway"), PROJECTION, pool, log, bus) as projector,
    ):
        events = await tell(made, _STORIES)
        await projector.wait_for(events, timeout=_PATIENCE)
        rebuilt = events / median([await _seconds(rebuild(PROJECTION, pool, log)) for _ in range(_REBUILDS)])
        body = to_json(an_event(str(uuid4()))).decode()
        async with pool.acquire() as connection, connection.transaction():
            await connection.execute("create table plain (a text, b int, body json not null, primary key (a, b))")
            begun = time.perf_counter()
            for number in range(2 * _INSERTED):
                await connection.execute("insert into plain values ($1, $2, $3)", "a", number, body)
            inserted = _INSERTED / (time.perf_counter() - begun)
    return rebuilt, inserted


async def _seconds(work: Awaitable[object]) -> float:
    begun = time.perf_counter()
    await work
    return time.perf_counter() - begun


@asynccontextmanager
async def _chain(made: Database) -> AsyncIterator[None]:
    """Relay and gateway, each a process of its own."""
    tokens = made.world.directory / "tokens.json"
    write_private(tokens, msgspec.json.encode([{"role": "operator", "sha256": "0" * 64}]))
    async with (
        made.process("relay", "fedota.kernel.relay"),
        made.process("gateway", "gateway", {"tokens_file": str(tokens)}),
    ):
        yield


async def _latencies(made: Database, log: EventLog, rate: int) -> tuple[list[float], list[float]]:
    """Seconds until each append was durable, and until its event was readable; events come by the clock."""
    count = int(rate * _SECONDS)
    problems = [str(uuid4()) for _ in range(_STREAMS)]
    begun: dict[int, float] = {}
    appended: list[float] = []

    async def append(number: int) -> None:
        start = time.perf_counter()
        answer = await log.append(an_append(problems[number % _STREAMS]))
        appended.append(time.perf_counter() - start)
        begun[answer.position] = start

    async def arrivals() -> None:
        start = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number in range(count):
                await asyncio.sleep(max(0.0, start + number / rate - time.perf_counter()))
                group.create_task(append(number))

    _, seen = await asyncio.gather(arrivals(), _watch(made, count))
    return appended, [seen[position] - begun[position] for position in range(1, count + 1)]


async def _watch(made: Database, count: int) -> dict[int, float]:
    """When each position was first readable, by looks two milliseconds apart."""
    seen: dict[int, float] = {}
    connection = await asyncpg.connect(made.admin_url)
    try:
        async with asyncio.timeout(_PATIENCE):
            while len(seen) < count:
                position = await connection.fetchval("select position from gateway.checkpoint")
                now = time.perf_counter()
                seen.update((reached, now) for reached in range(len(seen) + 1, position + 1))
                await asyncio.sleep(0.002)
    finally:
        await connection.close()
    return seen
