"""NATS: commands by request-reply, events by JetStream."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
import nats.errors
import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy
from nats.js.errors import NotFoundError
from nats.micro.request import Request as MicroRequest
from nats.micro.service import Service as MicroService
from nats.micro.service import ServiceConfig

from fedota.contracts import subjects
from fedota.contracts.commands import OWNERS, Command, Reply, Request
from fedota.errors import FedotaError, Problem
from fedota.events import to_json, uuid7

ERROR_HEADER: Final = "Fedota-Error"
_CONCURRENT: Final = 256  # commands at work at once in one process; more are asked to come back
_PULL: Final = 500  # events asked for at once
_WITHDRAW: Final = 2.0  # seconds for NATS to take it in; our ends are closed before
_HEARTBEAT: Final = 1.0  # seconds; a server that was killed is noticed by 2.5 of them
_NO_MESSAGES_STATUS: Final = {"404", "408", "409"}  # a pull request ended: ask again
_NAMED_FIELD: Final = re.compile(r"(?:required|unknown) field `([^`]+)`")
_log = structlog.get_logger(__name__)

C = TypeVar("C", bound=Command)
S = TypeVar("S", bound=msgspec.Struct)
Answer = Callable[[str, bytes], Awaitable[bytes]]
CommandHandler = Callable[[Request, Any], Awaitable[Reply]]


class StreamLostError(Exception):
    """The consumer or its stream is not there any more: start again from the checkpoint."""


class Bus:
    """One process's connection to NATS."""

    def __init__(self, client: Client, name: str) -> None:
        self.client = client
        self.name = name
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    @asynccontextmanager
    async def connect(cls, url: str, name: str, credentials: Path | None = None) -> AsyncIterator["Bus"]:
        """Connected as `name`; requests that are being answered are finished on the way out."""
        client = Client()

        async def on_error(error: Exception) -> None:
            _log.warning("nats", error=str(error) or type(error).__name__)

        await client.connect(
            url,
            name=f"fedota-{name}",
            user_credentials=str(credentials) if credentials else None,
            inbox_prefix=f"_INBOX_{name}".encode(),
            max_reconnect_attempts=-1,
            reconnect_time_wait=0.25,  # type: ignore[arg-type]  # seconds; a float works
            error_cb=on_error,
        )
        bus = cls(client, name)
        try:
            yield bus
        finally:
            await asyncio.gather(*bus._tasks, return_exceptions=True)
            with suppress(nats.errors.Error, TimeoutError):  # a server that has gone cannot be flushed to
                await asyncio.wait_for(client.flush(), 1)
            await client.close()

    async def check(self) -> None:
        """Raise unless NATS answers within a second."""
        if not self.client.is_connected:
            raise FedotaError("unavailable", "NATS is not connected.")
        await self.client.flush(timeout=1)

    async def command(
        self,
        command: Command,
        *,
        actor: str,
        key: str | None = None,
        traceparent: str | None = None,
        timeout: float = 10.0,
    ) -> Reply:
        """Send a command to the service that owns it and wait at most `timeout` seconds for its reply.

        `traceparent` goes on to the events that the command leads to.
        Raises `FedotaError`: the service's own, `unavailable` when nobody answers there, `timeout` when the
        outcome is unknown.
        """
        name = type(command).__name__
        request = Request(
            actor=actor,
            key=key or str(uuid7()),
            correlation=uuid7(),
            deadline=time.time() + timeout,
            command=msgspec.Raw(to_json(command)),
            traceparent=traceparent,
        )
        subject = subjects.command(OWNERS[name][0], name)
        try:
            answer = await self.ask(subject, to_json(request), timeout)
        except nats.errors.NoRespondersError:
            raise FedotaError(
                "unavailable", f"The service that answers {name} is not there. Try again in a moment.", retry_after=2
            ) from None
        except nats.errors.TimeoutError:
            raise FedotaError(
                "timeout", f"{name} was not answered in time. Ask again with the same Idempotency-Key."
            ) from None
        return msgspec.json.decode(answer, type=Reply)

    async def ask(self, subject: str, body: bytes, timeout: float) -> bytes:
        """The answer to a request, waited for at most `timeout` seconds.

        Raises `FedotaError` in the words of who answers, `nats.errors.NoRespondersError` when nobody does there, and
        `nats.errors.TimeoutError`.
        """
        message = await self.client.request(subject, body, timeout=timeout)
        if message.headers and ERROR_HEADER in message.headers:
            raise FedotaError.of(msgspec.json.decode(message.data, type=Problem))
        return message.data

    async def answer(self, endpoints: Mapping[str, Answer]) -> MicroService:
        """Answer requests on each subject as the micro service `name`, many at a time; returns when NATS knows it.

        They are answered until the service that this gives is withdrawn, or the connection is closed.
        """
        config = ServiceConfig(name=f"fedota-{self.name}", version="1.0.0", queue_group=self.name)
        service = MicroService(self.client, config)
        try:
            await service.start()
            for subject, handler in endpoints.items():
                name = subject.replace(".", "-").replace("*", "any")
                await service.add_endpoint(name=name, subject=subject, handler=self._spawning(handler))
            await arrived(self.client)
        except BaseException:  # nobody else could stop it, and it would answer whatever becomes of this process
            await withdraw(service)
            raise
        return service

    async def answer_commands(self, handlers: Mapping[type[Command], CommandHandler]) -> None:
        """Answer these commands."""
        await self.answer(
            {
                subjects.command(self.name, kind.__name__): _command_answer(kind, handler)
                for kind, handler in handlers.items()
            }
        )

    def _spawning(self, handler: Answer) -> Callable[[MicroRequest], Awaitable[None]]:
        """The micro framework runs one request at a time for each endpoint: give each a task of its own."""

        async def spawn(request: MicroRequest) -> None:
            if len(self._tasks) >= _CONCURRENT:
                await _respond_error(request, FedotaError("unavailable", "Too much to do. Try again.", retry_after=1))
                return
            task = asyncio.create_task(_respond(request, handler))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        return spawn

    @asynccontextmanager
    async def consume(self, after: int) -> AsyncIterator["Consumer"]:
        """The events past position `after`, from a consumer that has the process's name.

        The checkpoint lives in Postgres with the rows, so the consumer is made anew from it: nothing that the server
        remembers of an earlier life can disagree.
        """
        stream = self.client.jetstream()
        with suppress(NotFoundError):
            await stream.delete_consumer(subjects.STREAM, self.name)
        await stream.add_consumer(
            subjects.STREAM,
            ConsumerConfig(
                durable_name=self.name,
                ack_policy=AckPolicy.NONE,
                deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
                opt_start_seq=after + 1,
                max_deliver=-1,
                inactive_threshold=300,
            ),
        )
        consumer = Consumer(self.client, self.name)
        subscription = await self.client.subscribe(consumer.inbox, cb=consumer.receive)
        try:
            yield consumer
        finally:
            if not self.client.is_closed:
                await subscription.unsubscribe()


