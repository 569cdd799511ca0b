"""A coordinator and selectors as real processes; the platform around them is played by the test, on real NATS."""

import asyncio
import hashlib
import os
import signal
import sys
import threading
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import aiohttp
import msgspec
import nats
import numpy as np
import pytest
import safetensors.numpy
from aiohttp import web
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from nats.aio.msg import Msg
from numpy.typing import NDArray

from fedota import client
from fedota.client import Model
from fedota.contracts import participation, subjects
from fedota.contracts.kit import Kit
from fedota.contracts.runtime import (
    CoordinatorSettings,
    Presigned,
    PresignRequest,
    Ready,
    Report,
    Reported,
    Resume,
    ResumeRequest,
    RevokedOrganizations,
    RevokedRequest,
    SelectorSettings,
)
from fedota.errors import FedotaError
from fedota.events import to_json, uuid7
from fedota.events.problems import ModelFile, Plan
from fedota.events.rounds import RoundUpdated
from fedota.kernel.nats_accounts import Operator, push_account
from fedota.process import serving
from services.rounds import domain as rounds

Weights = dict[str, NDArray[Any]]


async def until(condition: Callable[[], Any], seconds: float = 30) -> Any:
    """What the condition gives, once that is true."""
    async with asyncio.timeout(seconds):
        while not (value := condition()):  # noqa: ASYNC110 - what is waited for is in another process
            await asyncio.sleep(0.005)
    return value


class Store:
    """An object store as far as presigned URLs go: exact size and digest, and nothing is written twice."""

    def __init__(self) -> None:
        self.url = ""
        self.objects: dict[str, bytes] = {}
        self.puts: list[str] = []
        self.failing = False
        self.held: tuple[int, asyncio.Event] | None = None  # so many bytes of an object come, the others after this

    def app(self) -> web.Application:
        """The store's HTTP side."""
        app = web.Application(client_max_size=2**30)
        app.router.add_get("/{key:.+}", self._get)
        app.router.add_put("/{key:.+}", self._put)
        return app

    async def _get(self, request: web.Request) -> web.StreamResponse:
        if (body := self.objects.get(request.match_info["key"])) is None:
            return web.Response(status=404)
        if self.held is None:
            return web.Response(body=body)
        count, others = self.held
        response = web.StreamResponse(headers={"Content-Length": str(len(body))})
        await response.prepare(request)
        await response.write(body[:count])
        await others.wait()
        await response.write(body[count:])
        return response

    async def _put(self, request: web.Request) -> web.Response:
        key, body = request.match_info["key"], await request.read()
        if self.failing:
            return web.Response(status=503, text="<Error><Code>SlowDown</Code><HostId>secret</HostId></Error>")
        self.puts.append(key)
        if key in self.objects:
            return web.Response(status=412)
        if hashlib.sha256(body).hexdigest() != request.headers["x-test-sha256"]:
            return web.Response(status=400, text="wrong digest")
        assert request.headers["Content-Length"] == str(len(body)) == request.headers["x-test-size"]
        self.objects[key] = body
        return web.Response()


