"""A coordinator's way to the platform: NATS, in its problem's own account."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import nats
from nats.aio.client import Client

from fedota.contracts import subjects
from fedota.contracts.runtime import (
    Report,
    Reported,
    Resume,
    ResumeRequest,
    RevokedOrganizations,
    RevokedRequest,
)
from fedota.errors import FedotaError, Problem
from fedota.events import to_json
from fedota.events.rounds import RoundUpdated
from fedota.kernel.bus import ERROR_HEADER
from fedota.kernel.files import write_private
from fedota.kernel.nats_accounts import Operator, push_account
from tests.support.servers import RunningServers


class Coordinator:
    """What a coordinator asks the platform, one request at a time."""

    def __init__(self, client: Client, problem_id: str) -> None:
        self._client = client
        self.problem_id = problem_id

    @classmethod
    @asynccontextmanager
    async def connect(cls, servers: RunningServers, problem_id: str, directory: Path) -> AsyncIterator["Coordinator"]:
        """In an account that is made and pushed as the orchestrator does it; credentials lie in `directory`."""
        minted = Operator.read(servers.nats_operator).problem_account(problem_id, platform=servers.platform_account)
        credentials = directory / f"{problem_id}.creds"
        write_private(credentials, minted.credentials.encode())
        system = await nats.connect(
            servers.nats_url, user_credentials=str(servers.nats_keys["system"]), inbox_prefix=b"_INBOX_system"
        )
        try:
            await push_account(system, minted.jwt)
        finally:
            await system.close()
        client = await nats.connect(servers.nats_url, user_credentials=str(credentials))
        try:
            yield cls(client, problem_id)
        finally:
            await client.close()

    async def ask(self, verb: str, body: bytes, timeout: float = 15) -> bytes:
        """The answer to a request on the problem's own subject. Raises what it was refused with."""
        message = await self._client.request(subjects.runtime(self.problem_id, verb), body, timeout=timeout)
        if message.headers and ERROR_HEADER in message.headers:
            raise FedotaError.of(msgspec.json.decode(message.data, type=Problem))
        return message.data

    async def report(self, update: RoundUpdated, timeout: float = 15) -> int:
        """Say how the round is; the position that it was recorded at."""
        return (await self.reported(update, timeout)).position

    async def reported(self, update: RoundUpdated, timeout: float = 15) -> Reported:
        """Say how the round is, and hear what is new."""
        answer = await self.ask("report", to_json(Report(update=update)), timeout)
        return msgspec.json.decode(answer, type=Reported)

    async def revoked(self, run: int = 1) -> RevokedOrganizations:
        """Ask of whom nothing counts any more, and whether the run goes on."""
        answer = await self.ask("revoked", to_json(RevokedRequest(run=run)))
        return msgspec.json.decode(answer, type=RevokedOrganizations)

    async def resume(self, run: int = 1) -> Resume:
        """Ask where to go on."""
        return msgspec.json.decode(await self.ask("resume", to_json(ResumeRequest(run=run))), type=Resume)
