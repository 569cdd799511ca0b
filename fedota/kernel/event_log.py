"""The append-only log in PostgreSQL: group-committed appends, reads by position.

Everything rests on one property: positions have no gaps and become visible in order, because `fedota.append` hands
them out under a lock that is held until the commit. Whoever has seen position n has seen all before it.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final
from uuid import UUID

import asyncpg
import msgspec
import structlog

from fedota.contracts.commands import Request
from fedota.errors import FedotaError
from fedota.events import CATALOGUE, Event, NewEvent, decode_data, to_json, uuid7
from fedota.kernel.database import Connection, Pool

CHANNEL: Final = "fedota_events"  # NOTIFY once a commit, with the new head
_BATCH: Final = 512  # requests in one transaction: enough for group commit, small enough for the lock on head
_APPEND: Final = "select * from fedota.append($1,$2,$3,$4,$5,$6,$7,$8,$9,$10,$11,$12,$13,$14)"
_COLUMNS: Final = (
    "select position, id, type, schema, subject, version, time, actor, correlation, causation, traceparent, data"
    " from fedota.events"
)
_READ: Final = (
    f"{_COLUMNS} where position > $1 and ($3::text[] is null or subject = any($3)) order by position limit $2"
)
_STREAM: Final = f"{_COLUMNS} where subject = $1 order by version"
DISCONNECTED: Final = (
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.OperatorInterventionError,  # PostgreSQL is starting or shutting down
    OSError,
)
_log = structlog.get_logger(__name__)


class Context(msgspec.Struct, frozen=True, kw_only=True):
    """Who and what an append goes back to."""

    actor: str
    correlation: UUID
    causation: UUID | None = None
    traceparent: str | None = None

    @classmethod
    def of_request(cls, request: Request) -> "Context":
        """What a command carries with it."""
        return cls(actor=request.actor, correlation=request.correlation, traceparent=request.traceparent)

    @classmethod
    def of_event(cls, service: str, event: Event) -> "Context":
        """What a service's reaction to an event inherits from it."""
        return cls(
            actor=f"service:{service}",
            correlation=event.correlation,
            causation=event.id,
            traceparent=event.traceparent,
        )


class Append(msgspec.Struct, frozen=True, kw_only=True):
    """Events for one stream, all or none.

    `expected` is the stream's version that the decision was made on; None appends to whatever is there.
    `key` makes the append idempotent: the same key and `fingerprint` give the first answer again. It is always there,
    so that an append whose outcome was lost with its connection can be sent again.
    """

    subject: str
    events: Sequence[NewEvent]
    context: Context
    expected: int | None = None
    key: str = msgspec.field(default_factory=lambda: str(uuid7()))
    fingerprint: bytes = b""
    result: bytes | None = None


class Appended(msgspec.Struct, frozen=True, kw_only=True):
    """The log's answer: the last position and stream version of the request, and whether it had been done before."""

    position: int
    version: int
    result: bytes | None
    repeated: bool


def fingerprint(*parts: bytes) -> bytes:
    """SHA-256 over the parts of a request's body, to tell a repetition from another request with the same key."""
    return hashlib.sha256(b"\n".join(parts)).digest()


