"""Clients that append and command without rest, send again what they do not know the outcome of, and note it all."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any, Final
from uuid import uuid4

import aiohttp
import msgspec

from fedota.contracts.commands import (
    ApproveParticipation,
    Command,
    CreateProblem,
    Reply,
    RequestParticipation,
    ReviseProblem,
)
from fedota.errors import FedotaError
from fedota.events import EventData, NewEvent, to_json, uuid7
from fedota.events.problems import Plan
from fedota.events.rounds import RoundUpdated
from fedota.kernel.bus import Bus
from fedota.kernel.event_log import Append, Context, EventLog, fingerprint
from tests.faults.ledger import Ledger
from tests.faults.servers import PATIENCE
from tests.faults.stand import Stand
from tests.integration.gateway.conftest import TOKENS

_PASSING: Final = ("unavailable", "timeout")  # the outcome may be unknown: the same again, with the same key
ABOUT: Final[dict[str, Any]] = {
    "name": "n",
    "description": "d",
    "data_format": "f",
    "client_image": "registry.test/i",
    "plan": Plan(rounds=1, goal_count=1),
}
_TIMEOUT: Final = aiohttp.ClientTimeout(total=15)


class Load:
    """Some writers of the log, and some people who send commands, by NATS and by HTTP."""

    def __init__(self, stand: Stand, chance: random.Random, ledger: Ledger, pause: float) -> None:
        self.ledger = ledger
        self._stand = stand
        self._chance = chance
        self._pause = pause
        self._over = asyncio.Event()
        self._named: dict[str, str] = {}  # our name of a problem that was created by HTTP, and the gateway's

    @classmethod
    @asynccontextmanager
    async def on(
        cls, stand: Stand, chance: random.Random, ledger: Ledger | None = None, *, pause: float = 0.02
    ) -> AsyncIterator["Load"]:
        """At work, until the block ends; then everybody has heard of the last thing that they sent."""
        load = cls(stand, chance, ledger or Ledger(), pause)
        async with (
            stand.log("rounds") as log,
            stand.bus("gateway") as bus,
            aiohttp.ClientSession(timeout=_TIMEOUT) as http,
        ):
            people = [load._write(log) for _ in range(3)]
            people += [load._command(lambda *call: load._by_nats(bus, *call))]
            people += [load._command(lambda *call: load._by_http(http, *call))]
            tasks = [asyncio.create_task(one) for one in people]
            try:
                yield load
            finally:
                load._over.set()
                try:
                    async with asyncio.timeout(PATIENCE):
                        await asyncio.gather(*tasks)
                finally:
                    for task in tasks:
                        task.cancel()

    async def goes_on(self, acks: int = 10) -> None:
        """Return when so many more promises were made of each kind: all of it works, from one end to the other."""
        ledger = self.ledger
        appends, commands = len(ledger.acks) + acks, len(ledger.done) + acks
        try:
            async with asyncio.timeout(PATIENCE):
                while len(ledger.acks) < appends or len(ledger.done) < commands:  # noqa: ASYNC110 - a look costs nothing
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(
                f"clients are stuck at {len(ledger.acks)} appends (of {appends}) and {len(ledger.done)} commands"
                f" (of {commands})"
            ) from None

    async def _rest(self) -> None:
        await asyncio.sleep(self._chance.uniform(0, 2 * self._pause))

    async def _write(self, log: EventLog) -> None:
        """Appends to streams of its own, so that it knows the version that it expects."""
        problem_id, version, report = str(uuid4()), 0, 0
        while not self._over.is_set():
            if self._chance.random() < 0.1:
                problem_id, version, report = str(uuid4()), 0, 0
            count = self._chance.choice((1, 1, 2, 5))
            append = an_append([a_report(problem_id, report + number) for number in range(1, count + 1)], version)
            self.ledger.tries(append)
            answer = await persist(lambda append=append: log.append(append))  # type: ignore[misc]
            self.ledger.accepts(append, answer)
            version, report = answer.version, report + count
            if self._chance.random() < 0.1:  # it forgot that it was answered
                with suppress(FedotaError):
                    self.ledger.accepts(append, await log.append(append))
            await self._rest()

    async def _command(self, send: Callable[[Command, str, str], Coroutine[Any, Any, Reply]]) -> None:
        """Publishes problems, and lets organizations in."""
        while not self._over.is_set():
            problem_id = str(uuid4())
            clinics = [f"Clinic {number}" for number in range(self._chance.randint(1, 3))]
            commands: list[Command] = [
                CreateProblem(problem_id=problem_id, **ABOUT),
                ReviseProblem(problem_id=problem_id, name="another"),
                *(RequestParticipation(problem_id=problem_id, organization=clinic) for clinic in clinics),
                *(ApproveParticipation(problem_id=problem_id, organization=clinic) for clinic in clinics),
            ]
            for command in commands:
                if self._over.is_set():
                    return
                actor = "organization" if isinstance(command, RequestParticipation) else "setter"
                key = str(uuid7())
                reply = await persist(lambda call=(command, actor, key): send(*call))  # type: ignore[misc]
                self.ledger.replies(actor, key, reply)
                if self._chance.random() < 0.1:
                    with suppress(FedotaError):
                        self.ledger.replies(actor, key, await send(command, actor, key))
                await self._rest()

    async def _by_nats(self, bus: Bus, command: Command, actor: str, key: str) -> Reply:
        return await bus.command(command, actor=actor, key=key, timeout=5)

    async def _by_http(self, http: aiohttp.ClientSession, command: Command, actor: str, key: str) -> Reply:
        """As a person's program would; the problem's id is the gateway's choice where it creates one."""
        ready = self._stand.running_as("gateway")
        if ready is None:
            raise FedotaError("unavailable", "the gateway is being started")
        method, path, body = _request(command, self._named.get(command.problem_id, ""))
        headers = {"Authorization": f"Bearer {TOKENS[actor]}", "Idempotency-Key": key}
        headers["Content-Type"] = "application/json"
        try:
            async with http.request(method, ready.url + path, data=body, headers=headers) as answer:
                told = await answer.json()
                if answer.status >= 400:
                    raise FedotaError(told["code"], told.get("detail", ""))
                self._named.setdefault(command.problem_id, told.get("problem_id", ""))
                return Reply(position=int(answer.headers["Fedota-Position"]))
        except (aiohttp.ClientError, TimeoutError) as error:
            raise FedotaError("timeout", f"{type(error).__name__}: {error}") from None


