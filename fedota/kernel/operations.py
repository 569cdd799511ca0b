"""What a process answers when an operator asks about its projection."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import msgspec
import structlog
from nats.micro.service import Service as MicroService

from fedota.contracts import subjects
from fedota.contracts.operations import DeadLetterRequest, Difference, ProjectionStatus, Work, WorkKind
from fedota.errors import FedotaError
from fedota.events import UnknownEventError, to_json
from fedota.kernel import dead_letters
from fedota.kernel.bus import Answer, Bus, read_request, withdraw
from fedota.kernel.database import Pool
from fedota.kernel.event_log import EventLog, is_outage, log_needed
from fedota.kernel.read_models import Projection
from fedota.kernel.rebuilding import rebuild, verify

Standing = Callable[[], tuple[int, str]]  # the position of the live projection, and why it is stopped if it is
Changed = Callable[[], Awaitable[None]]
_log = structlog.get_logger(__name__)


class _Asked(msgspec.Struct):
    """Who asks for work."""

    actor: str


class Operations:
    """Answers for one projection, and works on one rebuild or verification at a time.

    Only the process that keeps the projection answers: it alone knows how it is.
    """

    def __init__(
        self, projection: Projection, pool: Pool, log: EventLog, bus: Bus, standing: Standing, parked_changed: Changed
    ) -> None:
        self._projection = projection
        self._pool = pool
        self._log = log
        self._bus = bus
        self._standing = standing
        self._parked_changed = parked_changed
        self._one_at_a_time = asyncio.Lock()
        self._answering: MicroService | None = None
        self._work: Work | None = None
        self._working: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Answer from now on, if not already."""
        if self._answering is None:
            asked: dict[str, Callable[[bytes], Awaitable[object]]] = {
                "status": self._status,
                "rebuild": self._rebuild,
                "verify": self._verify,
                "dead_letters": self._dead_letters,
                "retry": self._retry,
                "drop": self._drop,
            }
            process = self._bus.name
            endpoints = {subjects.operation(process, name): _answer(what) for name, what in asked.items()}
            self._answering = await self._bus.answer(endpoints)

    async def stop(self) -> None:
        """Answer no more, and give up what is being worked on."""
        answering, self._answering = self._answering, None
        if answering is not None:
            await withdraw(answering)
        working, self._working = self._working, None
        if working is not None:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)

    async def _status(self, _: bytes) -> ProjectionStatus:
        position, stopped = self._standing()
        return ProjectionStatus(
            process=self._bus.name,
            position=position,
            head=await self._log.head(),
            parked=await dead_letters.count_parked(self._pool),
            stopped=stopped,
            work=self._work,
        )

    async def _rebuild(self, body: bytes) -> ProjectionStatus:
        async def work() -> tuple[int, list[Difference]]:
            return await rebuild(self._projection, self._pool, self._log, self._told), []

        return await self._begin("rebuild", read_request(body, _Asked).actor, work)

    async def _verify(self, body: bytes) -> ProjectionStatus:
        async def work() -> tuple[int, list[Difference]]:
            return await verify(self._projection, self._pool, self._log, self._told)

        return await self._begin("verify", read_request(body, _Asked).actor, work)

    async def _dead_letters(self, _: bytes) -> object:
        return await dead_letters.list_all(self._pool)

    async def _retry(self, body: bytes) -> object:
        request = read_request(body, DeadLetterRequest)
        _log.info("dead letters retried", position=request.position, actor=request.actor)
        async with self._seeing_to_letters():
            return await dead_letters.retry(self._projection, self._pool, request.position)

    async def _drop(self, body: bytes) -> object:
        request = read_request(body, DeadLetterRequest)
        _log.warning("dead letter dropped", position=request.position, actor=request.actor)
        async with self._seeing_to_letters():
            return await dead_letters.drop(self._pool, request.position, request.actor)

    @asynccontextmanager
    async def _seeing_to_letters(self) -> AsyncIterator[None]:
        """One at a time: many that wait for the checkpoint would keep the pool from the reaction of who holds it."""
        async with self._one_at_a_time:
            try:
                yield
            finally:
                await self._parked_changed()

    async def _begin(
        self, kind: WorkKind, actor: str, work: Callable[[], Awaitable[tuple[int, list[Difference]]]]
    ) -> ProjectionStatus:
        if self._working is not None and not self._working.done():
            raise FedotaError("conflict", "The read model is being rebuilt or verified already. Ask again later.")
        _log.info("work on the read model begins", kind=kind, actor=actor)
        self._work = Work(kind=kind, started=datetime.now(UTC))
        self._working = asyncio.create_task(self._do(work), name=kind)
        return await self._status(b"")

    async def _do(self, work: Callable[[], Awaitable[tuple[int, list[Difference]]]]) -> None:
        try:
            rows, differences = await work()
        except Exception as error:
            _log.error("work on the read model failed", exc_info=error)
            self._note(error=_sentence(error))
        except asyncio.CancelledError:
            self._note(error="Its process stopped, or gave the projection to another. Nothing was changed.")
            raise
        else:
            self._note(rows=rows, differences=differences)

    def _told(self, position: int, target: int) -> None:
        assert self._work is not None
        self._work = msgspec.structs.replace(self._work, position=position, target=target)

    def _note(self, *, rows: int = 0, differences: list[Difference] | None = None, error: str = "") -> None:
        assert self._work is not None
        self._work = msgspec.structs.replace(
            self._work, finished=datetime.now(UTC), rows=rows, differences=differences or [], error=error
        )
        _log.info("work on the read model is over", kind=self._work.kind, error=error, rows=rows)


def _answer(what: Callable[[bytes], Awaitable[object]]) -> Answer:
    async def answer(_: str, body: bytes) -> bytes:
        with log_needed():
            return to_json(await what(body))

    return answer


def _sentence(error: Exception) -> str:
    if isinstance(error, FedotaError):
        return error.problem.detail or error.problem.title
    if isinstance(error, (UnknownEventError, msgspec.ValidationError)):
        return f"This program cannot read what is in the log: {error}. Nothing was changed."
    if is_outage(error):
        return "PostgreSQL was not there for all of it. Nothing was changed; begin again."
    return f"{type(error).__name__}, our log says more. Nothing was changed."
