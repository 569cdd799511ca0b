"""The append-only log in PostgreSQL: group-committed appends, reads by position.

Everything rests on one property: positions have no gaps and become visible in order, because `fedota.append` hands
them out under a lock that is held until the commit. Whoever has seen position n has seen all before it.
"""

import asyncio
import hashlib
import math
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime
from typing import Final, NamedTuple
from uuid import UUID

import asyncpg
import msgspec
import structlog
from asyncpg.pool import PoolConnectionProxy

from fedota.contracts.commands import Request
from fedota.errors import FedotaError
from fedota.events import CATALOGUE, Event, NewEvent, UnknownEventError, decode_data, decoder, to_json, uuid7
from fedota.kernel.database import Connection, Pool
from fedota.kernel.log_queries import COLUMNS, LAST_BEFORE, NEWEST, STREAM, TAIL, TYPED, Scanned, Wanted

CHANNEL: Final = "fedota_events"  # NOTIFY once a commit, with the new head
_BATCH: Final = 128  # requests in one transaction: enough for group commit; more wait while PostgreSQL works on these
_APPEND: Final = "select * from fedota.append($1,$2,$3,$4,$5,$6,$7,$8,$9,$10,$11,$12,$13,$14)"
_PAGE: Final = 1000  # events that a replay reads at once, of at most so many bytes:
_PAGE_BYTES: Final = 4 * 1024 * 1024
_HANDFUL: Final = 100  # events that are typed at once: more do not fit the processor's cache, at half the speed
_WINDOW: Final = 20_000  # positions that a statement looks through for what has no index
_SCAN_SECONDS: Final = 1.0  # after that a scan says how far it got
_LAST_POSITION: Final = 2**63 - 1
_RELEASE_SECONDS: Final = 5.0
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
        self._pen: PoolConnectionProxy[asyncpg.Record] | None = None
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
            await log._put_down()

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
        return events_of(await self._fetch(Wanted(), after, _LAST_POSITION, limit, TYPED))

    async def records(
        self,
        after: int,
        *,
        limit: int = 1000,
        subjects: Sequence[str] | None = None,
        types: Sequence[str] | None = None,
        actor: str | None = None,
        until: int | None = None,
        since: datetime | None = None,
        before: datetime | None = None,
    ) -> list[asyncpg.Record]:
        """At most `limit` events past position `after` as they are stored, in order, up to `until`.

        Only those of these streams, types and of this actor, recorded at `since` or later and before `before`; None
        stands for all. Fewer than `limit` are all there are. Types and actors have no index: what is rare among
        millions takes long to find, `scan` stops on the way and says where.
        """
        if types is None and actor is None and since is None and before is None:
            return await self._fetch(Wanted(subjects), after, _LAST_POSITION if until is None else until, limit)
        begin, end = await self._bounds(after, until, since, before)
        return (await self._scan(Wanted(subjects, types, actor), begin, end, limit)).records

    async def scan(
        self,
        after: int,
        *,
        limit: int = 1000,
        subjects: Sequence[str] | None = None,
        types: Sequence[str] | None = None,
        actor: str | None = None,
        until: int | None = None,
        since: datetime | None = None,
        before: datetime | None = None,
        seconds: float = _SCAN_SECONDS,
    ) -> Scanned:
        """What `records` finds in about `seconds`, and the position up to which it looked.

        For who answers a person: however rare what is asked for, no statement holds a connection for long, and the
        next page begins past `reached`. Fewer than `limit` records mean the end only when `reached` is the head (or
        `until`, or the last position before `before`): then `reached` stays the same when it is asked again.
        """
        begin, end = await self._bounds(after, until, since, before)
        return await self._scan(Wanted(subjects, types, actor), begin, end, limit, seconds)

    async def replay(
        self,
        after: int = 0,
        until: int | None = None,
        *,
        subjects: Sequence[str] | None = None,
        types: Sequence[str] | None = None,
        page: int = _HANDFUL,
    ) -> AsyncGenerator[list[Event], None]:
        """All events past `after` up to and including `until` in order, in pages; without it, up to today's head.

        PostgreSQL works on what follows meanwhile. More than some hundred events on a `page` are typed more slowly.
        Close it (`aclosing`) when it is left early. Raises `UnknownEventError` or `msgspec.ValidationError` for an
        event that this program cannot read.
        """
        wanted, end = Wanted(subjects, types), await self.head() if until is None else until
        fetching = asyncio.create_task(self._scan(wanted, after, end, _HANDFUL, columns=TYPED))
        try:
            while (found := await fetching).records:
                rows = found.records
                more = self._scan(wanted, found.reached, end, _affordable(rows), columns=TYPED)
                fetching = asyncio.create_task(more)
                for begin in range(0, len(rows), page):
                    await asyncio.sleep(0)  # take in what has come
                    yield events_of(rows[begin : begin + page])
        finally:
            fetching.cancel()
            await asyncio.gather(fetching, return_exceptions=True)

    @asynccontextmanager
    async def tail(self, after: int) -> AsyncIterator["Tail"]:
        """The log past position `after`, on a connection of its own, which saves each read a round trip."""
        async with self._pool.acquire() as connection:
            yield Tail(connection, after)

    async def stream(self, subject: str) -> list[Event]:
        """All events of one stream, oldest first."""
        return events_of(await self._pool.fetch(STREAM, subject))

    async def newest(self, subject: str, *, limit: int, before: int = _LAST_VERSION) -> list[Event]:
        """At most `limit` events of one stream, newest first, of versions before `before`."""
        return events_of(await self._pool.fetch(NEWEST, subject, before, limit))

    async def _scan(
        self, wanted: Wanted, after: int, end: int, limit: int, seconds: float = math.inf, columns: str = COLUMNS
    ) -> Scanned:
        found: list[asyncpg.Record] = []
        deadline = asyncio.get_running_loop().time() + seconds
        while after < end:
            window = min(end, after + _WINDOW) if wanted.sifts and wanted.subjects is None else end
            found += await self._fetch(wanted, after, window, limit - len(found), columns)
            if len(found) == limit:
                return Scanned(found, found[-1]["position"])
            after = window
            if asyncio.get_running_loop().time() > deadline:
                break
        return Scanned(found, after)

    async def _fetch(
        self, wanted: Wanted, after: int, until: int, limit: int, columns: str = COLUMNS
    ) -> list[asyncpg.Record]:
        statement, arguments = wanted.statement(columns, after, until, limit)
        return await self._pool.fetch(statement, *arguments)

    async def _bounds(
        self, after: int, until: int | None, since: datetime | None, before: datetime | None
    ) -> tuple[int, int]:
        end = await self.head() if until is None else min(until, await self.head())
        if before is not None:
            end = await self._last_before(before, end)
        if since is not None:
            after = max(after, await self._last_before(since, end))
        return after, end

    async def _last_before(self, time: datetime, end: int) -> int:
        position: int = await self._pool.fetchval(LAST_BEFORE, time, end)
        return position

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
            return await self._write(arguments)
        except asyncpg.LockNotAvailableError:
            raise  # somebody sits on the lock, and the callers have waited long enough
        except Exception as error:
            if not is_outage(error):
                raise
            # Whether it was committed is not known, but keys make it safe to ask again.
            return await self._write(arguments)

    async def _write(self, arguments: tuple[list[object], ...]) -> list[asyncpg.Record]:
        """On one connection that is kept: a pool resets one after each use, which is a round trip more."""
        if self._pen is None:
            self._pen = await self._pool.acquire()
        try:
            return await self._pen.fetch(_APPEND, *arguments)
        except Exception as error:
            if is_outage(error):
                await self._put_down()
            raise

    async def _put_down(self) -> None:
        """Give the connection back to the pool, which looks whether it is still good and closes it if it is not."""
        pen, self._pen = self._pen, None
        if pen is not None:
            with suppress(*OUTAGES):  # what is wrong with it was told already, or is nobody's concern any more
                await self._pool.release(pen, timeout=_RELEASE_SECONDS)

    async def _isolate(self, batch: list[_Waiting], error: Exception) -> None:
        """One request that the database refuses must not take the others of its transaction with it."""
        if len(batch) == 1:
            _log.error("append refused by the database", subject=batch[0].request.subject, error=str(error))
            _fail(batch, error)
        else:
            for one in batch:
                await self._append_batch([one])


