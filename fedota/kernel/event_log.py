"""The append-only log in PostgreSQL: group-committed appends, reads by position.

Everything rests on one property: positions have no gaps and become visible in order, because `fedota.append` hands
them out under a lock that is held until the commit. Whoever has seen position n has seen all before it.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Final, NamedTuple
from uuid import UUID

import asyncpg
import msgspec
import structlog

from fedota.contracts.commands import Request
from fedota.errors import FedotaError
from fedota.events import CATALOGUE, Event, NewEvent, UnknownEventError, decode_data, to_json, uuid7
from fedota.kernel.database import Connection, Pool

CHANNEL: Final = "fedota_events"  # NOTIFY once a commit, with the new head
_BATCH: Final = 512  # requests in one transaction: enough for group commit, small enough for the lock on head
_APPEND: Final = "select * from fedota.append($1,$2,$3,$4,$5,$6,$7,$8,$9,$10,$11,$12,$13,$14)"
_COLUMNS: Final = (
    "select position, id, type, schema, subject, version, time, actor, correlation, causation, traceparent, data"
    " from fedota.events"
)
_READ: Final = (
    f"{_COLUMNS} where position > $1 and ($3::text[] is null or subject = any($3))"
    " and ($4::text[] is null or type = any($4)) order by position limit $2"
)
_STREAM: Final = f"{_COLUMNS} where subject = $1 order by version"
_NEWEST: Final = f"{_COLUMNS} where subject = $1 and version < $2 order by version desc limit $3"
_RECORDED: Final = "select * from fedota.recorded($1)"
_LAST_VERSION: Final = 2**31 - 1
OUTAGES: Final = (  # what is no fault of the statement: PostgreSQL has gone, or cannot do it now
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # the connection was told to go and has not closed yet: asyncpg loses track of it
    asyncpg.TransactionRollbackError,  # SQLSTATE class 40: deadlock, serialization
    asyncpg.InsufficientResourcesError,  # 53: no connection, disk or memory left
    asyncpg.ObjectNotInPrerequisiteStateError,  # 55: a lock is not to be had
    asyncpg.OperatorInterventionError,  # 57: PostgreSQL is starting or shutting down, or cancelled the statement
    asyncpg.PostgresSystemError,  # 58: an error of its files
    asyncpg.ReadOnlySQLTransactionError,  # 25006: a standby that is not promoted yet
    OSError,
)
_log = structlog.get_logger(__name__)


def is_outage(error: Exception) -> bool:
    """Whether waiting may help, because PostgreSQL is to blame and not what it was asked."""
    # a value that asyncpg cannot encode is an InterfaceError too: that one stays wrong
    return isinstance(error, OUTAGES) and not isinstance(error, ValueError)


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


class _Encoded(NamedTuple):
    """An event as it will be stored."""

    id: UUID
    type: str
    schema: int
    data: bytes

    @classmethod
    def of(cls, event: NewEvent) -> "_Encoded":
        """Raises what a reader would: what is stored and cannot be read back stops every reader, for good."""
        kind = CATALOGUE.get(event.type)
        if kind is None:
            raise UnknownEventError(event.type)
        data = to_json(event.data)
        decode_data(event.type, kind.schema, data)
        return cls(event.id, event.type, kind.schema, data)


class _Waiting(NamedTuple):
    """A request in the queue, and who waits for its answer."""

    request: Append
    events: list[_Encoded]
    answer: asyncio.Future[Appended]


class EventLog:
    """The log as one process sees it. Appends of concurrent callers share transactions (group commit)."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue(maxsize=10_000)
        self._closed = False

    @classmethod
    @asynccontextmanager
    async def open(cls, pool: Pool) -> AsyncIterator["EventLog"]:
        """The log, with its appender running; appends in flight are finished on the way out."""
        log = cls(pool)
        appender = asyncio.create_task(log._append_forever(), name="appender")
        try:
            yield log
        finally:
            log._closed = True  # nobody would answer what comes later
            await log._queue.join()
            appender.cancel()
            await asyncio.gather(appender, return_exceptions=True)

    async def append(self, request: Append) -> Appended:
        """Append; the events are durable when this returns.

        Raises `FedotaError`: `conflict` when the stream is not at `expected`, `key_reused` when the key belongs to
        another body, `unavailable` when the database does not answer. Raises `UnknownEventError` or
        `msgspec.ValidationError` for an event that could not be read back.
        """
        if self._closed:
            raise _unavailable()
        answer: asyncio.Future[Appended] = asyncio.get_running_loop().create_future()
        await self._queue.put(_Waiting(request, [_Encoded.of(event) for event in request.events], answer))
        return await answer

    async def recorded(self, key: str, fingerprint: bytes) -> Appended | None:
        """The answer to an append that was made with this key; None when there was none.

        A decision on today's state may refuse what was accepted before: who repeats it is answered from here. Ask
        after the state was read, so that an append which that state holds is surely found. Raises `key_reused` when
        the key belongs to another body.
        """
        row = await self._pool.fetchrow(_RECORDED, key)
        if row is None:
            return None
        if row["fingerprint"] != fingerprint:
            raise _key_reused()
        return Appended(position=row["position"], version=row["version"], result=row["result"], repeated=True)

    async def head(self) -> int:
        """The position of the newest event; 0 when there is none."""
        position: int = await self._pool.fetchval("select position from fedota.head")
        return position

    async def read(self, after: int, *, limit: int = 1000) -> list[Event]:
        """At most `limit` events past position `after`, in order."""
        return [event_of(record) for record in await self.records(after, limit=limit)]

    async def records(
        self,
        after: int,
        *,
        limit: int = 1000,
        subjects: Sequence[str] | None = None,
        types: Sequence[str] | None = None,
    ) -> list[asyncpg.Record]:
        """At most `limit` events past position `after` as they are stored, in order, of these streams and types."""
        return await self._pool.fetch(_READ, after, limit, subjects, types)

    async def stream(self, subject: str) -> list[Event]:
        """All events of one stream, oldest first."""
        return [event_of(record) for record in await self._pool.fetch(_STREAM, subject)]

    async def newest(self, subject: str, *, limit: int, before: int = _LAST_VERSION) -> list[Event]:
        """At most `limit` events of one stream, newest first, of versions before `before`."""
        return [event_of(record) for record in await self._pool.fetch(_NEWEST, subject, before, limit)]

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

    async def _append_batch(self, batch: list[_Waiting]) -> None:
        try:
            outcomes = await self._execute(batch)
        except Exception as error:  # whatever it is: the appender must live, and its callers must hear of it
            if is_outage(error):
                _fail(batch, _unavailable())
            else:
                await self._isolate(batch, error)
        else:
            for waiting, outcome in zip(batch, outcomes, strict=True):
                _settle(waiting.answer, outcome)

    async def _execute(self, batch: list[_Waiting]) -> list[asyncpg.Record]:
        arguments = _arguments(batch)
        try:
            return await self._pool.fetch(_APPEND, *arguments)
        except Exception as error:
            if not is_outage(error):
                raise
            # Whether it was committed is not known, but keys make it safe to ask again.
            return await self._pool.fetch(_APPEND, *arguments)

    async def _isolate(self, batch: list[_Waiting], error: Exception) -> None:
        """One request that the database refuses must not take the others of its transaction with it."""
        if len(batch) == 1:
            _log.error("append refused by the database", subject=batch[0].request.subject, error=str(error))
            _fail(batch, error)
        else:
            for one in batch:
                await self._append_batch([one])