async def withdraw(service: MicroService) -> None:
    """Answer no more requests to this service, also when NATS is not there to be told: then it sends none either."""
    with suppress(nats.errors.Error, TimeoutError):
        async with asyncio.timeout(_WITHDRAW):
            await service.stop()


async def arrived(client: Client) -> None:
    """Return when the server has seen all that was sent.

    The first flush of nats-py overtakes what is pending (its PING is written straight away); the second cannot.
    """
    await client.flush()
    await client.flush()


async def send_frames(client: Client, frames: bytes) -> None:
    """Send what is in the form of NATS's protocol already, in order with what is published.

    nats-py has no public way to do so. Raises what its `publish` raises while nothing can be sent.
    """
    if not client.is_connected:
        raise nats.errors.ConnectionReconnectingError
    await client._send_command(frames)


class Consumer:
    """A pull consumer that asks for more before it has run dry."""

    def __init__(self, client: Client, name: str) -> None:
        self._client = client
        self._next = f"$JS.API.CONSUMER.MSG.NEXT.{subjects.STREAM}.{name}"
        self._queue: asyncio.Queue[Msg] = asyncio.Queue()
        self._wanted = 0
        self.inbox = client.new_inbox()

    async def receive(self, message: Msg) -> None:
        """What NATS delivers, kept until it is fetched."""
        self._queue.put_nowait(message)

    async def fetch(self) -> list[bytes]:
        """The next events as they were published; none once a heartbeat while there are none.

        Raises `StreamLostError` when neither events nor heartbeats come.
        """
        await self._ask()
        try:
            # not asyncio.wait_for: in Python 3.11 that drops a cancellation which meets its result
            async with asyncio.timeout(2.5 * _HEARTBEAT):
                messages = [await self._queue.get()]
        except TimeoutError:
            raise StreamLostError("no heartbeat from the event stream") from None
        while not self._queue.empty() and len(messages) < _PULL:
            messages.append(self._queue.get_nowait())
        return [message.data for message in messages if self._is_event(message)]

    async def _ask(self) -> None:
        if self._wanted > _PULL // 2:
            return
        request = {"batch": _PULL, "expires": int(30e9), "idle_heartbeat": int(_HEARTBEAT * 1e9)}
        await self._client.publish(self._next, msgspec.json.encode(request), self.inbox)
        self._wanted += _PULL

    def _is_event(self, message: Msg) -> bool:
        status = message.headers.get("Status") if message.headers else None
        if status is None:
            self._wanted -= 1
            return True
        if status == "503" or (
            status == "409" and "Consumer Deleted" in (message.headers or {}).get("Description", "")
        ):
            raise StreamLostError("the consumer has gone")
        if status in _NO_MESSAGES_STATUS:
            self._wanted = 0
        return False


