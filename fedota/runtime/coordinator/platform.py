"""What a coordinator asks the platform by NATS, in the problem's own account: resume, presign, report."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final, TypeVar

import msgspec
import nats.errors
import structlog
from nats.aio.client import Client

from fedota.contracts import subjects
from fedota.contracts.runtime import (
    CoordinatorSettings,
    Presigned,
    PresignRequest,
    Report,
    Reported,
    Resume,
    ResumeRequest,
    RevokedOrganizations,
    RevokedRequest,
)
from fedota.errors import FedotaError, Problem
from fedota.events import to_json

_ERROR_HEADER: Final = "Fedota-Error"
_TIMEOUT: Final = 5.0  # seconds
_FIRST_DELAY: Final = 0.1
_LONGEST_DELAY: Final = 5.0
_log = structlog.get_logger(__name__)

A = TypeVar("A")
Trouble = Callable[[str], None]


class Platform:
    """The platform's services, as far as one problem's coordinator may reach them."""

    def __init__(self, client: Client, problem_id: str) -> None:
        self._client = client
        self._problem_id = problem_id

    @classmethod
    @asynccontextmanager
    async def connect(cls, settings: CoordinatorSettings, trouble: Trouble) -> AsyncIterator["Platform"]:
        """Connected, and connected again whenever the connection is lost.

        Tries for ever: `trouble` hears why it is not connected yet.
        """
        client = Client()

        async def on_error(error: Exception) -> None:
            _log.warning("nats", error=str(error) or type(error).__name__)
            why = str(error) if isinstance(error, nats.errors.Error) else type(error).__name__
            trouble(f"NATS cannot be reached ({why}); it is tried again.")

        try:
            await client.connect(
                settings.nats_url,
                name=f"fedota-coordinator-{settings.problem_id}",
                user_credentials=settings.nats_credentials or None,
                max_reconnect_attempts=-1,
                reconnect_time_wait=0.25,  # type: ignore[arg-type]  # seconds; a float works
                error_cb=on_error,
            )
            yield cls(client, settings.problem_id)
        finally:
            with suppress(nats.errors.Error, TimeoutError):  # a server that has gone cannot be flushed to
                await asyncio.wait_for(client.close(), 1)

    async def resume(self, run: int) -> Resume:
        """What was recorded of this run."""
        return await self._ask("resume", ResumeRequest(run=run), Resume)

    async def presign(self, request: PresignRequest) -> Presigned:
        """A URL for one object."""
        return await self._ask("presign", request, Presigned)

    async def report(self, report: Report) -> Reported:
        """Have a report recorded."""
        return await self._ask("report", report, Reported)

    async def revoked(self, run: int) -> RevokedOrganizations:
        """The organizations of whom nothing counts any more, and whether this run was stopped."""
        return await self._ask("revoked", RevokedRequest(run=run), RevokedOrganizations)

    async def _ask(self, verb: str, request: msgspec.Struct, kind: type[A]) -> A:
        """Raises `FedotaError`: the service's own, or `unavailable` when nobody answered."""
        subject = subjects.runtime(self._problem_id, verb)
        try:
            message = await self._client.request(subject, to_json(request), timeout=_TIMEOUT)
        except (nats.errors.Error, TimeoutError) as error:
            raise FedotaError(
                "unavailable", f"NATS did not answer {verb} ({type(error).__name__}); it is asked again."
            ) from None
        if message.headers and _ERROR_HEADER in message.headers:
            raise FedotaError.of(msgspec.json.decode(message.data, type=Problem))
        return msgspec.json.decode(message.data, type=kind)


async def insist(
    attempt: Callable[[], Awaitable[A]],
    *,
    retried: tuple[type[Exception], ...],
    fatal: frozenset[str] = frozenset(),
    trouble: Trouble = lambda _: None,
) -> A:
    """Attempt until it works, ever more slowly; `trouble` hears why it did not.

    Errors that are not `retried`, or whose code is `fatal`, are raised.
    """
    delay = _FIRST_DELAY
    while True:
        try:
            return await attempt()
        except retried as error:
            if isinstance(error, FedotaError) and error.problem.code in fatal:
                raise
            why = str(error) or type(error).__name__
        trouble(why)
        await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311 - only spreads the attempts
        delay = min(2 * delay, _LONGEST_DELAY)
