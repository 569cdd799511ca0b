"""How selectors hand their sums over: at once, or going on where a connection broke."""

import asyncio
import hashlib
import struct
from collections.abc import Callable
from typing import Final

import msgspec
from aiohttp import StreamReader, web

from fedota.errors import FedotaError
from fedota.runtime.coordinator.collector import Collector, Handing
from fedota.runtime.coordinator.training import Training
from fedota.runtime.places import Memory, Spooled
from fedota.runtime.protocol import BYTES, OFFSET, PARTIALS, SUM, Meta
from fedota.runtime.receiving import read_rest
from fedota.runtime.uploads import OffsetError, Upload, drop
from fedota.runtime.web import goes_on_at

MOST_META: Final = 64 * 1024**2  # bytes
_META_SECONDS: Final = 60.0  # in which they have to arrive
_AT_ONCE: Final = 2  # sums that are read at the same time


class Partials:
    """What selectors ask of a coordinator about their sums. An offset counts the bytes before the numbers, too."""

    def __init__(self, training: Callable[[], Training]) -> None:
        self._training = training
        self._turns = asyncio.Semaphore(_AT_ONCE)

    def routes(self) -> list[web.RouteDef]:
        """The addresses."""
        return [web.put(PARTIALS, self.put), web.patch(PARTIALS, self.patch), web.head(PARTIALS, self.head)]

    async def put(self, request: web.Request) -> web.Response:
        """A sum: the length of its `Meta` (8 bytes, little endian), the `Meta` in JSON, the numbers."""
        meta, head = await _beginning(request.content)  # before it has a turn: who falls silent here must not hold one
        await self._take(request, Handing(meta, hashlib.sha256(head).hexdigest(), len(head)), None)
        return web.Response(status=204)

    async def patch(self, request: web.Request) -> web.Response:
        """The rest of a sum that broke off."""
        offset = _offset(request)
        try:
            if (known := _known(self._training().collector, request)) is None:
                raise OffsetError(0)
            await self._take(request, known, offset)
        except OffsetError as error:
            return goes_on_at(error.offset, "The coordinator has {} bytes of this sum.")
        return web.Response(status=204)

    async def head(self, request: web.Request) -> web.Response:
        """How much of a sum is here; all of it when it was taken."""
        if (collector := self._training().collector) is None:
            raise FedotaError("round_over", "No sum is asked for now.")
        received = 0
        if (known := _known(collector, request)) is not None:
            await _require_alone(collector, known.meta.life)
            self._training().require_wanted(known.meta)
            received = known.before + _received(collector, known)
        return web.Response(status=204, headers={OFFSET: str(received)})

    async def _take(self, request: web.Request, sum_: Handing, offset: int | None) -> None:
        """Read a sum, or what is left of it from `offset` on, and add it."""
        collector, life = self._training().require_wanted(sum_.meta), sum_.meta.life
        if request.content_length != sum_.before + collector.size - (offset or 0):
            raise FedotaError("invalid_request", "The sum is not of the model's size.")
        await _require_alone(collector, life)
        async with self._turns:
            await _require_alone(collector, life)  # while it waited, another connection of its selector came
            self._training().require_wanted(sum_.meta)
            if life not in collector.lives:  # else only the answer was lost
                await self._read(request, collector, sum_, offset)

    async def _read(self, request: web.Request, collector: Collector, sum_: Handing, offset: int | None) -> None:
        life = sum_.meta.life
        _require_next(collector, sum_, offset)
        upload = collector.parts.receiving[life] = Upload(request.transport)
        try:
            upload.place = place = collector.parts.taken(life) or collector.place()
            await self._fill(request, collector, sum_.meta, upload, place)
            upload.whole = True
            await self._training().take(sum_.meta, place)
        except BaseException:
            if upload.place is not None:
                drop(upload.place)
            raise
        finally:
            del collector.parts.receiving[life]
            upload.ended.set()

    async def _fill(
        self, request: web.Request, collector: Collector, meta: Meta, upload: Upload, place: Memory | Spooled
    ) -> None:
        """Read what is left. What came before the connection broke or stalled is kept, if it is still waited for."""
        try:
            await read_rest(request, place, place.size - place.received)
        except (ConnectionError, FedotaError) as error:
            if isinstance(error, FedotaError) and error.problem.code != "timeout":
                raise
            await collector.keep(meta.life, place)
            upload.place = None  # it is not ours any more
            if not self._is_wanted(meta):
                collector.parts.forget(meta.life)
            if isinstance(error, FedotaError):
                raise
            raise FedotaError("unavailable", "The sum broke off. Go on with it.") from None  # nobody hears this

    def _is_wanted(self, meta: Meta) -> bool:
        try:
            self._training().require_wanted(meta)
        except FedotaError:
            return False
        return True


def _known(collector: Collector | None, request: web.Request) -> Handing | None:
    """The sum that a request names, if it was begun."""
    name = request.headers.get(SUM)
    return next((one for one in collector.sums.values() if one.name == name), None) if collector else None


def _received(collector: Collector, sum_: Handing) -> int:
    """The bytes of its numbers."""
    return collector.size if sum_.meta.life in collector.lives else collector.parts.received(sum_.meta.life)


async def _require_alone(collector: Collector, life: str) -> None:
    """Raise while a sum comes by another connection that lives, or is being added."""
    while (upload := collector.parts.receiving.get(life)) is not None:
        if not await upload.gives_way():
            raise FedotaError("unavailable", "The sum is on its way by another connection. Ask again.", retry_after=1)


def _require_next(collector: Collector, sum_: Handing, offset: int | None) -> None:
    """Raise unless a sum goes on at `offset`; without one it begins anew, whatever there is of it or of another."""
    life = sum_.meta.life
    if offset is None:
        collector.parts.forget(life)
        collector.sums[life] = sum_
    elif collector.sums[life].name != sum_.name:
        raise OffsetError(0)
    elif offset != (there := sum_.before + _received(collector, sum_)):
        raise OffsetError(there)


async def _beginning(source: StreamReader) -> tuple[Meta, bytes]:
    """What comes before the numbers."""
    try:
        async with asyncio.timeout(_META_SECONDS):
            length = await source.readexactly(8)
            if (count := struct.unpack("<Q", length)[0]) > MOST_META:
                raise FedotaError("too_large", f"What comes before the sum may have {MOST_META} bytes.")
            said = await source.readexactly(count)
            return msgspec.json.decode(said, type=Meta), length + said
    except TimeoutError:
        raise FedotaError("unavailable", "What comes before the sum came too slowly. Hand it over again.") from None
    except (asyncio.IncompleteReadError, msgspec.DecodeError) as error:
        raise FedotaError("invalid_request", f"The sum does not begin as it should: {error}.") from None


def _offset(request: web.Request) -> int:
    text = request.headers.get(OFFSET, "")
    if not BYTES.fullmatch(text):
        raise FedotaError("invalid_request", f"{OFFSET}: send a whole number of bytes, got {text[:40]!r}.")
    return int(text)
