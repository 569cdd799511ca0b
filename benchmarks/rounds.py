"""Seconds a round without training: a real coordinator, two selectors, clients in processes of their own, a real store.

What the platform's services would say to the coordinator is said here at once, so their part is not in the figure.
"""

import asyncio
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit
from uuid import uuid4

import msgspec
import nats
import numpy as np
import safetensors.numpy
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from minio import Minio

from benchmarks.figures import Figure, Figures
from benchmarks.world import World, environment, launched
from fedota.contracts import participation, subjects
from fedota.contracts.kit import Kit
from fedota.contracts.runtime import (
    CoordinatorSettings,
    Presigned,
    PresignRequest,
    Report,
    Reported,
    Resume,
    SelectorSettings,
)
from fedota.events import to_json
from fedota.events.problems import ModelFile, Plan
from fedota.kernel.bus import Answer, Bus
from fedota.kernel.files import private_directory, write_private
from fedota.kernel.nats_accounts import Operator, push_account
from fedota.kernel.processes import spawn

_SHAPES: Final = ((8, 40, 4), (4, 4, 8))  # clients, megabytes, rounds; the first round warms up
_SELECTORS: Final = 2
_TENSORS: Final = 10
_PATIENCE: Final = 120.0  # seconds
_AGAINST: Final = "the bytes over loopback both ways, and the sum"


async def measure(world: World) -> Figures:
    """`round.seconds.*` beside the same bytes over a bare socket and the same sum in numpy."""
    figures: Figures = {}
    for clients, megabytes, rounds in _SHAPES:
        seconds = await _rounds(world, clients, megabytes, rounds)
        floor = await asyncio.to_thread(_floor, clients, megabytes * 1_000_000)
        figures[f"round.seconds.{clients}x{megabytes}MB"] = Figure(seconds, "s", floor, _AGAINST)
    return figures


class _Problem:
    """One problem's contracts, keys and model, and when its rounds were completed."""

    def __init__(self, world: World, plan: Plan, model: bytes) -> None:
        self.id = str(uuid4())
        self.plan = plan
        self.model = model
        self.directory = private_directory(world.directory / f"problem-{self.id}")
        self.completed: list[float] = []
        self.over = asyncio.Event()
        self._world = world
        self._keys = Ed25519PrivateKey.generate()
        access = world.servers.s3
        url = urlsplit(access.url)
        self._bucket = access.bucket
        self._store = Minio(
            url.netloc, access.access_key, access.secret_key, secure=url.scheme == "https", region="us-east-1"
        )

    async def store_model(self) -> ModelFile:
        """Put the model where the coordinator finds it."""
        key = f"problems/{self.id}/files/model.safetensors"
        path = self.directory / "model"
        path.write_bytes(self.model)
        if not await asyncio.to_thread(self._store.bucket_exists, self._bucket):
            await asyncio.to_thread(self._store.make_bucket, self._bucket)
        await asyncio.to_thread(self._store.fput_object, self._bucket, key, str(path))
        return ModelFile(key=key, sha256=sha256(self.model).hexdigest(), size=len(self.model))

    @property
    def token_key(self) -> str:
        """What selectors verify participation tokens with."""
        return self._keys.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()

    def kit(self, organization: str, selectors: list[str]) -> Path:
        """An organization's join kit, in its file."""
        private = self._keys.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
        token = participation.sign(private, self.id, organization, seconds=3600)
        path = self.directory / f"{organization}.json"
        kit = Kit(
            problem_id=self.id,
            name="Benchmark",
            organization=organization,
            token=token.token,
            selectors=selectors,
            expires=token.expires,
        )
        write_private(path, to_json(kit))
        return path

    async def credentials(self) -> Path:
        """The problem's own NATS account, known to the server."""
        access = self._world.servers.nats
        assert access.operator is not None
        minted = Operator.read(access.operator).problem_account(self.id, platform=access.platform_account)
        system = await nats.connect(
            access.url, user_credentials=str(access.keys["system"]), inbox_prefix=b"_INBOX_system"
        )
        await push_account(system, minted.jwt)
        await system.close()
        write_private(path := self.directory / "problem.creds", minted.credentials.encode())
        return path

    async def report(self, _: str, body: bytes) -> bytes:
        """Take every report for good, and note when a round is completed."""
        update = msgspec.json.decode(body, type=Report).update
        if update.stage == "abandoned":
            raise RuntimeError(update.reason)
        if update.stage == "completed":
            self.completed.append(time.perf_counter())
        if update.final:
            self.over.set()
        return to_json(Reported(position=update.report))

    async def resume(self, _: str, __: bytes) -> bytes:
        """Nothing was recorded before."""
        return to_json(Resume())

    async def presign(self, _: str, body: bytes) -> bytes:
        """A URL of the real store."""
        wanted = msgspec.json.decode(body, type=PresignRequest)
        url = self._store.get_presigned_url(wanted.method, self._bucket, wanted.key, timedelta(minutes=10))
        return to_json(Presigned(url=url, headers={}))


