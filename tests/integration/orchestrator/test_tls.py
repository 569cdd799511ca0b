"""Selectors that can be reached from elsewhere: by TLS, with certificates of an authority of the launch's own."""

import hashlib
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import aiohttp
import msgspec
import pytest
from cryptography import x509

from fedota.contracts.runtime import SelectorSettings
from fedota.events.orchestrator import InfraDegraded, InfraRecovered, InfraSpawned, InfraStopped
from fedota.events.problems import ModelFile, Plan, ProblemStarted
from fedota.tls import client_context
from services.orchestrator.app import create_app
from services.orchestrator.launchers.authority import DIRECTORY
from tests.integration.orchestrator.conftest import World, answers
from tests.integration.orchestrator.run import PACE
from tests.integration.orchestrator.test_runtime import _WEIGHTS, _storage_and_rounds
from tests.support.services import running, until


async def _start(world: World, problem_id: str, run: int = 1) -> None:
    digest = hashlib.sha256(_WEIGHTS).hexdigest()
    model = ModelFile(key=f"problems/{problem_id}/files/model", sha256=digest, size=len(_WEIGHTS))
    plan = Plan(rounds=1, goal_count=1, selectors=2)
    await world.platform.record(ProblemStarted(problem_id=problem_id, run=run, plan=plan, model=model))


async def _answers(spawned: InfraSpawned) -> bool:
    """Whether each selector answers who trusts the authority alone."""
    connector = aiohttp.TCPConnector(ssl=client_context(spawned.authority))
    async with aiohttp.ClientSession(connector=connector) as http:
        for url in spawned.selectors:
            try:
                async with http.get(f"{url}/readyz") as reply:
                    if reply.status != 200:
                        return False
            except aiohttp.ClientConnectionError:
                return False
    return True


def _private_keys(directory: Path) -> Iterator[Path]:
    """The files that hold one."""
    for path in directory.rglob("*"):
        if path.is_file() and b"PRIVATE KEY" in path.read_bytes():
            yield path.relative_to(directory)


def _reachable(world: World) -> None:
    world.settings = msgspec.structs.replace(world.settings, selectors_bind="0.0.0.0")


async def test_selectors_have_certificates_of_the_launch(world: World, problem_id: str) -> None:
    """They are told with their authority, keep it over every death, and leave nothing of it."""
    _reachable(world)
    async with _storage_and_rounds(world):
        async with running(partial(create_app, pace=PACE), world.settings):
            await _start(world, problem_id)
            [spawned] = await world.hears(problem_id, InfraSpawned)
            assert isinstance(spawned, InfraSpawned)
            assert all(url.startswith("https://127.0.0.1:") for url in spawned.selectors)
            assert await answers(spawned.coordinator)
            assert await _answers(spawned)
            namespace = world.namespaces / spawned.namespace
            assert set(_private_keys(namespace)) == {
                Path(DIRECTORY) / "key.pem",
                Path("selector-0") / "tls.pem",
                Path("selector-1") / "tls.pem",
            }
            own = (namespace / DIRECTORY / "key.pem").read_bytes()
            for name in ("selector-0", "selector-1"):
                told = (namespace / name / "settings.json").read_bytes()
                selector = msgspec.json.decode(told, type=SelectorSettings)
                assert (selector.host, selector.address) == ("0.0.0.0", "127.0.0.1")
                path = Path(selector.certificate)
                assert (path, path.stat().st_mode & 0o777) == (namespace / name / "tls.pem", 0o600)
                assert own not in path.read_bytes()
            os.kill(world.pid(problem_id, "selector-0"), signal.SIGKILL)
            await world.hears(problem_id, InfraSpawned, InfraDegraded, InfraRecovered)
            assert await _answers(spawned)
        async with running(partial(create_app, pace=PACE), world.settings):
            await until(lambda: _answers(spawned), "the selectors are back with the same authority")
            await world.hears(problem_id, InfraSpawned, InfraDegraded, InfraRecovered)
            await world.end(problem_id)
            await world.hears(problem_id, InfraSpawned, InfraDegraded, InfraRecovered, InfraStopped)
            assert not namespace.exists()


async def test_each_start_has_an_authority_of_its_own(world: World, problem_id: str) -> None:
    """What was trusted in one is not in the next; and another authority is told, for whoever fetches a kit."""
    _reachable(world)
    async with _storage_and_rounds(world), running(partial(create_app, pace=PACE), world.settings):
        await _start(world, problem_id)
        await world.hears(problem_id, InfraSpawned)
        await world.end(problem_id)
        await world.hears(problem_id, InfraSpawned, InfraStopped)
        await _start(world, problem_id, run=2)
        first, _, second = await world.hears(problem_id, InfraSpawned, InfraStopped, InfraSpawned)
        assert isinstance(first, InfraSpawned) and isinstance(second, InfraSpawned)
        assert first.authority != second.authority
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            async with (
                aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=client_context(first.authority))) as http,
                http.get(second.selectors[0]),
            ):
                pass


async def test_selectors_move_while_a_training_runs(world: World, problem_id: str) -> None:
    """To where they can be reached from elsewhere: what is told then is for whoever fetches a kit from then on."""
    async with _storage_and_rounds(world):
        async with running(partial(create_app, pace=PACE), world.settings):
            await _start(world, problem_id)
            await world.hears(problem_id, InfraSpawned)
        _reachable(world)
        async with running(partial(create_app, pace=PACE), world.settings):
            first, second = await world.hears(problem_id, InfraSpawned, InfraSpawned)
            assert isinstance(first, InfraSpawned) and isinstance(second, InfraSpawned)
            assert (first.authority, first.coordinator) == ("", second.coordinator)
            assert second.selectors == [url.replace("http:", "https:") for url in first.selectors]
            assert await _answers(second)


async def test_certificates_are_renewed_in_time(world: World, problem_id: str) -> None:
    """In the file that a selector looks at, by an authority that stays the same."""
    _reachable(world)
    pace = PACE._replace(renewal=0.0)
    async with _storage_and_rounds(world), running(partial(create_app, pace=pace), world.settings):
        await _start(world, problem_id)
        [spawned] = await world.hears(problem_id, InfraSpawned)
        assert isinstance(spawned, InfraSpawned)
        path = world.component(problem_id, "selector-0") / "tls.pem"
        first = x509.load_pem_x509_certificate(path.read_bytes())

        async def renewed() -> x509.Certificate | None:
            found = x509.load_pem_x509_certificate(path.read_bytes())
            return found if found != first else None

        second: x509.Certificate = await until(renewed, "the certificate is renewed")
        second.verify_directly_issued_by(x509.load_pem_x509_certificate(spawned.authority.encode()))
        assert second.not_valid_after_utc >= first.not_valid_after_utc
        await world.hears(problem_id, InfraSpawned)
        assert await _answers(spawned)
