"""A read model to be told to fail, and the projection of a process that keeps it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

from fedota.events import Event, EventData, to_json
from fedota.events.problems import ParticipationRequested, ProblemCreated
from fedota.events.storage import FilesDeleted
from fedota.kernel.bus import Bus, Consumer
from fedota.kernel.database import Connection, Pool
from fedota.kernel.event_log import EventLog
from fedota.kernel.projection import Projection, Projector
from fedota.kernel.service import Service
from tests.contract.ground import Ground

TABLES: Final = "create table if not exists seen (position bigint, subject text, data text);"


class Model:
    """A read model of all events, which can be told to fail; it counts its reactions."""

    def __init__(self) -> None:
        self.poison: Callable[[Event], Exception | None] = lambda _: None
        self.poison_reaction: Callable[[Event], Exception | None] = lambda _: None
        self.reactions: list[int] = []
        self.going = asyncio.Event()  # what is handled waits while it is not set
        self.going.set()
        kinds = (ProblemCreated, ParticipationRequested, FilesDeleted)
        self.projection = Projection(
            tables=TABLES,
            names=("seen",),
            write=self.write,
            kinds=frozenset(kinds),
            reactions=dict.fromkeys(kinds, self._react),
        )

    async def write(self, connection: Connection, events: Sequence[Event]) -> None:
        """A row an event."""
        await self.going.wait()
        for event in events:
            row = (event.position, event.subject, to_json(event.data).decode())
            await connection.execute("insert into seen values ($1, $2, $3)", *row)
            if error := self.poison(event):
                raise error

    async def _react(self, event: Event, _: EventData) -> None:
        if error := self.poison_reaction(event):
            raise error
        self.reactions.append(event.position)


class Unreliable(Bus):
    """A bus whose consumers deliver much twice and some things not at all."""

    @asynccontextmanager
    async def consume(self, after: int) -> AsyncIterator[Consumer]:
        """From long before, so everything comes again."""
        async with super().consume(max(0, after - 40)) as consumer:
            fetch = consumer.fetch

            async def badly() -> list[bytes]:
                bodies = await fetch()
                return [*bodies[1:], *bodies[-1:], *bodies[:1]] if len(bodies) > 2 else bodies + bodies

            consumer.fetch = badly  # type: ignore[method-assign]
            yield consumer


class World:
    """A projection of the process `gateway` that runs beside a relay."""

    def __init__(
        self, ground: Ground, pool: Pool, bus: Bus, log: EventLog, projector: Projector, service: Service
    ) -> None:
        self.ground = ground
        self.pool = pool
        self.bus = bus
        self.log = log
        self.projector = projector
        self.service = service

    async def positions(self) -> list[int]:
        """Of the rows, in their order."""
        return [row["position"] for row in await self.pool.fetch("select position from seen order by 1")]

    async def parked(self) -> list[int]:
        """Of the dead letters that wait."""
        query = "select position from dead_letters where state = 'parked' order by 1"
        return [row["position"] for row in await self.pool.fetch(query)]

    async def reaches(self, position: int) -> None:
        """Return when the read model stands there."""
        await self.projector.wait_for(position, timeout=20)


@asynccontextmanager
async def projecting(ground: Ground, model: Model, bus_kind: type[Bus] = Bus) -> AsyncIterator[World]:
    """The projection, running."""
    service, servers = Service("gateway"), ground.servers
    async with (
        bus_kind.connect(servers.nats_url, "gateway", servers.nats_keys["gateway"]) as bus,
        ground.pool("gateway") as pool,
        EventLog.open(pool) as log,
        Projector.open(service, model.projection, pool, log, bus) as projector,
    ):
        yield World(ground, pool, bus, log, projector, service)


class Always(asyncio.Event):
    """A wake that is always near: the relay looks all the time."""

    async def wait(self) -> Any:
        """A moment."""
        await asyncio.sleep(0.01)
        return True
