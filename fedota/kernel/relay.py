"""The relay copies the log into JetStream so that the stream's sequence is the log's position, always.

It keeps no cursor of its own: the stream's last sequence is the cursor, and `Nats-Expected-Last-Sequence` on each
message or atomic batch makes the server refuse whatever does not fit. Two relays at once, a kill in the middle or a
wiped stream cannot lose, repeat or reorder an event; on any doubt the relay asks the stream again where it stands.
"""

import asyncio
import secrets
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, NamedTuple

import asyncpg
import msgspec
import nats.errors
import structlog
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import RetentionPolicy, StorageType, StreamConfig, SubjectTransform
from nats.js.errors import APIError, NotFoundError

from fedota.contracts import subjects
from fedota.errors import FedotaError
from fedota.events import encode, uuid7
from fedota.kernel.bus import Bus, send_frames
from fedota.kernel.database import connect_pool
from fedota.kernel.event_log import OUTAGES, EventLog, LogChangedError, Tail, listen
from fedota.kernel.service import Service, main, scaffold
from fedota.kernel.settings import ProcessSettings

_BATCH: Final = 1000  # the server's limit of an atomic batch
_FEW: Final = 8  # events that are confirmed sooner one behind the other: an atomic batch costs several fsyncs
_BATCH_BYTES: Final = 4 * 1024 * 1024
_CONFIRM: Final = 3.0  # seconds that a batch may take; later its fate is read from the stream
_IDLE: Final = 1.0  # seconds between looks at the stream while nothing is appended
_AHEAD: Final = 2  # batches that are on their way at once
_REMEDY: Final = (
    "Restore a newer copy of the log; or, if what is missing in it is lost, delete the stream, which is then rebuilt, "
    "and rebuild the read models."
)
_log = structlog.get_logger(__name__)


class DivergedError(Exception):
    """Stream and log tell different stories: no relay can mend that, a person must decide."""


class Message(NamedTuple):
    """An event as the stream holds it."""

    subject: str
    body: bytes

    @classmethod
    def of(cls, record: asyncpg.Record) -> "Message":
        """The message of a row of the log, whose subject ends with the problem's id."""
        return cls(subjects.event(record["type"], record["subject"].partition("/")[2]), encode(dict(record)))


class Relay:
    """Moves events from the log to the stream; `run` until cancelled."""

    def __init__(self, log: EventLog, bus: Bus) -> None:
        self._log = log
        self._bus = bus
        self._stream = bus.client.jetstream(timeout=5)
        self._inlet = ""
        self._turn = asyncio.Lock()
        self.position = 0
        self.diverged: str | None = None

    async def check(self) -> None:
        """Raise when the relay has stopped because log and stream disagree."""
        if self.diverged:
            raise FedotaError("unavailable", self.diverged)

    async def run(self, wake: asyncio.Event) -> None:
        """Relay forever; `wake` is set when something was appended. Faults of either side are waited out."""
        while True:
            try:
                await self._relay(wake)
            except (nats.errors.Error, *OUTAGES) as error:
                _log.warning("relay starts again", error=str(error) or type(error).__name__)
            except DivergedError as error:
                if self.diverged != str(error):  # said once: it is looked at again every second
                    _log.critical("relay stopped", reason=str(error))
                self.diverged = str(error)
            await asyncio.sleep(_IDLE)

    async def _relay(self, wake: asyncio.Event) -> None:
        while True:
            # each time: the stream may have been deleted, and made again by another relay with another inlet
            self._inlet = await ensure_stream(self._stream)
            self.position = begun = await self._verified_position()
            self.diverged = None
            try:
                await self._copy(wake)
            except (APIError, nats.errors.Error, TimeoutError) as error:
                _log.warning("not confirmed", after=self.position, error=str(error) or type(error).__name__)
                if self.position == begun:  # another relay is faster, or the stream takes nothing
                    await asyncio.sleep(_IDLE)

    async def _copy(self, wake: asyncio.Event) -> None:
        """Publish what the log has past the stream's end, for as long as nothing is unclear.

        The next batch is read and sent while the one before waits for its confirmation: each names the sequence that
        it must follow, so where one is refused, so is the next.
        """
        async with self._log.tail(self.position) as tail, _Window(wake) as window:
            while True:
                wake.clear()
                await window.room()
                messages = [Message.of(record) for record in await self._read(tail)]
                expected = tail.position - len(messages)
                for part in _parts(messages):
                    await window.room()
                    await window.add(self._publish(part, expected))
                    expected += len(part)
                if tail.more:
                    continue
                with suppress(TimeoutError):
                    await asyncio.wait_for(wake.wait(), _IDLE)
                    continue
                await window.empty()
                if await last_sequence(self._stream) != self.position:
                    return

    async def _read(self, tail: Tail) -> list[asyncpg.Record]:
        try:
            return await tail.read()
        except LogChangedError:
            raise DivergedError(
                f"The log has not any more what it had at position {tail.position}: it was restored from an older copy "
                f"while the relay ran. {_REMEDY}"
            ) from None

    async def _verified_position(self) -> int:
        """The stream's last sequence, after a look that its last event is the log's own at that position."""
        sequence = await last_sequence(self._stream)
        if sequence == 0:
            return 0
        recorded = await self._log.records(sequence - 1, limit=1)
        if not recorded:
            raise DivergedError(
                f"The event stream has {sequence} events, the log only {await self._log.head()}: the log was restored "
                f"from an older copy. {_REMEDY}"
            )
        published = await self._stream.get_msg(subjects.STREAM, seq=sequence, direct=True)
        # an event's id is never given twice, so a log that went another way differs here, wherever the two parted
        if published.data != Message.of(recorded[0]).body:
            raise DivergedError(
                f"Log and event stream hold different events at position {sequence}: the log was restored from an "
                f"older copy and went on. {_REMEDY}"
            )
        return sequence

    async def _publish(self, messages: list[Message], expected: int) -> None:
        publish = publish_few if len(messages) <= _FEW else publish_batch
        await publish(self._bus, self._inlet, messages, expected, self._turn)
        self.position = expected + len(messages)