class EventLog:
    """The log as one process sees it. Appends of concurrent callers share transactions (group commit)."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._queue: asyncio.Queue[tuple[Append, asyncio.Future[Appended]]] = asyncio.Queue(maxsize=10_000)

    @classmethod
    @asynccontextmanager
    async def open(cls, pool: Pool) -> AsyncIterator["EventLog"]:
        """The log, with its appender running; appends in flight are finished on the way out."""
        log = cls(pool)
        appender = asyncio.create_task(log._append_forever(), name="appender")
        try:
            yield log
        finally:
            await log._queue.join()
            appender.cancel()
            await asyncio.gather(appender, return_exceptions=True)

    async def append(self, request: Append) -> Appended:
        """Append; the events are durable when this returns.

        Raises `FedotaError`: `conflict` when the stream is not at `expected`, `key_reused` when the key belongs to
        another body, `unavailable` when the database does not answer.
        """
        future: asyncio.Future[Appended] = asyncio.get_running_loop().create_future()
        await self._queue.put((request, future))
        return await future

    async def head(self) -> int:
        """The position of the newest event; 0 when there is none."""
        position: int = await self._pool.fetchval("select position from fedota.head")
        return position

    async def read(self, after: int, *, limit: int = 1000) -> list[Event]:
        """At most `limit` events past position `after`, in order."""
        return [event_of(record) for record in await self.records(after, limit=limit)]

    async def records(
        self, after: int, *, limit: int = 1000, subjects: Sequence[str] | None = None
    ) -> list[asyncpg.Record]:
        """At most `limit` events past position `after` as they are stored, in order, of these streams or of all."""
        return await self._pool.fetch(_READ, after, limit, subjects)

    async def stream(self, subject: str) -> list[Event]:
        """All events of one stream, oldest first."""
        return [event_of(record) for record in await self._pool.fetch(_STREAM, subject)]

    async def _append_forever(self) -> None:
        while True:
            batch = [await self._queue.get()]
            while len(batch) < _BATCH and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            try:
                await self._append_batch(batch)
            finally:
                for _ in batch:
                    self._queue.task_done()

    async def _append_batch(self, batch: list[tuple[Append, asyncio.Future[Appended]]]) -> None:
        requests = [request for request, _ in batch]
        try:
            outcomes = await self._execute(requests)
        except DISCONNECTED:
            await self._fail(
                batch, FedotaError("unavailable", "The event log does not answer. Try again.", retry_after=2)
            )
        except asyncpg.PostgresError as error:
            await self._isolate(batch, error)
        else:
            for (_, future), outcome in zip(batch, outcomes, strict=True):
                _settle(future, outcome)

    async def _execute(self, requests: list[Append]) -> list[asyncpg.Record]:
        arguments = _arguments(requests)
        try:
            return await self._pool.fetch(_APPEND, *arguments)
        except DISCONNECTED:
            # Whether it was committed is not known, but keys make it safe to ask again.
            return await self._pool.fetch(_APPEND, *arguments)

    async def _fail(self, batch: list[tuple[Append, asyncio.Future[Appended]]], error: Exception) -> None:
        for _, future in batch:
            if not future.done():
                future.set_exception(error)

    async def _isolate(self, batch: list[tuple[Append, asyncio.Future[Appended]]], error: Exception) -> None:
        """One request that the database refuses must not take the others of its transaction with it."""
        if len(batch) == 1:
            _log.error("append refused by the database", subject=batch[0][0].subject, error=str(error))
            await self._fail(batch, error)
        else:
            for one in batch:
                await self._append_batch([one])


def _arguments(requests: list[Append]) -> tuple[list[object], ...]:
    events = [event for request in requests for event in request.events]
    contexts = [request.context for request in requests]
    return (
        [request.key for request in requests],
        [request.fingerprint for request in requests],
        [request.subject for request in requests],
        [request.expected for request in requests],
        [request.result for request in requests],
        [len(request.events) for request in requests],
        [context.actor for context in contexts],
        [context.correlation for context in contexts],
        [context.causation for context in contexts],
        [context.traceparent for context in contexts],
        [event.id for event in events],
        [event.type for event in events],
        [CATALOGUE[event.type].schema for event in events],
        [to_json(event.data) for event in events],
    )


def _settle(future: asyncio.Future[Appended], row: asyncpg.Record) -> None:
    if future.done():  # its caller has gone
        return
    match row["outcome"]:
        case "conflict":
            future.set_exception(FedotaError("conflict", "Somebody else changed this at the same moment. Try again."))
        case "key_reused":
            future.set_exception(
                FedotaError("key_reused", "This idempotency key belongs to another request. Send a new key.")
            )
        case outcome:
            future.set_result(
                Appended(
                    position=row["position"],
                    version=row["version"],
                    result=row["result"],
                    repeated=outcome == "repeated",
                )
            )


def event_of(row: asyncpg.Record) -> Event:
    """The event in a row of `fedota.events`. Raises `UnknownEventError` for a type this program does not know."""
    return Event(**{**row, "data": decode_data(row["type"], row["schema"], row["data"])})


async def listen(connection: Connection, wake: asyncio.Event) -> None:
    """Set `wake` whenever something was appended, as long as `connection` lives."""
    await connection.add_listener(CHANNEL, lambda *_: wake.set())
