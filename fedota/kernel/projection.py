"""Projections: what a process derives from the log, exactly once.

Rows and the position that they stand for are committed in one transaction, so a crash repeats nothing and loses
nothing. What arrives twice is skipped, what is missing is read from the log.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import msgspec
import nats.errors
import structlog

from fedota.errors import FedotaError
from fedota.events import Event, UnknownEventError, decode
from fedota.kernel import dead_letters
from fedota.kernel.bus import Bus, Consumer, StreamLostError
from fedota.kernel.database import Connection, Pool
from fedota.kernel.event_log import EventLog, is_outage
from fedota.kernel.operations import Operations
from fedota.kernel.read_models import Projection
from fedota.kernel.rebuilding import OutdatedTablesError, make_tables, require_tables
from fedota.kernel.restores import RestoredLogError, require_same_log
from fedota.kernel.service import Service

__all__ = ["Projection", "Projector"]
_CHECKPOINT: Final = """
create table if not exists checkpoint (
    id boolean primary key default true check (id), position bigint not null,
    event uuid -- the one at that position: a log that has another there is not the one that was projected
);
do $$ begin
    if not exists (select from pg_attribute where attrelid = 'checkpoint'::regclass and attname = 'event') then
        alter table checkpoint add column event uuid;
    end if;
end $$;
insert into checkpoint (position) values (0) on conflict do nothing;
"""
# A crash of PostgreSQL may take back the last moments of rows and checkpoint together, and they are projected again:
# no commit here needs to wait for the disk.
_LOCK: Final = """
select position, (select e.id from fedota.events e where e.position = $1) as recorded,
    exists (select from dead_letters where state = 'parked') as parked, set_config('synchronous_commit', 'off', true)
