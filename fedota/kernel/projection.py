"""Projections: what a process derives from the log, exactly once.

Rows and the position that they stand for are committed in one transaction, so a crash repeats nothing and loses
nothing. What arrives twice is skipped, what is missing is read from the log.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

import msgspec
import nats.errors
import structlog

from fedota.errors import FedotaError
from fedota.events import Event, EventData, UnknownEventError, decode
from fedota.kernel.bus import Bus, Consumer, StreamLostError
from fedota.kernel.database import Connection, Pool
from fedota.kernel.event_log import EventLog, is_outage
from fedota.kernel.service import Service

D = TypeVar("D", bound=EventData)
RowHandler = Callable[[Connection, Event, Any], Awaitable[None]]
Reaction = Callable[[Event, Any], Awaitable[None]]
_TABLES: Final = """
create table if not exists checkpoint (id boolean primary key default true check (id), position bigint not null);
insert into checkpoint (position) values (0) on conflict do nothing;
create table if not exists dead_letters (
    position bigint primary key, subject text not null, type text not null, error text not null,
    parked timestamptz not null default now()
);
"""
# A crash of PostgreSQL may take back the last moments of rows and checkpoint together, and they are projected again:
# no commit here needs to wait for the disk.
_LOCK: Final = """
select position, array(select distinct subject from dead_letters) as parked,
    set_config('synchronous_commit', 'off', true)