class _Window:
    """What was sent and waits for its confirmation, at most `_AHEAD` batches; the first failure is raised."""

    def __init__(self, wake: asyncio.Event) -> None:
        self._wake = wake
        self._sent: deque[asyncio.Task[None]] = deque()

    async def __aenter__(self) -> "_Window":
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._sent:
            task.cancel()
        await asyncio.gather(*self._sent, return_exceptions=True)

    async def room(self) -> None:
        """Return when one more may be sent."""
        while self._sent and (len(self._sent) >= _AHEAD or self._sent[0].done()):
            await self._sent[0]
            self._sent.popleft()

    async def empty(self) -> None:
        """Return when all is confirmed."""
        while self._sent:
            await self._sent[0]
            self._sent.popleft()

    async def add(self, sending: Coroutine[Any, Any, None]) -> None:
        """Send; it has left when this returns, unless the connection holds it up."""
        task = asyncio.create_task(sending)
        task.add_done_callback(self._failed)
        self._sent.append(task)
        await asyncio.sleep(0)

    def _failed(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self._wake.set()  # who waits for new events must look


async def ensure_stream(stream: JetStreamContext) -> str:
    """Create the stream unless it is there; where it takes what is published."""
    try:
        found = await stream.stream_info(subjects.STREAM)
    except NotFoundError:
        found = await stream.add_stream(_config(secrets.token_hex(16)))
    [inlet] = found.config.subjects or [""]
    if inlet == subjects.EVENTS:
        raise DivergedError(
            "The event stream was made by an earlier version and holds what anybody has replies sent to. Delete the "
            "stream to let it be rebuilt from the log."
        )
    return inlet


def _config(secret: str) -> StreamConfig:
    inlet = subjects.inlet(secret)
    return StreamConfig(
        name=subjects.STREAM,
        subjects=[inlet],
        subject_transform=SubjectTransform(src=inlet, dest=subjects.EVENTS),
        retention=RetentionPolicy.LIMITS,
        storage=StorageType.FILE,
        allow_atomic=True,
        allow_direct=True,
        deny_delete=True,
        deny_purge=True,
        allow_rollup_hdrs=False,
        duplicate_window=1,
    )


async def last_sequence(stream: JetStreamContext) -> int:
    """The sequence of the stream's newest message; 0 when it is empty."""
    return (await stream.stream_info(subjects.STREAM)).state.last_seq


async def publish_few(bus: Bus, inlet: str, messages: list[Message], expected: int, turn: asyncio.Lock) -> None:
    """Publish each right behind the one before: where one is refused, so are all after it.

    `turn` is held until all has gone: what follows on it must not overtake it while the connection holds it up.
    """
    requests = (
        (message, {"Nats-Expected-Last-Sequence": str(sequence)})
        for sequence, message in enumerate(messages, start=expected)
    )
    async with turn:
        replies = await _asked(bus, inlet, requests)
    await _require_stored(replies)


async def publish_batch(bus: Bus, inlet: str, messages: list[Message], expected: int, turn: asyncio.Lock) -> None:
    """Publish all or none, the first right behind sequence `expected` (atomic batches, NATS ADR-50); `turn` as above.

    No `Nats-Msg-Id`: a duplicate would reject the whole batch, and the expected sequence guards better.
    """
    batch, last, final = uuid7().hex, len(messages), messages[-1]
    headers = {"Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(last), "Nats-Batch-Commit": "1"}
    if last == 1:
        headers["Nats-Expected-Last-Sequence"] = str(expected)
    async with turn:
        if last > 1:
            await send_frames(bus.client, _frames(inlet, messages[:-1], batch, expected))
        replies = await _asked(bus, inlet, [(final, headers)])
    await _require_stored(replies)


async def _asked(
    bus: Bus, inlet: str, requests: Iterable[tuple[Message, dict[str, str]]]
) -> "asyncio.Future[list[Msg]]":
    """The replies to come; the requests are in the connection's hands, in order, when this returns."""
    replies = asyncio.gather(
        *(
            bus.client.request(subjects.into(inlet, message.subject), message.body, headers=headers, timeout=_CONFIRM)
            for message, headers in requests
        )
    )
    await asyncio.sleep(0)  # each takes its first step, which hands it over
    return replies


def _frames(inlet: str, messages: list[Message], batch: str, expected: int) -> bytes:
    """The beginning of a batch in the form of NATS's protocol: in nats-py's hands it would take four times as long."""
    first = f"Nats-Expected-Last-Sequence: {expected}\r\n"
    frames: list[bytes] = []
    for index, message in enumerate(messages, start=1):
        head = f"NATS/1.0\r\nNats-Batch-Id: {batch}\r\nNats-Batch-Sequence: {index}\r\n{first}\r\n"
        sizes = f"{len(head)} {len(head) + len(message.body)}"
        frames += (f"HPUB {subjects.into(inlet, message.subject)} {sizes}\r\n{head}".encode(), message.body, b"\r\n")
        first = ""
    return b"".join(frames)


async def _require_stored(replies: "asyncio.Future[list[Msg]]") -> None:
    for reply in await replies:
        answer = msgspec.json.decode(reply.data)
        if "error" in answer:
            raise APIError.from_error(answer["error"])


def _parts(messages: list[Message]) -> Iterator[list[Message]]:
    """The messages in order, in batches of at most `_BATCH` and of bounded bytes, but for one that is larger alone."""
    begin = size = 0
    for index, message in enumerate(messages):
        size += len(message.body)
        if index > begin and (size > _BATCH_BYTES or index - begin == _BATCH):
            yield messages[begin:index]
            begin, size = index, len(message.body)
    if messages:
        yield messages[begin:]


@asynccontextmanager
async def _resources(service: Service, settings: ProcessSettings) -> AsyncIterator[None]:
    wake = asyncio.Event()
    async with (
        connect_pool(settings.database_url, service.name, size=3) as pool,
        Bus.connect(settings.nats_url, service.name, settings.nats_credentials) as bus,
        EventLog.open(pool) as log,
        service.running("listen", _keep_listening(pool, wake)),
    ):
        relay = Relay(log, bus)
        service.add_check("log", log.head)
        service.add_check("nats", bus.check)
        service.add_check("diverged", relay.check)
        service.add_gauge("relay_position", "Last position that the stream holds", lambda: relay.position)
        async with service.running("relay", relay.run(wake)):
            yield


async def _keep_listening(pool: "asyncpg.Pool[asyncpg.Record]", wake: asyncio.Event) -> None:
    """A dropped LISTEN costs latency, not events: the relay looks by itself every second meanwhile."""
    while True:
        try:
            async with pool.acquire() as connection:
                await listen(connection, wake)
                wake.set()
                while not connection.is_closed():
                    await connection.execute("select 1")
                    await asyncio.sleep(5)
        except OUTAGES as error:
            _log.warning("listening again", error=str(error) or type(error).__name__)
        await asyncio.sleep(_IDLE)


if __name__ == "__main__":
    main("relay", ProcessSettings, lambda settings: scaffold("relay", settings, _resources))
