"""What a problem's credentials open, and for how long."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import nats.errors
import pytest
from nats.aio.client import Client

from fedota.contracts import subjects
from fedota.contracts.runtime import Resume, ResumeRequest
from fedota.events import to_json
from fedota.events.orchestrator import InfraSpawned, InfraStopped
from services.orchestrator.launchers.accounts import SharedCredentials
from tests.integration.orchestrator.conftest import World
from tests.support.services import new_id, until


@asynccontextmanager
async def _connected(world: World, credentials: Path, errors: list[Exception]) -> AsyncIterator[Client]:
    async def note(error: Exception) -> None:
        errors.append(error)

    client = Client()
    try:
        await client.connect(
            world.settings.nats_url, user_credentials=str(credentials), error_cb=note, allow_reconnect=False
        )
        yield client
    finally:
        await client.close()


async def _resume(client: Client, problem_id: str) -> Resume:
    subject = subjects.runtime(problem_id, "resume")
    reply = await client.request(subject, to_json(ResumeRequest(run=1)), timeout=1)
    return msgspec.json.decode(reply.data, type=Resume)


async def test_credentials_are_good_for_one_problem_until_it_is_over(world: World, problem_id: str) -> None:
    """Its own subject is answered, another problem's is refused, and with the run's end the connection is cut."""
    asked: list[str] = []

    async def resume(subject: str, _: bytes) -> bytes:
        asked.append(subject)
        return to_json(Resume(report=7))

    other = new_id()
    errors: list[Exception] = []
    async with world.running(), world.platform.bus("rounds") as rounds:
        await rounds.answer({subjects.runtime("*", "resume"): resume})
        spawned = await world.spawned(problem_id)
        await world.spawned(other)
        kept = world.directory / "kept.creds"
        shutil.copy(world.namespaces / spawned.namespace / "nats.creds", kept)
        async with _connected(world, kept, errors) as client:
            assert (await _resume(client, problem_id)).report == 7
            with pytest.raises((nats.errors.TimeoutError, nats.errors.NoRespondersError)):
                await _resume(client, other)
            assert asked == [subjects.runtime(problem_id, "resume")]
            assert "permissions violation" in str(errors[0]).lower()
            await world.end(problem_id)
            await world.hears(problem_id, InfraSpawned, InfraStopped)

            async def cut() -> bool:
                return client.is_closed

            await until(cut, "the connection is cut")
        with pytest.raises(nats.errors.Error):
            async with asyncio.timeout(5), _connected(world, kept, errors):
                raise AssertionError("the account is still good")


async def test_shared_credentials_are_copied(tmp_path: Path) -> None:
    """Without operator mode each namespace has a private copy; nothing is taken away from the others."""
    shared = tmp_path / "shared.creds"
    accounts = SharedCredentials(shared)
    with pytest.raises(FileNotFoundError):
        await accounts.check()
    shared.write_text("made-up")
    await accounts.check()
    namespace = tmp_path / "namespace"
    namespace.mkdir()
    granted = await accounts.grant(new_id(), namespace)
    assert (granted.read_text(), granted.stat().st_mode & 0o777, granted.parent) == ("made-up", 0o600, namespace)
    await accounts.revoke(namespace)
    assert shared.exists()