class Platform:
    """The services that a coordinator meets: the rounds service's own rules, without its log."""

    def __init__(self, store: Store, problem_id: str) -> None:
        self.store = store
        self.problem_id = problem_id
        self.reports: list[RoundUpdated] = []
        self.resumed = 0
        self.repeated = 0
        self.refusing: FedotaError | None = None
        self.state = rounds.State()

    @property
    def stages(self) -> list[str]:
        """Each stage that was reported, mere counts left out."""
        found: list[str] = []
        for one in self.reports:
            stage = f"{one.round}.{one.attempt} {one.stage}"
            if not found or found[-1] != stage:
                found.append(stage)
        return found

    def completed(self, round_: int = 1) -> RoundUpdated | None:
        """The report that a round is completed."""
        return next((one for one in self.reports if (one.stage, one.round) == ("completed", round_)), None)

    @property
    def final(self) -> RoundUpdated | None:
        """The run's last report."""
        return self.reports[-1] if self.reports and self.reports[-1].final else None

    def weights(self, update: RoundUpdated | None) -> Weights:
        """A checkpoint."""
        assert update is not None and update.checkpoint is not None
        body = self.store.objects[update.checkpoint.key]
        assert (hashlib.sha256(body).hexdigest(), len(body)) == (update.checkpoint.sha256, update.checkpoint.size)
        weights: Weights = safetensors.numpy.load(body)
        return weights

    def manifest(self, update: RoundUpdated) -> dict[str, Any]:
        """What stands beside a checkpoint."""
        assert update.checkpoint is not None
        manifest: dict[str, Any] = msgspec.json.decode(
            self.store.objects[update.checkpoint.key.removesuffix(".safetensors") + ".json"]
        )
        return manifest

    def start(self, plan: Plan, organizations: int = 50) -> None:
        """The problem is started, and `org 1` and so on take part in it."""
        members = {f"org {number}": True for number in range(1, organizations + 1)}
        run = rounds.Run(number=1, plan=plan, cause=uuid7(), correlation=uuid7())
        self.state = rounds.State(run=run, members=members)

    async def answer(self, message: Msg) -> None:
        """One request of a coordinator."""
        verb = message.subject.rpartition(".")[2]
        body, headers = b"", None
        try:
            body = to_json(getattr(self, f"_{verb}")(message.data))
        except FedotaError as error:
            body, headers = to_json(error.problem), {"Fedota-Error": error.problem.code}
        await message._client.publish(message.reply, body, headers=headers)

    def _report(self, data: bytes) -> Reported:
        update = msgspec.json.decode(data, type=Report).update
        if self.refusing:
            raise self.refusing
        assert update.problem_id == self.problem_id
        if 0 < update.report <= len(self.reports) and self.reports[update.report - 1] == update:
            self.repeated += 1
            return Reported(position=update.report)
        self.reports += rounds.decide(self.state, self.reports[-1] if self.reports else None, update)
        return Reported(position=update.report, revoked=self.state.revoked)

    def _resume(self, data: bytes) -> Resume:
        self.resumed += 1
        return rounds.resume(self.state, msgspec.json.decode(data, type=ResumeRequest).run, self.reports[::-1])

    def stop(self, reason: str) -> None:
        """The setter stops the problem."""
        assert self.state.run is not None
        self.state = msgspec.structs.replace(self.state, run=msgspec.structs.replace(self.state.run, over=reason))

    def _revoked(self, data: bytes) -> RevokedOrganizations:
        run = msgspec.json.decode(data, type=RevokedRequest).run
        return RevokedOrganizations(revoked=self.state.revoked, stopped=rounds.stopped(self.state, run))

    def _presign(self, data: bytes) -> Presigned:
        wanted = msgspec.json.decode(data, type=PresignRequest)
        assert wanted.key.startswith(f"problems/{self.problem_id}/")
        headers = {"x-test-sha256": wanted.sha256, "x-test-size": str(wanted.size)} if wanted.method == "PUT" else {}
        return Presigned(url=f"{self.store.url}/{wanted.key}", headers=headers)


