"""The log as people see it: pages of events, and a live stream that goes on where it broke off."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import aclosing, contextmanager
from datetime import datetime
from functools import cached_property
from typing import Any, Final, NamedTuple

import asyncpg
import msgspec
import structlog
from aiohttp import web

from fedota.errors import FedotaError
from fedota.events import CATALOGUE, encode, to_json
from fedota.kernel.event_log import OUTAGES, EventLog
from fedota.kernel.projection import Projector
from gateway.people import PEOPLE

_PAGE: Final = 500  # events read at once
_QUEUE: Final = 1000  # events that wait for one slow reader; with more it goes back to reading the log
_WATCHERS: Final = 2000  # streams at once
_WRITE_SECONDS: Final = 30.0  # a reader that takes nothing for so long has gone
_LARGE: Final = 1 << 15  # bytes of an event after which others have their turn before the next
_LOGGING: Final = frozenset(name for name, kind in CATALOGUE.items() if "log" in kind.data.__struct_fields__)
_CONTRIBUTED: Final = frozenset(
    name for name, kind in CATALOGUE.items() if "contributions" in kind.data.__struct_fields__
)
_OWNERS: Final = ("problems", "storage", "orchestrator", "rounds")
_HEADERS: Final = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",  # nginx holds events back without it
}
_log = structlog.get_logger(__name__)


class Eyes(NamedTuple):
    """What a reader may see: logs of the infrastructure, and contributions of one `organization` or of all (None)."""

    logs: bool
    organization: str | None = None


class _Giver(msgspec.Struct):
    """Whose contribution it is."""

    organization: str


_giver: Final = msgspec.json.Decoder(_Giver).decode


class _Report:
    """A round's report as each organization sees it; taken apart once, when the first of them asks."""

    def __init__(self, full: bytes) -> None:
        self._full = full

    def of(self, organization: str) -> bytes:
        """The event without what other organizations gave."""
        event, data, given = self._parts
        if not given:  # most reports are of rounds that go on
            return self._full
        own = [given[organization]] if organization in given else []
        return to_json({**event, "data": {**data, "contributions": own}})

    @cached_property
    def _parts(self) -> tuple[dict[str, msgspec.Raw], dict[str, msgspec.Raw], dict[str, msgspec.Raw]]:
        """The event, its data, and its contributions by organization, none of them decoded further."""
        event = msgspec.json.decode(self._full, type=dict[str, msgspec.Raw])
        data = msgspec.json.decode(event["data"], type=dict[str, msgspec.Raw])
        given = msgspec.json.decode(data.get("contributions", b"[]"), type=list[msgspec.Raw])
        return event, data, {_giver(one).organization: one for one in given}


class Item(NamedTuple):
    """An event on its way to a reader."""

    position: int
    type: str
    subject: str
    actor: str
    time: datetime
    full: bytes
    public: bytes  # without what the infrastructure's processes wrote
    report: _Report | None  # of what tells contributions

    @classmethod
    def of(cls, row: asyncpg.Record) -> "Item":
        """The item of a row of the log."""
        record = dict(row)
        full = encode(record)
        public = encode({**record, "data": _without_log(record["data"])}) if record["type"] in _LOGGING else full
        who = record["subject"], record["actor"], record["time"]
        report = _Report(full) if record["type"] in _CONTRIBUTED else None
        return cls(record["position"], record["type"], *who, full, public, report)

    def body(self, eyes: Eyes) -> bytes:
        """The event as a reader may see it."""
        if self.report and eyes.organization is not None:
            return self.report.of(eyes.organization)
        return self.full if eyes.logs else self.public

    def frame(self, eyes: Eyes) -> bytes:
        """The event in the form of server-sent events."""
        head = f"id: {self.position}\nevent: {self.type}\ndata: ".encode()
        return head + self.body(eyes) + b"\n\n"


def _without_log(data: bytes) -> bytes:
    return to_json({**msgspec.json.decode(data), "log": []})


async def seen(items: Iterable[Item], see: Callable[[Item], bytes]) -> list[bytes]:
    """What `see` makes of each; however many and large they are, nobody else waits for more than one of them."""
    found = []
    for item in items:
        found.append(see(item))
        if len(item.full) > _LARGE:
            await asyncio.sleep(0)
    return found


def streams_of(problem_id: str) -> list[str]:
    """The log's streams that are about one problem."""
    return [f"{owner}/{problem_id}" for owner in _OWNERS]


class Filter(NamedTuple):
    """Which events a reader asks for, recorded at `since` or later and before `before`; None stands for all."""

    problem_id: str | None = None
    types: tuple[str, ...] | None = None
    actor: str | None = None
    until: int | None = None
    since: datetime | None = None
    before: datetime | None = None

    @property
    def question(self) -> dict[str, Any]:
        """The same as the log is asked it."""
        named = self._asdict()
        problem_id = named.pop("problem_id")
        return {**named, "subjects": streams_of(problem_id) if problem_id else None}

    def fits(self, item: Item) -> bool:
        """Whether an event that has just happened is asked for; the stream knows no end, so that none is looked at."""
        return (
            (self.problem_id is None or item.subject.partition("/")[2] == self.problem_id)
            and (self.types is None or item.type in self.types)
            and (self.actor is None or item.actor == self.actor)
            and (self.since is None or item.time >= self.since)
        )


class Page(NamedTuple):
    """Some events, and the position up to which nothing was left out of them."""

    items: list[Item]
    reached: int