def _fail(batch: list[_Waiting], error: Exception) -> None:
    for waiting in batch:
        if not waiting.answer.done():
            waiting.answer.set_exception(error)


def _arguments(batch: list[_Waiting]) -> tuple[list[object], ...]:
    requests = [waiting.request for waiting in batch]
    events = [event for waiting in batch for event in waiting.events]
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
        [event.schema for event in events],
        [event.data for event in events],
    )


def _settle(future: asyncio.Future[Appended], row: asyncpg.Record) -> None:
    if future.done():  # its caller has gone
        return
    match row["outcome"]:
        case "conflict":
            future.set_exception(FedotaError("conflict", "Somebody else changed this at the same moment. Try again."))
        case "key_reused":
            future.set_exception(_key_reused())
        case outcome:
            future.set_result(
                Appended(
                    position=row["position"],
                    version=row["version"],
                    result=row["result"],
                    repeated=outcome == "repeated",
                )
            )


def _key_reused() -> FedotaError:
    return FedotaError("key_reused", "This idempotency key belongs to another request. Send a new key.")


def event_of(row: asyncpg.Record) -> Event:
    """The event in a row of `fedota.events`. Raises `UnknownEventError` for a type this program does not know."""
    fields = dict(row.items())  # half the time of `{**row}`
    fields["data"] = decode_data(row["type"], row["schema"], row["data"])
    return Event(**fields)


@contextmanager
def log_needed() -> Iterator[None]:
    """Say `unavailable` to who waits for an answer when PostgreSQL does not give one."""
    try:
        yield
    except Exception as error:
        if not is_outage(error):
            raise
        raise _unavailable() from None


def _unavailable() -> FedotaError:
    return FedotaError("unavailable", "The event log does not answer. Try again.", retry_after=2)


async def listen(connection: Connection, wake: asyncio.Event) -> None:
    """Set `wake` whenever something was appended, as long as `connection` lives."""
    await connection.add_listener(CHANNEL, lambda *_: wake.set())