from checkpoint for update
"""
_WAIT: Final = 5.0  # seconds that a reader waits for a position
_PAUSE: Final = 1.0  # seconds before another try after a fault
_log = structlog.get_logger(__name__)


class Projection(msgspec.Struct, frozen=True, kw_only=True):
    """What to do with events: rows to write, and reactions.

    `tables` is SQL that makes the tables of the process's own schema, if they are not there; `names` are their names.
    A row handler `(connection, event, data)` writes in the transaction that moves the checkpoint, nothing else.
    A reaction `(event, data)` acts outside before that transaction commits, so it may run again after a crash: what it
    does is keyed by the event's id. A rebuild repeats none.
    """

    tables: str = ""
    names: tuple[str, ...] = ()
    rows: Mapping[type[EventData], RowHandler] = {}
    reactions: Mapping[type[EventData], Reaction] = {}


class Projector:
    """Keeps one process's projection up to date; one at a time, however many processes of that name run."""

    def __init__(self, projection: Projection, pool: Pool, log: EventLog, bus: Bus) -> None:
        self._projection = projection
        self._pool = pool
        self._log = log
        self._bus = bus
        self._moved = asyncio.Condition()
        self.position = 0
        self.stopped: str | None = None

    @classmethod
    @asynccontextmanager
    async def open(
        cls, service: Service, projection: Projection, pool: Pool, log: EventLog, bus: Bus
    ) -> AsyncIterator["Projector"]:
        """The projection, running, with its readiness and metrics in `service`."""
        projector = cls(projection, pool, log, bus)
        await projector._prepare()
        service.add_check("projection", projector.check)
        service.add_gauge("projection_position", "Position that the read model stands for", lambda: projector.position)
        async with service.running("projector", projector.run()):
            yield projector

    async def check(self) -> None:
        """Raise when the read model has stopped, is far behind the log, or events are parked."""
        if self.stopped:
            raise FedotaError("unavailable", self.stopped)
        lag = await self._log.head() - self.position
        if lag > 10_000:
            raise FedotaError("unavailable", f"the read model is {lag} events behind the log")
        if parked := await self._pool.fetchval("select count(*) from dead_letters"):
            raise FedotaError("unavailable", f"{parked} events are parked as dead letters")

    async def wait_for(self, position: int, timeout: float = _WAIT) -> None:
        """Return when the read model stands for `position` or later. Raises `FedotaError("timeout")`."""
        async with self._moved:
            try:
                # not asyncio.wait_for: in Python 3.11 that drops a cancellation which meets its result
                async with asyncio.timeout(timeout):
                    await self._moved.wait_for(lambda: self.position >= position)
            except TimeoutError:
                raise FedotaError(
                    "timeout",
                    f"The read model has reached position {self.position}, not yet {position}. Ask again in a moment.",
                    retry_after=1,
                ) from None

    async def catch_up(self) -> None:
        """Return when the read model stands for everything that is in the log now."""
        await self.wait_for(await self._log.head())

    async def rebuild(self) -> None:
        """Empty the tables and fill them again from the log, in one transaction.

        Reactions do not run, but for what was parked: that has had none. The checkpoint stays where it is, because
        what comes after it still has its reactions to come.
        """
        async with self._pool.acquire() as connection, connection.transaction():
            end = await connection.fetchval("select position from checkpoint for update")
            parked = {row["position"] for row in await connection.fetch("select position from dead_letters")}
            await connection.execute(f"truncate {', '.join((*self._projection.names, 'dead_letters'))}")
            position = 0
            while position < end:
                for event in await self._log.read(position, limit=min(1000, end - position)):
                    await self._handle(connection, event, reacting=event.position in parked)
                    position = event.position

    async def run(self) -> None:
        """Project forever: faults of database and stream are waited out, and after any other it is tried again too."""
        while True:
            try:
                async with self._alone():
                    await self._look()
                    async with self._bus.consume(self.position) as consumer:
                        await self._follow(consumer)
            except (UnknownEventError, msgspec.ValidationError) as error:
                self.stopped = (
                    f"The read model stopped at {self.position}: this program cannot read what follows, {error}"
                )
                _log.critical("projection stopped", reason=self.stopped)
            except Exception as error:
                self._note(error)
            await asyncio.sleep(_PAUSE)

    def _note(self, error: Exception) -> None:
        if isinstance(error, (StreamLostError, FedotaError, nats.errors.Error)) or is_outage(error):
            _log.warning("projection starts again", error=str(error) or type(error).__name__)
            return
        # nobody foresaw it, but a projection that has ended would leave the process alive and its readers waiting
        what = type(error).__name__
        self.stopped = f"The read model stopped at {self.position} and is tried again: {what}, our log says more"
        _log.critical("projection stopped", reason=self.stopped, exc_info=error)

    async def _prepare(self) -> None:
        async with self._pool.acquire() as connection, connection.transaction():
            # two processes that start together would both try to create the same table
            await connection.execute("select pg_advisory_xact_lock(hashtext(current_schema()))")
            await connection.execute(_TABLES + self._projection.tables)

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """Hold the lease on this projection: two of a name would take each other's consumer away."""
        async with self._pool.acquire() as connection:
            while not await connection.fetchval("select pg_try_advisory_lock(hashtext(current_schema()), 1)"):
                await self._look()  # who waits here reads what the other writes
                self.stopped = None
                await asyncio.sleep(_PAUSE)
            try:
                yield
            finally:
                if not connection.is_closed():
                    await connection.execute("select pg_advisory_unlock(hashtext(current_schema()), 1)")

    async def _follow(self, consumer: Consumer) -> None:
        await self._take(await self._log.read(self.position))
        while True:
            await self._take([decode(body) for body in await consumer.fetch()])
            self.stopped = None

    async def _take(self, events: list[Event]) -> None:
        """Project these where they follow on what is projected; where they do not, the log has what is new of them."""
        last = max((event.position for event in events), default=0)
        if events and [event.position for event in events] == list(range(self.position + 1, last + 1)):
            await self._project(events)
        while self.position < last:
            missing = await self._log.read(self.position, limit=min(1000, last - self.position))
            if not missing:
                raise StreamLostError(f"the stream is at {last}, the log only at {self.position}")
            await self._project(missing)

    async def _project(self, events: list[Event]) -> None:
        """Project events that follow on each other."""
        try:
            await self._commit(events)
        except Exception as error:
            if _passes(error):
                raise
            if len(events) > 1:  # find the one that fails; the rest goes on
                for event in events:
                    await self._project([event])
                return
            _log.error("event parked", position=events[0].position, type=events[0].type, exc_info=error)
            await self._commit(events, park=f"{type(error).__name__}: {error}")

    async def _commit(self, events: list[Event], park: str | None = None) -> None:
        async with self._pool.acquire() as connection, connection.transaction():
            [(at, parked, _)] = await connection.fetch(_LOCK)
            for event in events:
                if event.position <= at:
                    continue
                if park or event.subject in parked:
                    await _park(connection, event, park or "an earlier event of its stream is parked")
                else:
                    await self._handle(connection, event)
            position = max(at, events[-1].position)
            await connection.execute("update checkpoint set position = $1", position)
        await self._move(position)

    async def _handle(self, connection: Connection, event: Event, *, reacting: bool = True) -> None:
        if handler := self._projection.rows.get(type(event.data)):
            await handler(connection, event, event.data)
        if reacting and (reaction := self._projection.reactions.get(type(event.data))):
            await reaction(event, event.data)

    async def _look(self) -> None:
        await self._move(await self._pool.fetchval("select position from checkpoint"))

    async def _move(self, position: int) -> None:
        async with self._moved:
            self.position = position
            self._moved.notify_all()


def _passes(error: Exception) -> bool:
    """Whether waiting may help: then the event is tried again, and not parked as poison."""
    if isinstance(error, FedotaError):
        return error.problem.code in ("unavailable", "timeout", "conflict")
    return isinstance(error, (nats.errors.Error, UnknownEventError)) or is_outage(error)


async def _park(connection: Connection, event: Event, error: str) -> None:
    # an error may quote what no text column takes: its event could not be parked then
    storable = error.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")
    await connection.execute(
        "insert into dead_letters (position, subject, type, error) values ($1, $2, $3, $4)",
        event.position,
        event.subject,
        event.type,
        storable,
    )