class Component:
    """A launched process: started, killed, started again at the same address."""

    def __init__(self, module: str, directory: Path, settings: Callable[[int], msgspec.Struct]) -> None:
        self.module = module
        self.directory = directory
        self.url = ""
        self._settings = settings
        self._process: Process | None = None

    @property
    def process(self) -> Process:
        """The process that runs now, or ran last."""
        assert self._process is not None
        return self._process

    async def start(self, *, wait: bool = True) -> None:
        """Start it, and wait until it is ready."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        (self.directory / "ready.json").unlink(missing_ok=True)
        port = urlsplit(self.url).port or 0
        (self.directory / "settings.json").write_bytes(to_json(self._settings(port)))
        with (self.directory / "log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", self.module),
                cwd=self.directory,
                stdin=asyncio.subprocess.PIPE,
                stderr=log,
                env={"PATH": os.environ["PATH"], "PYTHONSAFEPATH": "1", "PYTHONWARNINGS": "error"},
            )
        if wait:
            await self.answers()

    async def listens(self) -> None:
        """Wait until it says where it can be asked."""

        def announced() -> str | None:
            assert self.process.returncode is None, self.log()
            with suppress(FileNotFoundError):
                return msgspec.json.decode((self.directory / "ready.json").read_bytes(), type=Ready).url
            return None

        self.url = await until(announced)

    async def answers(self) -> None:
        """Wait until it is ready."""
        await self.listens()
        await self.says("")

    async def says(self, words: str) -> str:
        """What is wrong with it, once that has these words in it; "" means that it is ready."""
        async with asyncio.timeout(30), aiohttp.ClientSession() as http:
            while True:
                async with http.get(f"{self.url}/readyz", ssl=False) as reply:  # whoever's certificate it has
                    said = "; ".join((await reply.json())["failing"].values())
                    assert (reply.status == 503) == bool(said)
                if (words in said) if words else not said:
                    return said
                await asyncio.sleep(0.005)

    async def kill(self) -> None:
        """End it as a crash would."""
        self.process.kill()
        await self.process.wait()

    async def stop(self) -> int:
        """Ask it to end; its exit code."""
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        return await asyncio.wait_for(self.process.wait(), 10)

    def log(self) -> str:
        """What it wrote."""
        return (self.directory / "log").read_text()


class World:
    """A problem's coordinator and selectors, and what is around them."""

    def __init__(self, directory: Path, nats_url: str, credentials: Path, store: Store, problem_id: str) -> None:
        self.store = store
        self.platform = Platform(store, problem_id)
        self.problem_id = problem_id
        self.selectors: list[Component] = []
        self.model: Weights = {}
        self.digest = ""
        self.components: list[Component] = []
        self.nats_url = nats_url
        self._directory = directory
        self._credentials = credentials
        private = Ed25519PrivateKey.generate()
        self._private = private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode()
        self._public = (
            private.public_key()
            .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
            .decode()
        )

    async def launch(self, plan: Plan, model: Mapping[str, NDArray[Any]], *, body: bytes | None = None) -> None:
        """Store the model and bring everything up."""
        self.prepare(plan, model, body=body)
        await self.coordinator.start()
        await asyncio.gather(*(selector.start() for selector in self.selectors))

    def prepare(self, plan: Plan, model: Mapping[str, NDArray[Any]], *, body: bytes | None = None) -> None:
        """Store the model; the processes are not started."""
        self.platform.start(plan)
        self.model = dict(model)
        body = body or safetensors.numpy.save(self.model)
        key = f"problems/{self.problem_id}/files/model.safetensors"
        self.store.objects[key] = body
        self.digest = hashlib.sha256(body).hexdigest()
        file = ModelFile(key=key, sha256=self.digest, size=len(body))
        common = {"problem_id": self.problem_id, "run": 1, "key": "a shared secret"}

        def coordinator(port: int) -> CoordinatorSettings:
            at = {"nats_url": self.nats_url, "nats_credentials": str(self._credentials), "port": port}
            return CoordinatorSettings(plan=plan, model=file, **common, **at)  # type: ignore[arg-type]

        def selector(name: str) -> Callable[[int], SelectorSettings]:
            return lambda port: SelectorSettings(
                name=name,
                coordinator=self.coordinator.url,
                token_key=self._public,
                port=port,
                **common,  # type: ignore[arg-type]
            )

        self.coordinator = Component("fedota.runtime.coordinator", self._directory / "coordinator", coordinator)
        self.selectors = [
            Component("fedota.runtime.selector", self._directory / f"selector-{n}", selector(f"selector-{n}"))
            for n in range(plan.selectors)
        ]
        self.components = [self.coordinator, *self.selectors]

    def token(self, organization: str, *, seconds: int = 3600, problem_id: str | None = None) -> str:
        """A participation token."""
        return participation.sign(self._private, problem_id or self.problem_id, organization, seconds=seconds).token

    def kit(self, organization: str, *selectors: Component) -> Kit:
        """An organization's join kit, for all selectors or some."""
        return Kit(
            problem_id=self.problem_id,
            name="A problem",
            organization=organization,
            token=self.token(organization),
            selectors=[one.url for one in selectors or self.selectors],
            expires=2_000_000_000,
        )

    async def metrics(self, component: Component) -> dict[str, float]:
        """What a process counts."""
        async with aiohttp.ClientSession() as http, http.get(f"{component.url}/metrics") as reply:
            lines = (await reply.text()).splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    async def end(self) -> None:
        """Stop what still runs."""
        for component in self.components:
            if component._process is not None and component.process.returncode is None:
                await component.kill()


@asynccontextmanager
async def _account(servers: Any, problem_id: str, directory: Path) -> AsyncIterator[Path]:
    """The problem's own NATS account; gives its credentials."""
    minted = Operator.read(servers.nats_operator).problem_account(problem_id, platform=servers.platform_account)
    system = await nats.connect(
        servers.nats_url, user_credentials=str(servers.nats_keys["system"]), inbox_prefix=b"_INBOX_system"
    )
    try:
        await push_account(system, minted.jwt)
    finally:
        await system.close()
    path = directory / "problem.creds"
    path.write_text(minted.credentials)
    yield path