class _Watcher:
    """One reader's place in the feed: what waits for it, and whether that overflowed."""

    def __init__(self, wanted: Filter) -> None:
        self._wanted = wanted
        self._items: list[Item] = []
        self._wake = asyncio.Event()
        self.overflowed = False

    def offer(self, items: list[Item]) -> None:
        """Keep what concerns this reader; when it is too much, keep nothing and say so."""
        fitting = [item for item in items if self._wanted.fits(item)]
        if len(self._items) + len(fitting) > _QUEUE:
            self._items.clear()
            self.overflowed = True
        elif not self.overflowed:
            self._items.extend(fitting)
        if fitting:
            self._wake.set()

    def wake(self) -> None:
        """End the wait of `take`."""
        self._wake.set()

    async def take(self, timeout: float) -> list[Item]:
        """What has come, or nothing after `timeout` seconds."""
        try:
            await asyncio.wait_for(self._wake.wait(), timeout)
        except TimeoutError:
            return []
        self._wake.clear()
        items, self._items = self._items, []
        return items


class Feed:
    """Reads each new event once, however many people watch, and hands it to those that it concerns."""

    def __init__(self, log: EventLog, projector: Projector) -> None:
        self._log = log
        self._projector = projector
        self._watchers: set[_Watcher] = set()
        self._position = 0  # the watchers have been told of everything up to here
        self.closed = False

    @property
    def watchers(self) -> int:
        """How many streams are open."""
        return len(self._watchers)

    def close(self) -> None:
        """End every stream."""
        self.closed = True
        for watcher in self._watchers:
            watcher.wake()

    async def run(self) -> None:
        """Hand on what the read model has just taken in: who is told of an event can already read its effect."""
        self._position = self._projector.position
        while True:
            try:
                await self._projector.wait_for(self._position + 1, timeout=60)
                reached = self._projector.position
                if not self._watchers:  # whoever comes reads the log first, and misses nothing
                    self._position = reached
                    continue
                # the log may be ahead of the read model; positions have no gaps
                records = await self._log.records(self._position, limit=min(_PAGE, reached - self._position))
            except FedotaError:
                continue  # nothing happened for a minute
            except OUTAGES:
                await asyncio.sleep(1)
                continue
            items = [Item.of(record) for record in records]
            for watcher in self._watchers:
                watcher.offer(items)
            self._position = items[-1].position

    async def page(self, wanted: Filter, after: int, limit: int) -> Page:
        """Events past position `after`, as far as the log goes: the read model may not have them yet.

        What is rare is looked for in portions: a page may be empty and yet have moved on.
        """
        if not limit:
            return Page([], after)
        scanned = await self._log.scan(after, limit=limit, **wanted.question)
        return Page([Item.of(record) for record in scanned.records], scanned.reached)

    async def event(self, position: int) -> Item | None:
        """The event at one position."""
        records = await self._log.records(position - 1, limit=1, until=position)
        return Item.of(records[0]) if records else None

    async def head(self) -> int:
        """The position of the newest event."""
        return await self._log.head()

    async def follow(self, wanted: Filter, after: int, heartbeat: float) -> AsyncGenerator[list[Item], None]:
        """Events past `after`, each once and in order; an empty list is a sign of life. Ends when the feed closes."""
        with self._watch(wanted) as watcher:
            yield []
            while not self.closed:
                # the watcher collects already while the log is read: nothing falls between the two
                watcher.overflowed = False
                while (page := await self._page_of_the_past(wanted, after)).reached > after and not self.closed:
                    after = page.reached
                    yield page.items
                while not (self.closed or watcher.overflowed):
                    items = [item for item in await watcher.take(heartbeat) if item.position > after]
                    after = items[-1].position if items else after
                    yield items

    async def _page_of_the_past(self, wanted: Filter, after: int) -> Page:
        """Events that the read model has already; what comes after them reaches the watchers."""
        # a crash of PostgreSQL can take the read model back behind what the watchers were told: nobody tells that again
        reached = max(self._projector.position, self._position)
        return await self.page(wanted._replace(until=reached), after, _PAGE)

    @contextmanager
    def _watch(self, wanted: Filter) -> Iterator[_Watcher]:
        if len(self._watchers) >= _WATCHERS:
            raise FedotaError("unavailable", "Too many event streams are open. Try again in a minute.", retry_after=60)
        watcher = _Watcher(wanted)
        self._watchers.add(watcher)
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)


async def send(
    request: web.Request, batches: AsyncGenerator[list[Item], None], *, eyes: Eyes, welcome: Callable[[], bool]
) -> web.StreamResponse:
    """Write a stream until its reader goes away, is not `welcome` any more, or the gateway stops."""
    async with aclosing(batches):
        await anext(batches)  # a refusal still is an ordinary response
        response = web.StreamResponse(headers=_HEADERS)
        await response.prepare(request)
        await response.write(b"retry: 2000\n: connected\n\n")
        async for items in batches:
            if not welcome():
                break
            frames = b"".join(await seen(items, lambda item: item.frame(eyes))) or b": alive\n\n"
            try:
                frames = await request.app[PEOPLE].in_json(frames)
                async with asyncio.timeout(_WRITE_SECONDS):
                    await response.write(frames)
            except FedotaError:  # names cannot be opened now: whoever comes back goes on from here
                break
            except (TimeoutError, ConnectionError):
                _log.debug("a reader of the event stream has gone")
                if request.transport is not None:  # ending it politely would wait for that reader, for ever
                    request.transport.abort()
                break
    return response
