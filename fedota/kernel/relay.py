"""The relay copies the log into JetStream so that the stream's sequence is the log's position, always.

It keeps no cursor of its own: the stream's last sequence is the cursor, and `Nats-Expected-Last-Sequence` on each
message or atomic batch makes the server refuse whatever does not fit. Two relays at once, a kill in the middle or a
wiped stream cannot lose, repeat or reorder an event; on any doubt the relay asks the stream again where it stands.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from itertools import accumulate
from typing import Final, NamedTuple

import asyncpg
import msgspec
import nats.errors
import structlog
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import RetentionPolicy, StorageType, StreamConfig
from nats.js.errors import APIError, NotFoundError

from fedota.contracts import subjects
from fedota.errors import FedotaError
from fedota.events import encode, uuid7
from fedota.kernel.bus import Bus
from fedota.kernel.database import connect_pool
from fedota.kernel.event_log import OUTAGES, EventLog, listen
from fedota.kernel.service import Service, main, scaffold
from fedota.kernel.settings import ProcessSettings

_BATCH: Final = 1000  # the server's limit of an atomic batch
_FEW: Final = 8  # events that are confirmed sooner one behind the other: an atomic batch costs several fsyncs
_BATCH_BYTES: Final = 4 * 1024 * 1024
_CONFIRM: Final = 3.0  # seconds that a batch may take; later its fate is read from the stream
_IDLE: Final = 1.0  # seconds between looks at the stream while nothing is appended
_CONFIG: Final = StreamConfig(
    name=subjects.STREAM,
    subjects=[subjects.EVENTS],
    retention=RetentionPolicy.LIMITS,
    storage=StorageType.FILE,
    allow_atomic=True,
    allow_direct=True,
    deny_delete=True,
    deny_purge=True,
    allow_rollup_hdrs=False,
    duplicate_window=1,
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
        await ensure_stream(self._stream)
        self.position = await self._verified_position()
        self.diverged = None
        while True:
            wake.clear()
            if records := await self._log.records(self.position, limit=_BATCH):
                await self._publish(_fitting([Message.of(record) for record in records]))
                continue
            with suppress(TimeoutError):
                await asyncio.wait_for(wake.wait(), _IDLE)
                continue
            if await last_sequence(self._stream) != self.position:
                self.position = await self._verified_position()

    async def _verified_position(self) -> int:
        """The stream's last sequence, after a look that its last event is the log's own at that position."""
        sequence = await last_sequence(self._stream)
        if sequence == 0:
            return 0
        recorded = await self._log.records(sequence - 1, limit=1)
        if not recorded:
            raise DivergedError(
                f"The event stream has {sequence} events, the log only {await self._log.head()}: the log was restored "
                "from an older copy. Restore a newer copy of the log, or delete the stream to let it be rebuilt."
            )
        published = await self._stream.get_msg(subjects.STREAM, seq=sequence, direct=True)
        if published.data != Message.of(recorded[0]).body:
            raise DivergedError(
                f"Log and event stream hold different events at position {sequence}. Find out which one is right; "
                "deleting the stream lets it be rebuilt from the log."
            )
        return sequence

    async def _publish(self, messages: list[Message]) -> None:
        """When anything is unclear the stream says where it stands."""
        publish = publish_few if len(messages) <= _FEW else publish_batch
        try:
            await publish(self._bus, messages, self.position)
            self.position += len(messages)
        except (APIError, nats.errors.Error, TimeoutError) as error:
            _log.warning("not confirmed", after=self.position, error=str(error) or type(error).__name__)
            self.position = await self._verified_position()


async def ensure_stream(stream: JetStreamContext) -> None:
    """Create the stream unless it is there."""
    try:
        await stream.stream_info(subjects.STREAM)
    except NotFoundError:
        await stream.add_stream(_CONFIG)


async def last_sequence(stream: JetStreamContext) -> int:
    """The sequence of the stream's newest message; 0 when it is empty."""
    return (await stream.stream_info(subjects.STREAM)).state.last_seq


async def publish_few(bus: Bus, messages: list[Message], expected: int) -> None:
    """Publish each right behind the one before: where one is refused, so are all after it."""
    replies = await asyncio.gather(
        *(
            bus.client.request(
                message.subject,
                message.body,
                headers={"Nats-Expected-Last-Sequence": str(sequence)},
                timeout=_CONFIRM,
            )
            for sequence, message in enumerate(messages, start=expected)
        )
    )
    for reply in replies:
        _require_stored(reply)


async def publish_batch(bus: Bus, messages: list[Message], expected: int) -> None:
    """Publish all or none, the first right behind sequence `expected` (atomic batches, NATS ADR-50).

    No `Nats-Msg-Id`: a duplicate would reject the whole batch, and the expected sequence guards better.
    """
    batch = uuid7().hex
    for index, message in enumerate(messages, start=1):
        headers = {"Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(index)}
        if index == 1:
            headers["Nats-Expected-Last-Sequence"] = str(expected)
        if index < len(messages):
            await bus.client.publish(message.subject, message.body, headers=headers)
    headers["Nats-Batch-Commit"] = "1"
    _require_stored(await bus.client.request(message.subject, message.body, headers=headers, timeout=_CONFIRM))


def _require_stored(reply: Msg) -> None:
    answer = msgspec.json.decode(reply.data)
    if "error" in answer:
        raise APIError.from_error(answer["error"])


def _fitting(messages: list[Message]) -> list[Message]:
    """As many of the messages as make one batch of bounded bytes, at least one."""
    sizes = accumulate(len(message.body) for message in messages)
    return messages[: max(1, sum(size <= _BATCH_BYTES for size in sizes))]


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
