"""One problem without its platform: a real coordinator, real selectors, a real store, and a model of any size.

What the platform's services would say to the coordinator is said here at once, so their part is in no figure.
"""

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit
from uuid import uuid4

import msgspec
import nats
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from minio import Minio

from benchmarks.world import World, launched
from fedota.contracts import participation, subjects
from fedota.contracts.runtime import (
    CoordinatorSettings,
    Presigned,
    PresignRequest,
    Ready,
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
from services.orchestrator.launchers.authority import Authority

TENSORS: Final = 10
MEGABYTE: Final = 1_000_000
_BLOCK: Final = 4 * MEGABYTE  # of random numbers, repeated: a model of gigabytes need not be random throughout
_PART: Final = 64 * 1024**2
_HOUR: Final = 3600


class Problem:
    """One problem's contracts, keys and model, and when its rounds were completed."""

    def __init__(self, world: World, plan: Plan, megabytes: float) -> None:
        self.id = str(uuid4())
        self.plan = plan
        self.directory = private_directory(world.directory / f"problem-{self.id}")
        self.completed: list[float] = []
        self._over = asyncio.Event()
        self._failure = ""
        self._world = world
        self._keys = Ed25519PrivateKey.generate()
        self.model = self.directory / "model.safetensors"
        write_model(self.model, int(megabytes * MEGABYTE))
        access = world.servers.s3
        url = urlsplit(access.url)
        self._bucket = access.bucket
        self._store = Minio(
            url.netloc, access.access_key, access.secret_key, secure=url.scheme == "https", region="us-east-1"
        )

    async def store_model(self) -> ModelFile:
        """Put the model where the coordinator finds it."""
        key = f"problems/{self.id}/files/model.safetensors"
        if not await asyncio.to_thread(self._store.bucket_exists, self._bucket):
            await asyncio.to_thread(self._store.make_bucket, self._bucket)
        await asyncio.to_thread(self._store.fput_object, self._bucket, key, str(self.model), part_size=_PART)
        with self.model.open("rb") as file:
            digest = await asyncio.to_thread(hashlib.file_digest, file, "sha256")
        return ModelFile(key=key, sha256=digest.hexdigest(), size=self.model.stat().st_size)

    @property
    def token_key(self) -> str:
        """What selectors verify participation tokens with."""
        return self._keys.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()

    def token(self, organization: str) -> tuple[str, int]:
        """An organization's participation token, and until when it is good."""
        private = self._keys.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
        token = participation.sign(private, self.id, organization, seconds=_HOUR)
        return token.token, token.expires

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

    async def over(self, patience: float) -> None:
        """Wait until the last round is reported. Raises `RuntimeError` when a round is abandoned."""
        async with asyncio.timeout(patience):
            await self._over.wait()
        if self._failure:
            raise RuntimeError(f"A round was abandoned, so there is nothing to measure: {self._failure}")

    @property
    def seconds(self) -> float:
        """Seconds of a round, without the first one, which warms up."""
        first, *_, last = self.completed
        return (last - first) / (len(self.completed) - 1)

    async def report(self, _: str, body: bytes) -> bytes:
        """Take every report for good, and note when a round is completed."""
        update = msgspec.json.decode(body, type=Report).update
        if update.stage == "abandoned":
            self._failure = update.reason
        if update.stage == "completed":
            self.completed.append(time.perf_counter())
        if update.final or self._failure:
            self._over.set()
        return to_json(Reported(position=update.report))

    async def resume(self, _: str, __: bytes) -> bytes:
        """Nothing was recorded before."""
        return to_json(Resume())

    async def presign(self, _: str, body: bytes) -> bytes:
        """A URL of the real store."""
        wanted = msgspec.json.decode(body, type=PresignRequest)
        url = self._store.get_presigned_url(wanted.method, self._bucket, wanted.key, timedelta(minutes=10))
        return to_json(Presigned(url=url, headers={}))


def write_model(path: Path, size: int) -> None:
    """A `safetensors` file of about so many bytes, written in pieces: it may be larger than the memory."""
    elements = size // TENSORS // 4
    tensors = {
        f"layer {number}": {
            "dtype": "F32",
            "shape": [elements],
            "data_offsets": [4 * elements * number, 4 * elements * (number + 1)],
        }
        for number in range(TENSORS)
    }
    header = json.dumps(tensors).encode()
    header += b" " * (-len(header) % 8)
    block = np.random.default_rng(7).standard_normal(_BLOCK // 4, dtype=np.float32).data.cast("B")
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        left = 4 * elements * TENSORS
        while left:
            left -= file.write(block[:left])


class Infrastructure(NamedTuple):
    """The processes of one problem, ready."""

    coordinator: Ready
    selectors: list[Ready]

    @property
    def pids(self) -> list[int]:
        """All of them."""
        return [self.coordinator.pid, *(selector.pid for selector in self.selectors)]


@asynccontextmanager
async def running(world: World, problem: Problem, authority: Authority | None = None) -> AsyncIterator[Infrastructure]:
    """Coordinator and selectors, with somebody who answers for the platform.

    Selectors have certificates of `authority`; without one they speak plain HTTP.
    """
    common: dict[str, Any] = {"problem_id": problem.id, "run": 1, "key": "a shared secret"}
    coordinator = CoordinatorSettings(
        plan=problem.plan,
        model=await problem.store_model(),
        nats_url=world.servers.nats.url,
        nats_credentials=str(await problem.credentials()),
        **common,
    )
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(_platform(world, problem))
        ready = await stack.enter_async_context(
            launched(problem.directory / "coordinator", "fedota.runtime.coordinator", msgspec.to_builtins(coordinator))
        )
        selectors = []
        for number in range(problem.plan.selectors):
            name = f"selector-{number}"
            certificate = _certificate(problem.directory / f"{name}.pem", authority) if authority else ""
            told = SelectorSettings(
                name=name, coordinator=ready.url, token_key=problem.token_key, certificate=certificate, **common
            )
            process = launched(problem.directory / name, "fedota.runtime.selector", msgspec.to_builtins(told))
            selectors.append(await stack.enter_async_context(process))
        yield Infrastructure(ready, selectors)


def _certificate(path: Path, authority: Authority) -> str:
    write_private(path, authority.issue("selector", ["127.0.0.1"]))
    return str(path)


@asynccontextmanager
async def _platform(world: World, problem: Problem) -> AsyncIterator[None]:
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