def _command_answer(kind: type[C], handler: Callable[[Request, C], Awaitable[Reply]]) -> Answer:
    async def answer(_: str, body: bytes) -> bytes:
        request = msgspec.json.decode(body, type=Request)
        if time.time() > request.deadline:
            raise FedotaError("timeout", "The command came after its deadline and was not begun.")
        try:
            command = msgspec.json.decode(request.command, type=kind)
        except msgspec.ValidationError as error:
            raise invalid_field(error) from None
        return to_json(await handler(request, command))

    return answer


def read_request(body: bytes, kind: type[S]) -> S:
    """The request in a body. Raises `invalid_field`, or `invalid_request` for what is no JSON."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise invalid_field(error) from None
    except msgspec.DecodeError:
        raise FedotaError("invalid_request", "The request is not JSON.") from None


def invalid_field(error: msgspec.ValidationError) -> FedotaError:
    """The field that msgspec found wrong, missing or unknown, by its dotted path."""
    what, _, path = str(error).partition(" - at `$")
    names = [path.rstrip("`").lstrip(".")] if path else []
    if named := _NAMED_FIELD.search(what):
        names.append(named[1])
    field = ".".join(names) or "body"
    return FedotaError(
        "invalid_field", f"{field}: {what}. Correct it and send the request again.", fields={field: what}
    )


async def _respond(request: MicroRequest, handler: Answer) -> None:
    try:
        await request.respond(await handler(request.subject, request.data))
    except FedotaError as error:
        await _respond_error(request, error)
    except Exception:
        # The text of an unforeseen error may hold anything: it goes to our log and not to the caller. A reply that is
        # too large for NATS ends here too.
        _log.exception("request failed", subject=request.subject)
        await _respond_error(request, FedotaError("internal_error", "The request failed; our log says why."))


async def _respond_error(request: MicroRequest, error: FedotaError) -> None:
    try:
        await request.respond(to_json(error.problem), headers={ERROR_HEADER: error.problem.code})
    except Exception:  # the connection has gone: the caller hears nothing, and nobody else would hear of it
        _log.exception("a request could not be answered", subject=request.subject, code=error.problem.code)
