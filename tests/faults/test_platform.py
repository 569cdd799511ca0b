"""The whole platform while its processes are killed with -9 at random moments, and several problems are trained."""

import asyncio
import hashlib
import os
import random
import signal
import sys
from collections import Counter
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import psutil
from safetensors.numpy import load, save_file

from fedota.client.api import Api, LocalFile
from fedota.contracts.runtime import Ready
from fedota.events import Event
from fedota.events.problems import Plan, ProblemCompleted
from fedota.events.rounds import RoundUpdated
from fedota.kernel.files import private_directory, write_private
from fedota.kernel.migrations import PROJECTING
from fedota.kernel.processes import spawn
from fedota.local.external import External
from fedota.local.nats_server import NatsAccess
from fedota.local.platform import MODULES, Platform, running
from fedota.local.programs import READY
from fedota.local.seaweedfs import S3Access
from fedota.local.servers import Servers
from fedota.local.state import Remembered
from tests.contract.ground import ROOT, Ground
from tests.faults.checker import check
from tests.faults.conftest import one_of_each
from tests.faults.ledger import Ledger
from tests.faults.servers import PATIENCE
from tests.support.servers import RunningServers
from tests.support.waiting import until

_PROBLEMS: Final = 2
_CLINICS: Final = ("North", "South")
_RUNTIME: Final = ("coordinator", "selector-0")
_TRAINING: Final = 0.3  # seconds in each round, so that there is something to interrupt
_LONGEST: Final = 280.0  # seconds that a training may take beside the faults
_ABOUT: Final = {"name": "n", "description": "d", "data_format": "f", "client_image": "registry.test/i"}


async def test_every_process_is_killed_while_problems_are_trained(
    tmp_path: Path, chance: random.Random, faults: int
) -> None:
    """All are completed, each command has one effect, and the result is the log's last checkpoint."""
    victims = one_of_each([*MODULES, *_RUNTIME], chance, 2 * faults)
    data = private_directory(tmp_path / "data")
    async with (
        running(data, External(farewell=1.0), lambda _: None) as platform,
        Api.open(platform.gateway_url, platform.tokens["setter"]) as setter,
        AsyncExitStack() as clients,
    ):
        problems = [await _publish(setter, platform, tmp_path, len(victims)) for _ in range(_PROBLEMS)]
        for problem_id in problems:
            await _start(setter, platform, problem_id, tmp_path, clients)
        drafts: set[str] = set()
        drafting = asyncio.create_task(_draft(setter, drafts))
        for victim in victims:
            await asyncio.sleep(chance.uniform(0, 1))
            await _kill(data, victim, chance)
        drafting.cancel()
        with suppress(asyncio.CancelledError):
            await drafting
        for problem_id in problems:
            await until(lambda one=problem_id: _is_over(setter, one), f"{problem_id} is over", _LONGEST)  # type: ignore[misc]
        await until(lambda: _all_well(data), "every process runs", PATIENCE)
        await check(_ground(data), Ledger(), chance, projecting=PROJECTING)
        for problem_id in problems:
            await _check_training(setter, problem_id, tmp_path)
        await _check_drafts(data, drafts)


async def _publish(setter: Api, platform: Platform, directory: Path, faults: int) -> str:
    """A problem with its model, and the clinics in it."""
    model = directory / "model.safetensors"
    save_file({"w": np.zeros(4, "f4")}, model)
    plan = Plan(
        rounds=3 + faults,
        goal_count=len(_CLINICS),
        minimum_fraction=1.0,
        selection_timeout=60,
        report_timeout=60,
        attempts=1000,
        selectors=1,
        client_config={"seconds": _TRAINING},
    )
    problem_id = await setter.create_problem(**_ABOUT, plan=plan)
    await setter.upload(problem_id, [LocalFile(model, "model")])
    async with Api.open(platform.gateway_url, platform.tokens["organization"]) as organization:
        for clinic in _CLINICS:
            await organization.request_participation(problem_id, clinic)
            await setter.approve_participation(problem_id, clinic)
    return problem_id


async def _start(setter: Api, platform: Platform, problem_id: str, directory: Path, clients: AsyncExitStack) -> None:
    """Training goes on, with a client for each clinic."""
    await setter.start(problem_id)

    async def spawned() -> bool:
        infrastructure = (await setter.problem(problem_id))["infrastructure"]
        return bool(infrastructure and infrastructure["state"] == "running")

    await until(spawned, "its infrastructure is there", PATIENCE)
    async with Api.open(platform.gateway_url, platform.tokens["organization"]) as organization:
        for clinic in _CLINICS:
            kit = directory / f"{problem_id}-{clinic}.json"
            write_private(kit, msgspec.json.encode(await organization.kit(problem_id, clinic)))
            argv = [sys.executable, "-m", "tests.faults.client", str(kit)]
            env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            client = await spawn(argv, directory=directory, env=env, log=kit.with_suffix(".log"))
            clients.push_async_callback(client.stop, 5)