@pytest.fixture
async def world(servers: Any, tmp_path: Path) -> AsyncIterator[World]:
    """Nothing runs yet but NATS, the store, and who answers for the platform."""
    problem_id, store = str(uuid4()), Store()
    async with (
        serving(store.app(), "127.0.0.1", 0) as store.url,
        _account(servers, problem_id, tmp_path) as credentials,
    ):
        made = World(tmp_path, servers.nats_url, credentials, store, problem_id)
        services = []
        for process, verbs in (("rounds", ("report", "resume", "revoked")), ("storage", ("presign",))):
            connection = await nats.connect(servers.nats_url, user_credentials=str(servers.nats_keys[process]))
            services.append(connection)
            for verb in verbs:
                await connection.subscribe(subjects.runtime("*", verb), cb=made.platform.answer)
            await connection.flush()
        try:
            yield made
        finally:
            await made.end()
            for connection in services:
                await connection.close()


async def another_waits(world: World) -> None:
    """Return when a client waits beside a round that goes on: reports from before it had begun tell of its own ones."""
    await until(lambda: (world.platform.reports[-1].stage, world.platform.reports[-1].waiting) == ("reporting", 1))


def weighted_mean(updates: list[tuple[Weights, int]]) -> Weights:
    """What federated averaging comes to, in numpy's own words; of counters, the largest."""
    weights = [examples for _, examples in updates]
    mean = {}
    for name, first in updates[0][0].items():
        values = np.stack([update[name] for update, _ in updates])
        is_float = first.dtype.kind == "f"
        found = np.average(values.astype(np.float64), axis=0, weights=weights) if is_float else values.max(axis=0)
        mean[name] = found.astype(first.dtype)
    return mean


def assert_same(found: Weights, expected: Weights, *, relative: float = 1e-6) -> None:
    """All tensors agree, to what their type can tell."""
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert (found[name].dtype, found[name].shape) == (values.dtype, values.shape), name
        tolerance = max(relative, 2 * np.finfo(values.dtype).eps) if values.dtype.kind == "f" else 0
        np.testing.assert_allclose(found[name], values, rtol=tolerance, atol=1e-7, err_msg=name)


class Participant:
    """A client whose training the test holds in its hand: each round it waits for `go`."""

    def __init__(self, number: int, *, free: bool = False) -> None:
        self.number = number
        self.organization = f"org {number}"
        self.lines: list[str] = []
        self.rounds: list[int] = []
        self._go = threading.Semaphore(10**6 if free else 0)
        self._ended = threading.Event()

    def train(self, model: Model, data: Path, config: dict[str, Any]) -> Any:
        """Add a number that tells the client and the round."""
        self.rounds.append(config["round"])
        while not self._go.acquire(timeout=0.05):
            if self._ended.is_set():
                raise RuntimeError("the test is over")
        return self.trained(model, config["round"]), self.number, {"loss": 1 / self.number}

    def trained(self, model: Weights, round_: int) -> Weights:
        """What this client makes of a model."""
        return {name: (values + self.number * round_).astype(values.dtype) for name, values in model.items()}

    def go(self) -> None:
        """Let one training end."""
        self._go.release()

    async def run(self, kit: Kit, data: Path, **arguments: Any) -> None:
        """Take part."""
        try:
            await client.run(kit, self.train, data, say=self.lines.append, **arguments)
        finally:
            self._ended.set()

    def said(self, words: str) -> bool:
        """Whether it told this to its user."""
        return any(words in line for line in self.lines)


def expected_after(model: Weights, rounds_: int, *participants: Participant) -> Weights:
    """The weights after so many rounds of these."""
    for number in range(1, rounds_ + 1):
        model = weighted_mean([(one.trained(model, number), one.number) for one in participants])
    return model


@asynccontextmanager
async def running(*work: Coroutine[Any, Any, None]) -> AsyncIterator[list[asyncio.Task[None]]]:
    """Tasks beside the test; one that fails makes the test fail at the end."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        yield tasks
        await asyncio.wait_for(asyncio.gather(*tasks), 60)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