def _request(command: Command, problem_id: str) -> tuple[str, str, bytes]:
    path = f"/api/problems/{problem_id}"
    fields = msgspec.structs.asdict(command).items()
    given = {name: value for name, value in fields if value is not None and name != "problem_id"}
    match command:
        case CreateProblem():
            return "POST", "/api/problems", to_json(given)
        case ReviseProblem():
            return "PATCH", path, to_json(given)
        case RequestParticipation():
            return "POST", f"{path}/participations", to_json(given)
        case _:
            return "POST", f"{path}/participations/{given['organization']}/approve", b"{}"


async def persist(ask: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """The answer, asked for again and again while that may help."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                return await ask()
            except FedotaError as error:
                if error.problem.code not in _PASSING:
                    raise
            await asyncio.sleep(0.1)


def a_report(problem_id: str, report: int) -> RoundUpdated:
    """What rounds may record of a problem."""
    return RoundUpdated(
        problem_id=problem_id,
        run=1,
        report=report,
        round=report,
        attempt=1,
        stage="selection",
        goal_count=2,
        minimum_count=2,
    )


def an_append(data: list[EventData], expected: int | None = None) -> Append:
    """These events for the stream of rounds about their problem."""
    return Append(
        subject=f"rounds/{data[0].problem_id}",
        events=[NewEvent(data=one) for one in data],
        context=Context(actor="load", correlation=uuid7()),
        expected=expected,
        fingerprint=fingerprint(*map(to_json, data)),
    )