async def _draft(setter: Api, drafts: set[str]) -> None:
    """Publish one problem after another."""
    while True:
        sending = asyncio.ensure_future(setter.create_problem(**_ABOUT, plan=Plan(rounds=1, goal_count=1)))
        try:
            drafts.add(await asyncio.shield(sending))
        except asyncio.CancelledError:  # what was sent may be recorded: hear of it
            drafts.add(await sending)
            raise
        await asyncio.sleep(0.05)


async def _kill(data: Path, victim: str, chance: random.Random) -> None:
    """Kill one of that name, and wait until as many run again; where a training is over none of its own runs."""
    places = [path for path in (data / "processes").rglob(READY) if path.parent.name == victim]
    if not places:
        assert victim in _RUNTIME, f"{victim} does not run"
        return
    place = chance.choice(places)
    with suppress(FileNotFoundError, ProcessLookupError):  # it is just being started, or removed
        pid = _pid(place)
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGKILL)
        await until(lambda: _another(place, pid), f"{place} is another process", PATIENCE)


def _pid(place: Path) -> int:
    return msgspec.json.decode(place.read_bytes(), type=Ready).pid


async def _another(place: Path, pid: int) -> bool:
    if place.parent.name in _RUNTIME:
        return True  # its keeper is the orchestrator, and sees to it while we go on
    with suppress(FileNotFoundError):
        return _pid(place) != pid
    return False


async def _is_over(setter: Api, problem_id: str) -> bool:
    found = await setter.problem(problem_id)
    assert found["state"] in ("running", "completed"), found
    return bool(found["state"] == "completed" and found["infrastructure"]["state"] == "stopped")


async def _all_well(data: Path) -> bool:
    places = [data / "processes" / name / READY for name in MODULES]
    return all(place.exists() and psutil.pid_exists(_pid(place)) for place in places)


def _ground(data: Path) -> Ground:
    """The platform's servers, for who may do anything."""
    remembered = msgspec.json.decode((data / "state.json").read_bytes(), type=Remembered)
    ports, secrets = remembered.ports, remembered.secrets
    database = f"postgresql://postgres:{secrets['postgres']}@127.0.0.1:{ports['postgres']}/fedota"
    nats = NatsAccess(f"nats://127.0.0.1:{ports['nats']}", {}, data / "nats" / "operator.seed")
    return Ground(RunningServers.of(Servers(database, nats, S3Access("", "", ""))), database)


async def _check_training(setter: Api, problem_id: str, directory: Path) -> None:
    """Each thing that was asked for happened once; the result is what the last round left, and as many steps away."""
    events = await setter.events(problem_id)
    times = Counter(event.type for event in events)
    once = ("ProblemCreated", "FilesStored", "ProblemStarted", "ProblemCompleted", "InfraStopped")
    assert {name: times[name] for name in once} == dict.fromkeys(once, 1)
    for name in ("ParticipationRequested", "ParticipationApproved"):
        assert times[name] == len(_CLINICS)
    (completed,) = (event.data for event in events if isinstance(event.data, ProblemCompleted))
    rounds = _completed(events)
    assert [update.round for update in rounds] == list(range(1, completed.rounds + 1))
    last = rounds[-1].checkpoint
    assert last and (last.key, last.sha256) == (completed.model.key, completed.model.sha256)
    final = directory / f"{problem_id}.safetensors"
    await setter.download_model(problem_id, final)
    assert hashlib.sha256(final.read_bytes()).hexdigest() == last.sha256
    assert load(final.read_bytes())["w"].tolist() == [float(completed.rounds)] * 4


def _completed(events: list[Event]) -> list[RoundUpdated]:
    updates = [event.data for event in events if isinstance(event.data, RoundUpdated)]
    return [update for update in updates if update.stage == "completed"]


async def _check_drafts(data: Path, drafts: set[str]) -> None:
    """Every problem that somebody was told of is there, once, and no other."""
    async with _ground(data).superuser() as connection:
        rows = await connection.fetch("select subject from fedota.events where type = 'ProblemCreated'")
    created = [row["subject"].partition("/")[2] for row in rows]
    assert len(created) == len(set(created)) == len(drafts) + _PROBLEMS
    assert drafts < set(created)
