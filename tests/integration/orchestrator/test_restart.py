"""An orchestrator that is killed at any moment: what should run runs once, and nothing else does."""

import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final
from urllib.parse import urlsplit

import asyncpg
import msgspec
import pytest

from fedota.contracts.runtime import SelectorSettings
from fedota.events.orchestrator import InfraDegraded, InfraRecovered, InfraSpawned, InfraStopped
from services.orchestrator.launchers import process
from tests.integration.orchestrator.conftest import COMPONENTS, World, answers
from tests.support.services import new_id, until


def _port(url: str) -> int:
    return urlsplit(url).port or 0


async def _taken(port: int) -> socket.socket | None:
    """A listener there; None while somebody else's connection happens to have the port."""
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError:
        return None


async def test_after_a_kill_all_goes_on_where_it_was(world: World, problem_id: str) -> None:
    """The same addresses and the same secrets: nothing is said, because nothing has changed."""
    first = await world.process()
    spawned = await world.spawned(problem_id)
    secrets = world.secrets(problem_id)
    lives = {world.pid(problem_id, name) for name in COMPONENTS}
    first.kill()
    await first.wait()
    await world.process()  # at once, while what it left is still ending

    async def all_new() -> bool:
        there = all((world.component(problem_id, name) / "ready.json").exists() for name in COMPONENTS)
        return there and not lives & {world.pid(problem_id, name) for name in COMPONENTS}

    await until(all_new, "each component is another process")
    await world.only_run(problem_id)
    for url in (spawned.coordinator, *spawned.selectors):
        assert await until(lambda url=url: answers(url))  # type: ignore[misc]
    assert world.secrets(problem_id) == secrets
    await world.end(problem_id)
    await world.hears(problem_id, InfraSpawned, InfraStopped)


async def test_nobody_is_left_when_it_is_killed(world: World, problem_id: str) -> None:
    """Children end with it, also when nobody starts it again."""
    orchestrator = await world.process()
    await world.spawned(problem_id)
    orchestrator.kill()
    await orchestrator.wait()
    await world.only_run()


async def test_what_ended_while_it_was_away_is_removed(world: World) -> None:
    """A problem that was stopped meanwhile does not come up again, one that was started does."""
    orchestrator = await world.process()
    over, goes_on, new = new_id(), new_id(), new_id()
    await world.spawned(over)
    await world.spawned(goes_on)
    orchestrator.kill()
    await orchestrator.wait()
    await world.end(over)
    await world.start(new)
    await world.process()
    await world.hears(over, InfraSpawned, InfraStopped)
    await world.hears(new, InfraSpawned)
    await world.only_run(goes_on, new)
    await world.hears(goes_on, InfraSpawned)
    assert not (world.namespaces / f"fedota-{over}").exists()


async def test_a_stop_is_no_end(world: World, problem_id: str) -> None:
    """It gives its children time to end and says nothing; the next start brings them back."""
    orchestrator = await world.process()
    spawned = await world.spawned(problem_id)
    orchestrator.send_signal(signal.SIGTERM)
    assert await orchestrator.wait() == 0
    assert world.processes() == {}
    ended = [(world.component(problem_id, name) / "ended").stat().st_mtime_ns for name in COMPONENTS]
    assert ended[0] > max(ended[1:]), "the coordinator is there for its selectors to the end"
    await world.process()
    await world.only_run(problem_id)
    for url in (spawned.coordinator, *spawned.selectors):
        assert await until(lambda url=url: answers(url))  # type: ignore[misc]
    await world.hears(problem_id, InfraSpawned)


@pytest.mark.parametrize("recorded", [False, True])
async def test_killed_between_launch_and_append(world: World, problem_id: str, recorded: bool) -> None:
    """Whether what it was about to say was recorded or not: it is said once, of the addresses that were there."""
    orchestrator = await world.process()
    async with _log_held(world.platform.database_url, world.start(problem_id)) as look:
        await until(look, "the append waits for the log")
        ports = world.ports(problem_id)
        orchestrator.kill()
        await orchestrator.wait()
        if not recorded:
            await look(_TERMINATE)
    await world.only_run()

    async def as_expected() -> bool:
        return len(await world.said(problem_id)) == (1 if recorded else 0)

    await until(as_expected, "what was sent to the log before the kill is recorded, unless it was cut off")
    await world.process()
    [spawned] = await world.hears(problem_id, InfraSpawned)
    assert isinstance(spawned, InfraSpawned)
    assert [_port(url) for url in (spawned.coordinator, *spawned.selectors)] == ports
    await world.only_run(problem_id)


_WAITING: Final = (
    "from pg_stat_activity where usename = 'fedota_orchestrator' and wait_event_type = 'Lock'"
    " and query like '%fedota.append%' and datname = current_database()"
)
_TERMINATE: Final = f"select pg_terminate_backend(pid, 5000) {_WAITING}"
Look = Callable[..., Awaitable[list[Any]]]


@asynccontextmanager
async def _log_held(url: str, after: Awaitable[None]) -> AsyncIterator[Look]:
    """As soon as that is done nothing more can be appended; gives a look at what waits for it."""
    holder, watcher = await asyncpg.connect(url), await asyncpg.connect(url)

    async def look(query: str = f"select pid {_WAITING}") -> list[Any]:
        return await watcher.fetch(query)

    try:
        await after
        async with holder.transaction():
            await holder.execute("select from fedota.head for update")
            yield look
    finally:
        await holder.close()
        await watcher.close()


async def test_an_address_that_was_taken_is_replaced(world: World, problem_id: str) -> None:
    """Selectors hear where their coordinator is now, and so does everybody."""
    orchestrator = await world.process()
    before = await world.spawned(problem_id)
    orchestrator.kill()
    await orchestrator.wait()
    await world.only_run()
    with await until(lambda: _taken(_port(before.coordinator)), "the port can be taken"):
        await world.process()
        _, after = await world.hears(problem_id, InfraSpawned, InfraSpawned)
    assert isinstance(after, InfraSpawned)
    assert after.selectors == before.selectors
    assert after.coordinator != before.coordinator and await answers(after.coordinator)
    told = (world.component(problem_id, "selector-0") / "settings.json").read_bytes()
    assert msgspec.json.decode(told, type=SelectorSettings).coordinator == after.coordinator
    await world.only_run(problem_id)


async def test_what_does_not_come_back_after_a_restart_is_degraded(world: World, problem_id: str) -> None:
    """What people believe to answer and does not is never passed over in silence, nor is the run given up for it."""
    orchestrator = await world.process()
    await world.spawned(problem_id)
    orchestrator.kill()
    await orchestrator.wait()
    told = world.component(problem_id, "selector-1") / "behaviour"
    told.write_text("die")
    await world.process()
    _, degraded = await world.hears(problem_id, InfraSpawned, InfraDegraded)
    assert isinstance(degraded, InfraDegraded)
    assert degraded.reason == "ended by itself with exit code 3"
    told.unlink()
    await world.hears(problem_id, InfraSpawned, InfraDegraded, InfraRecovered)


async def test_two_orchestrators_never_share_a_directory(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one says so and does not start."""
    monkeypatch.setattr(process, "_PATIENCE", 0.2)
    async with world.running():
        with pytest.raises(OSError, match="Another process still uses this"):
            async with world.running():
                raise AssertionError("both run")
