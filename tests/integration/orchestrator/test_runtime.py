"""The launch contract, with the real coordinator and selectors."""

import asyncio
import hashlib
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

import numpy as np
from aiohttp import web
from safetensors.numpy import save

from fedota.contracts import subjects
from fedota.contracts.runtime import Presigned, Resume
from fedota.events import to_json
from fedota.events.orchestrator import InfraDegraded, InfraRecovered, InfraSpawned, InfraStopped
from fedota.events.problems import ModelFile, Plan, ProblemStarted
from fedota.kernel.service import serving
from services.orchestrator.app import create_app
from tests.integration.orchestrator.conftest import World, answers
from tests.integration.orchestrator.run import PACE
from tests.support.services import running

_WEIGHTS: Final = save({"w": np.zeros(3, dtype=np.float32)})


@asynccontextmanager
async def _storage_and_rounds(world: World, weights: bytes = _WEIGHTS, seconds: float = 0.0) -> AsyncIterator[None]:
    """What a coordinator asks before it is ready. The weights come in so many seconds."""

    async def give(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(len(weights))})
        await response.prepare(request)
        step = len(weights) // 20 + 1
        for start in range(0, len(weights), step):
            await asyncio.sleep(seconds / 20)  # the store is slow: that is what is tested
            await response.write(weights[start : start + step])
        return response

    async def resume(_: str, __: bytes) -> bytes:
        return to_json(Resume())

    store = web.Application()
    store.router.add_get("/model", give)
    async with (
        serving(store, "127.0.0.1", 0) as url,
        world.platform.bus("rounds") as rounds,
        world.platform.bus("storage") as storage,
    ):

        async def presign(_: str, __: bytes) -> bytes:
            return to_json(Presigned(url=f"{url}/model", headers={}))

        await rounds.answer({subjects.runtime("*", "resume"): resume})
        await storage.answer({subjects.runtime("*", "presign"): presign})
        yield


async def test_the_real_runtime_is_launched_and_comes_back(world: World, problem_id: str) -> None:
    """It answers, is killed, answers again at the same address, and leaves nothing."""
    digest = hashlib.sha256(_WEIGHTS).hexdigest()
    model = ModelFile(key=f"problems/{problem_id}/files/model", sha256=digest, size=len(_WEIGHTS))
    plan = Plan(rounds=1, goal_count=1, selectors=1)
    async with _storage_and_rounds(world), running(create_app, world.settings):
        await world.platform.record(ProblemStarted(problem_id=problem_id, run=1, plan=plan, model=model))
        [spawned] = await world.hears(problem_id, InfraSpawned)
        assert isinstance(spawned, InfraSpawned)
        os.kill(world.pid(problem_id, "coordinator"), signal.SIGKILL)
        await world.hears(problem_id, InfraSpawned, InfraDegraded, InfraRecovered)
        for url in (spawned.coordinator, *spawned.selectors):
            assert await answers(url)
        await world.end(problem_id)
        await world.hears(problem_id, InfraSpawned, InfraDegraded, InfraRecovered, InfraStopped)
        await world.is_gone(problem_id)


async def test_a_model_that_comes_slowly_is_waited_for(world: World, problem_id: str) -> None:
    """For longer than a process may say nothing: the coordinator begins in its first life."""
    weights = save({"w": np.zeros(500_000, dtype=np.float32)})
    digest = hashlib.sha256(weights).hexdigest()
    model = ModelFile(key=f"problems/{problem_id}/files/model", sha256=digest, size=len(weights))
    plan = Plan(rounds=1, goal_count=1, selectors=1)
    create = partial(create_app, pace=PACE)
    async with _storage_and_rounds(world, weights, seconds=1.3 * PACE.ready), running(create, world.settings):
        await world.platform.record(ProblemStarted(problem_id=problem_id, run=1, plan=plan, model=model))
        [spawned] = await world.hears(problem_id, InfraSpawned)
        assert isinstance(spawned, InfraSpawned)
        log = "\n".join(world.log_of(problem_id, "coordinator"))
        assert log.count('"listening"') == log.count('"training"') == 1
        await world.end(problem_id)
        await world.is_gone(problem_id)
