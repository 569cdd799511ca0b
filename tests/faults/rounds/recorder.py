"""The platform as a coordinator meets it: what the rounds service would record is recorded, presigned URLs are real."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import msgspec
import nats
from nats.aio.client import Client
from nats.aio.msg import Msg

from fedota.contracts import subjects
from fedota.contracts.runtime import Presigned, PresignRequest, Report, Reported, Resume, ResumeRequest
from fedota.errors import FedotaError
from fedota.events import to_json, uuid7
from fedota.events.problems import Plan
from fedota.events.rounds import RoundUpdated
from services.rounds import domain as rounds
from services.storage.blobs import Blobs
from tests.faults.servers import PATIENCE

_AGAIN: Final = 0.05  # seconds
_VERBS: Final = {"rounds": ("report", "resume"), "storage": ("presign",)}
Hook = Callable[[RoundUpdated], Awaitable[None]]


async def _nothing(_: RoundUpdated) -> None:
    """Nobody looks."""


class Recorder:
    """What is recorded of one run, by the rounds service's own rules.

    `before` and `after` are called when a report has come, and when it is recorded but not answered yet.
    """

    def __init__(self, problem_id: str, plan: Plan, members: list[str], blobs: Blobs) -> None:
        self.reports: list[RoundUpdated] = []
        self.before: Hook = _nothing
        self.after: Hook = _nothing
        self.faults: list[str] = []  # what a coordinator must not ask
        self._problem_id = problem_id
        self._blobs = blobs
        run = rounds.Run(number=1, plan=plan, cause=uuid7(), correlation=uuid7())
        self._state = rounds.State(run=run, members=dict.fromkeys(members, True))
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def answering(self, url: str, keys: dict[str, Path]) -> AsyncIterator["Recorder"]:
        """At the coordinator's disposal, again and again however often NATS goes away."""
        there = [asyncio.Event() for _ in _VERBS]
        tasks = [
            asyncio.create_task(self._stay(url, keys[name], verbs, event))
            for event, (name, verbs) in zip(there, _VERBS.items(), strict=True)
        ]
        try:
            for event in there:
                await asyncio.wait_for(event.wait(), PATIENCE)
            yield self
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _stay(self, url: str, key: Path, verbs: tuple[str, ...], there: asyncio.Event) -> None:
        """Connected anew each time: the client's own reconnecting leaves sockets behind."""
        while True:
            client = Client()
            try:
                await self._connect(client, url, key, verbs)
                there.set()
                while client.is_connected:  # noqa: ASYNC110 - its callbacks are not always called when it is lost
                    await asyncio.sleep(_AGAIN)
            except (OSError, nats.errors.Error, TimeoutError):
                await asyncio.sleep(_AGAIN)
            finally:
                await client.close()
                if client._transport is not None:  # where it failed half-way, it is still open
                    client._transport.close()  # type: ignore[no-untyped-call]

    async def _connect(self, client: Client, url: str, key: Path, verbs: tuple[str, ...]) -> None:
        async def ignore(_: Exception) -> None:
            """It is connected again."""

        await client.connect(
            url,
            user_credentials=str(key),
            allow_reconnect=False,
            reconnect_time_wait=_AGAIN,  # type: ignore[arg-type]  # seconds; a float works
            error_cb=ignore,
        )
        for verb in verbs:
            await client.subscribe(subjects.runtime(self._problem_id, verb), cb=self._taker(client, verb))
        await client.flush()

    def _taker(self, client: Client, verb: str) -> Callable[[Msg], Awaitable[None]]:
        answer = {"report": self._report, "resume": self._resume, "presign": self._presign}[verb]

        async def take(message: Msg) -> None:
            body, headers = b"", None
            try:
                body = to_json(await answer(message.data))
            except FedotaError as error:
                self.faults.append(f"{verb}: {error.problem.code}: {error.problem.detail}")
                body, headers = to_json(error.problem), {"Fedota-Error": error.problem.code}
            with suppress(nats.errors.Error):  # the line is gone, and the answer with it
                await client.publish(message.reply, body, headers=headers)

        return take

    async def _report(self, data: bytes) -> Reported:
        update = msgspec.json.decode(data, type=Report).update
        await self.before(update)
        async with self._turn:
            if not self._is_there(update):
                self.reports += rounds.decide(self._state, self.reports[-1] if self.reports else None, update)
        await self.after(update)
        return Reported(position=update.report, revoked=self._state.revoked)

    def _is_there(self, update: RoundUpdated) -> bool:
        return 0 < update.report <= len(self.reports) and self.reports[update.report - 1] == update

    async def _resume(self, data: bytes) -> Resume:
        return rounds.resume(self._state, msgspec.json.decode(data, type=ResumeRequest).run, self.reports[::-1])

    async def _presign(self, data: bytes) -> Presigned:
        wanted = msgspec.json.decode(data, type=PresignRequest)
        place = "checkpoints" if wanted.method == "PUT" else ""
        if not wanted.key.startswith(f"problems/{self._problem_id}/{place}"):
            raise FedotaError("forbidden", f"{wanted.key} is not the problem's.")
        signed = (
            self._blobs.presign_get(wanted.key)
            if wanted.method == "GET"
            else self._blobs.presign_put(wanted.key, size=wanted.size, sha256=wanted.sha256)
        )
        return Presigned(url=signed.url, headers=signed.headers)

    @property
    def final(self) -> RoundUpdated | None:
        """The run's last report, when there is one."""
        return self.reports[-1] if self.reports and self.reports[-1].final else None

    @property
    def completed(self) -> list[RoundUpdated]:
        """The reports of completed rounds."""
        return [one for one in self.reports if one.stage == "completed"]