class LogChangedError(Exception):
    """What was read before is not in the log any more: it is another log, or an older copy of this one."""


class Tail:
    """Follows the log, and notices when it is not the log that it followed so far."""

    def __init__(self, connection: Connection, after: int) -> None:
        self._connection = connection
        self._hash: bytes | None = None
        self._limit = _HANDFUL
        self.position = after
        self.more = True  # whether the next read may give something, though nothing be appended until then

    async def read(self) -> list[asyncpg.Record]:
        """The next events as they are stored, a page of them at most. Raises `LogChangedError`."""
        if self.position == 0:
            rows = await self._connection.fetch(TAIL, 1, self._limit)
        else:
            # the last one again: its hash says that all before it is what it was
            rows = await self._connection.fetch(TAIL, self.position, self._limit + 1)
            if not rows or rows[0]["position"] != self.position or rows[0]["hash"] != (self._hash or rows[0]["hash"]):
                raise LogChangedError(f"the log has not any more what it had at position {self.position}")
            self._hash = rows.pop(0)["hash"]
        self.more = len(rows) == self._limit
        if rows:
            self.position, self._hash, self._limit = rows[-1]["position"], rows[-1]["hash"], _affordable(rows)
        return rows


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


def event_of(record: asyncpg.Record) -> Event:
    """The event in one of `EventLog.records`. Raises `UnknownEventError` for a type this program does not know."""
    fields = dict(record.items())  # half the time of `{**record}`
    fields["data"] = decode_data(record["type"], record["schema"], record["data"])
    return Event(**fields)


def events_of(rows: list[asyncpg.Record]) -> list[Event]:
    """The events in rows of the columns `TYPED`. Raises `UnknownEventError` for a type this program does not know."""
    return [
        Event(
            id=id_,
            type=type_,
            schema=schema,
            subject=subject,
            version=version,
            position=position,
            time=datetime.fromtimestamp(time, UTC),
            actor=actor,
            correlation=correlation,
            causation=causation,
            traceparent=traceparent,
            data=decoder(type_, schema)(data),
        )
        for position, id_, type_, schema, subject, version, time, actor, correlation, causation, traceparent, data in (
            rows
        )
    ]


def _affordable(rows: list[asyncpg.Record]) -> int:
    """How many more such rows make a page."""
    size = sum(len(row["data"]) for row in rows) // len(rows)
    return max(1, min(_PAGE, _PAGE_BYTES // (size + 1)))


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