from checkpoint for update
"""
_PARKED: Final = "select distinct subject from dead_letters where state = 'parked' and subject = any($1)"
_WAIT: Final = 5.0  # seconds that a reader waits for a position
_PAUSE: Final = 1.0  # seconds before another try after a fault
_log = structlog.get_logger(__name__)


class Projector:
    """Keeps one process's projection up to date; one at a time, however many processes of that name run."""

    def __init__(self, projection: Projection, pool: Pool, log: EventLog, bus: Bus) -> None:
        self._projection = projection
        self._pool = pool
        self._log = log
        self._bus = bus
        self._moved = asyncio.Condition()
        self._operations = Operations(
            projection, pool, log, bus, lambda: (self.position, self.stopped or ""), self._count_parked
        )
        self.position = 0
        self.parked = 0
        self.stopped: str | None = None

    @classmethod
    @asynccontextmanager
    async def open(
        cls, service: Service, projection: Projection, pool: Pool, log: EventLog, bus: Bus
    ) -> AsyncIterator["Projector"]:
        """The projection, running, with its readiness and metrics in `service`; operators are answered by NATS."""
        projector = cls(projection, pool, log, bus)
        await projector._prepare()
        service.add_check("projection", projector.check)
        service.add_gauge("projection_position", "Position that the read model stands for", lambda: projector.position)
        service.add_gauge("dead_letters", "Events that are parked", lambda: projector.parked)
        try:
            async with service.running("projector", projector.run()):
                yield projector
        finally:
            await projector._operations.stop()

    async def check(self) -> None:
        """Raise when the read model has stopped, is far behind the log, or events are parked."""
        if self.stopped:
            raise FedotaError("unavailable", self.stopped)
        lag = await self._log.head() - self.position
        if lag > 10_000:
            raise FedotaError("unavailable", f"the read model is {lag} events behind the log")
        await self._count_parked()
        if self.parked:
            raise FedotaError("unavailable", f"{self.parked} events are parked as dead letters")

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

    async def run(self) -> None:
        """Project forever: faults of database and stream are waited out, and after any other it is tried again too."""
        while True:
            try:
                async with self._alone() as lease:
                    await require_same_log(self._pool)
                    await require_tables(self._projection, self._pool)
                    await self._look()
                    async with self._bus.consume(self.position) as consumer:
                        await self._follow(consumer, lease)
            except (UnknownEventError, msgspec.ValidationError) as error:
                self.stopped = (
                    f"The read model stopped at {self.position}: this program cannot read what follows, {error}"
                )
                _log.critical("projection stopped", reason=self.stopped)
            except (RestoredLogError, OutdatedTablesError) as error:
                if self.stopped != str(error):  # said once: it is looked at again every second
                    _log.critical("projection stopped", reason=str(error))
                self.stopped = str(error)
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
            await connection.execute(_CHECKPOINT + dead_letters.TABLES)
            await make_tables(self._projection, connection)

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[Connection]:
        """Hold the lease on this projection: two of a name would take each other's consumer away.

        The lease lives as long as the connection that this gives.
        """
        async with self._pool.acquire() as connection:
            while not await connection.fetchval("select pg_try_advisory_lock(hashtext(current_schema()), 1)"):
                await self._operations.stop()
                await self._look()  # who waits here reads what the other writes
                self.stopped = None
                await asyncio.sleep(_PAUSE)
            try:
                await self._operations.start()
                yield connection
            finally:
                if not connection.is_closed():
                    await connection.execute("select pg_advisory_unlock(hashtext(current_schema()), 1)")

    async def _follow(self, consumer: Consumer, lease: Connection) -> None:
        await self._take(await self._log.read(self.position), lease)
        while True:
            bodies = await consumer.fetch()
            await self._take([decode(body) for body in bodies], lease)
            if not bodies:  # once a heartbeat; where events come, each commit looks itself
                await self._require_kept(lease)
            self.stopped = None

    async def _require_kept(self, lease: Connection) -> None:
        """Raise when the lease has gone, or a crash of PostgreSQL took back what we had committed last.

        Nothing else would tell while no event comes, and readers would be sent to rows that are not there any more.
        """
        position = await lease.fetchval("select position from checkpoint")
        if position < self.position:
            raise StreamLostError(f"the read model went back to {position}")

    async def _take(self, events: list[Event], lease: Connection) -> None:
        """Project these where they follow on what is projected; where they do not, the log has what is new of them.

        All is written on the lease's connection: who has lost it writes nothing, and a pool would reset the connection
        after each batch, which is a round trip more.
        """
        last = max((event.position for event in events), default=0)
        if events and [event.position for event in events] == list(range(self.position + 1, last + 1)):
            await self._project(events, lease)
        while self.position < last:
            missing = await self._log.read(self.position, limit=min(1000, last - self.position))
            if not missing:
                raise StreamLostError(f"the stream is at {last}, the log only at {self.position}")
            await self._project(missing, lease)

    async def _project(self, events: list[Event], lease: Connection) -> None:
        """Project events that follow on each other."""
        try:
            await self._commit(events, lease)
        except Exception as error:
            if _passes(error):
                raise
            if len(events) > 1:  # find the one that fails; the rest goes on
                middle = len(events) // 2
                await self._project(events[:middle], lease)
                await self._project(events[middle:], lease)
                return
            _log.error("event parked", position=events[0].position, type=events[0].type, exc_info=error)
            await self._commit(events, lease, park=f"{type(error).__name__}: {error}")

    async def _commit(self, events: list[Event], lease: Connection, park: str | None = None) -> None:
        async with lease.transaction():
            [(at, recorded, parked, _)] = await lease.fetch(_LOCK, events[-1].position)
            if recorded != events[-1].id:  # the log is the truth; a last event that agrees vouches for all before it
                raise StreamLostError(f"log and stream hold different events at position {events[-1].position}")
            if events[0].position > at + 1:  # a crash of PostgreSQL took back what we had committed last
                raise StreamLostError(f"the read model went back to {at}")
            new = [event for event in events if event.position > at]
            # nobody else parks, so what was none before the lock is none now
            blocked = await self._blocked(lease, new) if parked else set()
            handled = [event for event in new if not park and event.subject not in blocked]
            for event in new:
                if park or event.subject in blocked:
                    await dead_letters.park(lease, event, park or "an earlier event of its stream is parked")
            await self._projection.write_rows(lease, handled)
            for event in handled:
                await self._projection.react(event)
            position = max(at, events[-1].position)
            if new:
                await lease.execute("update checkpoint set position = $1, event = $2", position, new[-1].id)
        if len(handled) < len(new):
            await self._count_parked()
        await self._move(position)

    async def _blocked(self, connection: Connection, events: list[Event]) -> set[str]:
        """The streams of these events in which an earlier one is parked; asked with the checkpoint locked."""
        rows = await connection.fetch(_PARKED, list({event.subject for event in events}))
        return {row["subject"] for row in rows}

    async def _look(self) -> None:
        """Take over what the database says, though it be less than we knew."""
        await self._move(await self._pool.fetchval("select position from checkpoint"))
        await self._count_parked()

    async def _count_parked(self) -> None:
        self.parked = await dead_letters.count_parked(self._pool)

    async def _move(self, position: int) -> None:
        async with self._moved:
            self.position = position
            self._moved.notify_all()


def _passes(error: Exception) -> bool:
    """Whether waiting may help: then the event is tried again, and not parked as poison."""
    if isinstance(error, FedotaError):
        return error.problem.code in ("unavailable", "timeout", "conflict")
    return isinstance(error, (StreamLostError, nats.errors.Error, UnknownEventError)) or is_outage(error)