async def _rounds(world: World, clients: int, megabytes: int, rounds: int) -> float:
    plan = Plan(rounds=rounds, goal_count=clients, minimum_fraction=1.0, selectors=_SELECTORS)
    problem = _Problem(world, plan, _model(megabytes * 1_000_000))
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(_platform(world, problem))
        selectors = await stack.enter_async_context(_infrastructure(world, problem))
        for number in range(clients):
            kit = problem.kit(f"client {number}", selectors)
            argv = [sys.executable, "-m", "benchmarks.client", str(kit)]
            child = await spawn(
                argv, directory=problem.directory, env=environment(), log=problem.directory / f"client-{number}.log"
            )
            stack.push_async_callback(child.stop, 5.0)
        async with asyncio.timeout(_PATIENCE):
            await problem.over.wait()
    first, *_, last = problem.completed
    return (last - first) / (len(problem.completed) - 1)


def _model(size: int) -> bytes:
    random = np.random.default_rng(7)
    values = random.standard_normal((_TENSORS, size // _TENSORS // 4), dtype=np.float32)
    return safetensors.numpy.save({f"layer {number}": row for number, row in enumerate(values)})


@asynccontextmanager
async def _platform(world: World, problem: _Problem) -> AsyncIterator[None]:
    """What coordinators ask the services, answered here."""
    access = world.servers.nats
    answers: dict[str, dict[str, Answer]] = {
        "rounds": {
            subjects.runtime("*", "report"): problem.report,
            subjects.runtime("*", "resume"): problem.resume,
        },
        "storage": {subjects.runtime("*", "presign"): problem.presign},
    }
    async with AsyncExitStack() as stack:
        for name, endpoints in answers.items():
            bus = await stack.enter_async_context(Bus.connect(access.url, name, access.keys[name]))
            await bus.answer(endpoints)
        yield


@asynccontextmanager
async def _infrastructure(world: World, problem: _Problem) -> AsyncIterator[list[str]]:
    """Coordinator and selectors; gives the selectors' addresses."""
    common: dict[str, Any] = {"problem_id": problem.id, "run": 1, "key": "a shared secret"}
    coordinator = CoordinatorSettings(
        plan=problem.plan,
        model=await problem.store_model(),
        nats_url=world.servers.nats.url,
        nats_credentials=str(await problem.credentials()),
        **common,
    )
    async with AsyncExitStack() as stack:
        ready = await stack.enter_async_context(
            launched(problem.directory / "coordinator", "fedota.runtime.coordinator", msgspec.to_builtins(coordinator))
        )
        selectors = []
        for number in range(_SELECTORS):
            name = f"selector-{number}"
            told = SelectorSettings(name=name, coordinator=ready.url, token_key=problem.token_key, **common)
            process = launched(problem.directory / name, "fedota.runtime.selector", msgspec.to_builtins(told))
            selectors.append((await stack.enter_async_context(process)).url)
        yield selectors


def _floor(clients: int, size: int) -> float:
    """Seconds for the least that a round needs: every client gets the model, sends it back, and all are summed."""
    model = np.ones(size // 4, dtype=np.float32)
    updates = [np.empty_like(model) for _ in range(clients)]
    here, there = _loopback()
    with here, there:
        begun = time.perf_counter()
        _carry(here, there, [model] * clients, updates)
        _carry(there, here, [model] * clients, updates)
        total = updates[0].copy()
        for update in updates[1:]:
            total += update
        return time.perf_counter() - begun


def _loopback() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = socket.create_connection(server.getsockname())
        there, _ = server.accept()
    return here, there


def _carry(sender: socket.socket, receiver: socket.socket, sent: list[Any], received: list[Any]) -> None:
    def send() -> None:
        for array in sent:
            sender.sendall(array.data.cast("B"))

    sending = threading.Thread(target=send)
    sending.start()
    for array in received:
        view, filled = array.data.cast("B"), 0
        while filled < len(view):
            filled += receiver.recv_into(view[filled:])
    sending.join()
