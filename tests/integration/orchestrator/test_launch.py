"""Infrastructure of problems: launched, watched, restarted, given up, removed."""

import os
import signal
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from fedota.contracts.runtime import CoordinatorSettings, SelectorSettings
from fedota.events.orchestrator import InfraDegraded, InfraFailed, InfraRecovered, InfraSpawned, InfraStopped
from fedota.events.problems import ProblemCompleted
from tests.integration.orchestrator.conftest import COMPONENTS, MODEL, World, answers
from tests.support.services import new_id, until


def _mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


async def _metrics(world: World, url: str) -> dict[str, float]:
    text = await world.fetch(f"{url}/metrics")
    return {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if not line.startswith("#")}


async def test_a_started_problem_gets_what_answers(world: World, problem_id: str) -> None:
    """Addresses are told when all of them answer, as what follows from the start."""
    async with world.running() as orchestrator:
        spawned = await world.spawned(problem_id)
        assert (spawned.run, spawned.namespace, spawned.backend) == (1, f"fedota-{problem_id}", "processes")
        assert len(spawned.selectors) == 2
        for url in (spawned.coordinator, *spawned.selectors):
            assert await answers(url)
        await world.only_run(problem_id)
        [started] = await world.platform.events(f"problems/{problem_id}")
        [event] = await world.platform.events(f"orchestrator/{problem_id}")
        assert (event.causation, event.correlation) == (started.id, started.correlation)
        assert event.actor == "service:orchestrator"
        assert "ready" in await world.fetch(f"{orchestrator.url}/readyz")
        metrics = await _metrics(world, orchestrator.url)
        assert (metrics["fedota_namespaces"], metrics["fedota_components"]) == (1, 3)
        assert metrics["fedota_component_deaths_total"] == 0


async def test_what_is_launched_is_told_what_it_needs_and_nothing_else(world: World, problem_id: str) -> None:
    """Secrets in private files, an environment without any, the address of the coordinator for selectors."""
    async with world.running():
        spawned = await world.spawned(problem_id)
        namespace = world.namespaces / spawned.namespace
        directories = [world.namespaces, namespace, *(namespace / name for name in COMPONENTS)]
        assert {_mode(path) for path in directories} == {0o700}
        assert {_mode(path) for path in namespace.rglob("*.json") if path.name != "ready.json"} == {0o600}
        assert {_mode(path) for path in (*namespace.rglob("log"), namespace / "nats.creds")} == {0o600}
        told = (namespace / "coordinator" / "settings.json").read_bytes()
        coordinator = msgspec.json.decode(told, type=CoordinatorSettings)
        assert (coordinator.problem_id, coordinator.run, coordinator.model) == (problem_id, 1, MODEL)
        assert coordinator.nats_url == world.settings.nats_url
        assert Path(coordinator.nats_credentials) == namespace / "nats.creds"
        assert len(coordinator.key) >= 43
        for name in COMPONENTS[1:]:
            selector = msgspec.json.decode((namespace / name / "settings.json").read_bytes(), type=SelectorSettings)
            assert (selector.name, selector.coordinator, selector.key) == (name, spawned.coordinator, coordinator.key)
            assert selector.token_key == world.settings.token_public_key_file.read_text()
        for name in COMPONENTS:
            lines = world.log_of(problem_id, name)
            assert msgspec.json.decode(lines[0])["core"] == [0, 0]
            known = {"LANG", "LC_ALL", "PATH", "PWD", "PYTHONSAFEPATH", "PYTHONUNBUFFERED", "TMPDIR", "TZ", "_"}
            environment = {*msgspec.json.decode(lines[0])["environment"]}
            assert environment - {"OLDPWD", "SHLVL", "LC_CTYPE"} <= known
            argv = psutil.Process(world.pid(problem_id, name)).cmdline()
            assert coordinator.key not in " ".join(argv)


@pytest.mark.parametrize("completed", [False, True])
async def test_what_is_over_leaves_nothing(world: World, problem_id: str, completed: bool) -> None:
    """Processes and directories are gone when `InfraStopped` is said."""
    async with world.running():
        spawned = await world.spawned(problem_id)
        if completed:
            await world.platform.record(ProblemCompleted(problem_id=problem_id, run=1, rounds=1, model=MODEL))
        else:
            await world.end(problem_id)
        _, stopped = await world.hears(problem_id, InfraSpawned, InfraStopped)
        reason = "The training is completed." if completed else "made up"
        assert stopped == InfraStopped(problem_id=problem_id, run=1, namespace=spawned.namespace, reason=reason)
        assert world.processes() == {}
        assert not (world.namespaces / spawned.namespace).exists()
        for url in (spawned.coordinator, *spawned.selectors):
            assert not await answers(url)


async def test_the_next_run_is_another_launch(world: World, problem_id: str) -> None:
    """With another key and another account; what is said of it has its number."""
    async with world.running():
        await world.spawned(problem_id)
        first = world.secrets(problem_id)
        await world.end(problem_id)
        await world.start(problem_id, run=2)
        said = await world.hears(problem_id, InfraSpawned, InfraStopped, InfraSpawned)
        assert [data.run for data in said] == [1, 1, 2]  # type: ignore[attr-defined]
        assert not set(first) & set(world.secrets(problem_id))
        await world.only_run(problem_id)


