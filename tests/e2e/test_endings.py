"""How a training ends for clients that do not wait at that very moment, on the whole platform."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import aiohttp
import numpy as np
from safetensors.numpy import save_file

from fedota.client.api import Api, LocalFile
from fedota.contracts.kit import Kit
from fedota.events.problems import Plan
from fedota.local.background import read_progress
from fedota.local.platform import read_tokens
from tests.e2e.conftest import PATIENCE, Command
from tests.support.waiting import until

PROBLEM = {"name": "n", "description": "d", "data_format": "f", "client_image": "registry.test/image"}
_CLINIC = "North"
_BRIEFLY = 30.0  # seconds: much less than the minute that what is over stays up


class Clinic:
    """A client that says and does what the test wants."""

    def __init__(self, http: aiohttp.ClientSession, kit: Kit) -> None:
        self._http = http
        self._url = kit.selectors[0]
        self._token = kit.token

    def _headers(self, name: str, ticket: str) -> dict[str, str]:
        headers = {"Authorization": f"Bearer {self._token}", "Fedota-Client": name}
        return {**headers, "Fedota-Ticket": ticket} if ticket else headers

    async def check_in(self, ticket: str = "", name: str = "one") -> dict[str, Any]:
        """What it is told to do."""
        async with self._http.post(f"{self._url}/v1/check-in", headers=self._headers(name, ticket)) as reply:
            answer: dict[str, Any] = await reply.json()
        return answer

    async def send(self, ticket: str, update: bytes) -> None:
        """Its update is taken."""
        headers = {**self._headers("one", ticket), "Fedota-Examples": "1"}
        async with self._http.post(f"{self._url}/v1/updates", headers=headers, data=update) as reply:
            assert reply.status == 200, await reply.text()


@asynccontextmanager
async def _platform(fedota: Command) -> AsyncIterator[tuple[Api, Api]]:
    """For a setter and for an organization."""
    path = fedota.directory / "data"
    assert fedota.run("up", "--data-dir", str(path)).returncode == 0
    tokens, progress = read_tokens(path), read_progress(path)
    assert progress
    async with (
        Api.open(progress.gateway_url, tokens["setter"]) as setter,
        Api.open(progress.gateway_url, tokens["organization"]) as organization,
    ):
        yield setter, organization
    began = monotonic()
    assert fedota.run("down", "--data-dir", str(path)).returncode == 0
    assert monotonic() - began < _BRIEFLY, "the platform's end waited for a farewell"
    fedota.wait_until_nothing_is_left()


async def _published(setter: Api, organization: Api, model: Path) -> str:
    problem_id = await setter.create_problem(**PROBLEM, plan=Plan(rounds=1, goal_count=1, selectors=1))
    await setter.upload(problem_id, [LocalFile(model, "model")])
    await organization.request_participation(problem_id, _CLINIC)
    await setter.approve_participation(problem_id, _CLINIC)
    return problem_id


async def _started(setter: Api, organization: Api, problem_id: str, http: aiohttp.ClientSession) -> Clinic:
    await setter.start(problem_id)
    await _becomes(setter, problem_id, "running", "running")
    return Clinic(http, await organization.kit(problem_id, _CLINIC))


async def _becomes(setter: Api, problem_id: str, state: str, infrastructure: str) -> None:
    async def is_so() -> bool:
        problem = await setter.problem(problem_id)
        return (problem["state"], problem["infrastructure"]["state"]) == (state, infrastructure)

    await until(is_so, f"the problem is {state}, its infrastructure {infrastructure}", PATIENCE)


async def test_late_clients_hear_of_the_end(fedota: Command) -> None:
    """That it is completed, and that their update counts; that it was stopped, and why; a new start does not wait."""
    model = fedota.directory / "model.safetensors"
    save_file({"w": np.zeros(4, "f4")}, model)
    async with _platform(fedota) as (setter, organization), aiohttp.ClientSession() as http:
        completed = await _published(setter, organization, model)
        early = await _started(setter, organization, completed, http)
        selected = await early.check_in()
        await early.send(selected["ticket"], model.read_bytes())
        await _becomes(setter, completed, "completed", "running")

        problem_id = await _published(setter, organization, model)
        clinic = await _started(setter, organization, problem_id, http)  # which takes some seconds
        late = await early.check_in(selected["ticket"])
        assert late == {"status": "finished", "reason": "The training is finished.", "update": "counted"}

        assert (await clinic.check_in())["status"] == "selected"
        waiting = asyncio.create_task(clinic.check_in(name="two"))
        await setter.stop(problem_id, "Enough.")
        stopped = {"status": "finished", "reason": "The training was stopped: Enough.", "update": "none"}
        assert await asyncio.wait_for(waiting, _BRIEFLY) == stopped
        assert await clinic.check_in() == stopped

        began = monotonic()
        again = await _started(setter, organization, problem_id, http)
        assert monotonic() - began < _BRIEFLY, "the new start waited for the farewell of the one before"
        assert (await again.check_in())["status"] == "selected"