@pytest.mark.parametrize("name", ["coordinator", "selector-1"])
async def test_what_is_killed_comes_back_where_it_was(world: World, problem_id: str, name: str) -> None:
    """People are told why it died and that it is back; the others are left alone."""
    async with world.running() as orchestrator:
        spawned = await world.spawned(problem_id)
        before = {other: world.pid(problem_id, other) for other in COMPONENTS}
        os.kill(before[name], signal.SIGKILL)
        _, degraded, recovered = await world.hears(problem_id, InfraSpawned, InfraDegraded, InfraRecovered)
        about: dict[str, Any] = {"problem_id": problem_id, "run": 1, "namespace": spawned.namespace, "component": name}
        assert isinstance(degraded, InfraDegraded)
        assert degraded == InfraDegraded(**about, reason="was killed by signal 9", log=degraded.log)
        assert degraded.log == world.log_of(problem_id, name)[:1]
        assert recovered == InfraRecovered(**about)
        for url in (spawned.coordinator, *spawned.selectors):
            assert await answers(url)
        await world.only_run(problem_id)
        after = {other: world.pid(problem_id, other) for other in COMPONENTS}
        assert {other for other in COMPONENTS if before[other] != after[other]} == {name}
        assert (await _metrics(world, orchestrator.url))["fedota_component_deaths_total"] == 1


@pytest.mark.parametrize("hangs", [False, True])
async def test_what_is_not_ready_any_more_is_replaced(world: World, problem_id: str, hangs: bool) -> None:
    """A process that is there and answers nothing, or that it is broken, is as good as dead."""
    async with world.running():
        await world.spawned(problem_id)
        ill = world.component(problem_id, "selector-0") / "ill"
        if hangs:
            os.kill(world.pid(problem_id, "selector-0"), signal.SIGSTOP)
        else:
            ill.write_text('{"failing": {"disk": "it is full"}}')
        _, degraded = await world.hears(problem_id, InfraSpawned, InfraDegraded)
        assert isinstance(degraded, InfraDegraded)
        assert degraded.reason == f"was not ready any more for 6 seconds{'' if hangs else '. It last said: it is full'}"
        ill.unlink(missing_ok=True)
        await world.hears(problem_id, InfraSpawned, InfraDegraded, InfraRecovered)
        await world.only_run(problem_id)


async def test_what_dies_for_long_is_told_once_and_comes_back(world: World, problem_id: str) -> None:
    """Tries between its death and its return are nobody's news."""
    async with world.running():
        await world.spawned(problem_id)
        told = world.component(problem_id, "selector-0") / "behaviour"
        told.write_text("die")
        os.kill(world.pid(problem_id, "selector-0"), signal.SIGKILL)

        async def has_tried() -> bool:
            return world.log_of(problem_id, "selector-0").count("made-up words of one that dies") > 3

        await until(has_tried, "more tries than one that never answered gets")
        await world.hears(problem_id, InfraSpawned, InfraDegraded)
        told.unlink()
        await world.hears(problem_id, InfraSpawned, InfraDegraded, InfraRecovered)


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("hang", "coordinator did not answer for 6 seconds"),
        ("die", "coordinator ended by itself with exit code 3 (3 times in a row, never ready)"),
    ],
)
async def test_what_never_answers_fails_and_holds_up_nobody(
    world: World, problem_id: str, behaviour: str, reason: str
) -> None:
    """People are told why, with its last words; nothing of it is left, and the setter can start again."""
    async with world.running():
        await world.start(problem_id, behaviour=behaviour)
        other = new_id()
        await world.spawned(other)
        if behaviour == "hang":
            assert await world.said(problem_id) == []
        [failed] = await world.hears(problem_id, InfraFailed)
        assert isinstance(failed, InfraFailed)
        assert (failed.run, failed.reason) == (1, reason)
        assert f"made-up words of one that {behaviour}s" in failed.log
        await world.only_run(other)
        await world.is_gone(problem_id)
        await world.end(problem_id)
        await world.hears(problem_id, InfraFailed, InfraStopped)
        await world.start(problem_id, run=2)
        await world.hears(problem_id, InfraFailed, InfraStopped, InfraSpawned)
        await world.only_run(problem_id, other)


async def test_a_namespace_of_no_problem_is_removed(world: World, problem_id: str) -> None:
    """And nothing is said of it, nor anything else in the directory touched."""
    stray = world.component(problem_id, "coordinator")
    stray.mkdir(parents=True)
    (stray / "settings.json").write_text('{"run": 1, "key": "k", "port": 1}')
    other = world.namespaces / "somebody else's"
    other.mkdir()
    async with world.running():
        await world.is_gone(problem_id)
        assert other.exists()
        assert await world.said(problem_id) == []
