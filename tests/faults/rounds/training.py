"""A problem that is trained by real processes, with a wire on each line between them."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import msgspec
import safetensors.numpy
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedota.contracts import participation
from fedota.contracts.kit import Kit
from fedota.contracts.runtime import CoordinatorSettings, SelectorSettings
from fedota.events import to_json
from fedota.events.problems import ModelFile, Plan
from services.storage.blobs import Blobs
from tests.faults.rounds.around import Around
from tests.faults.rounds.client import Told
from tests.faults.rounds.processes import Kept, Served
from tests.faults.rounds.recorder import Recorder
from tests.faults.rounds.updates import Maker, first_model
from tests.faults.rounds.wires import Wire
from tests.faults.servers import PATIENCE
from tests.support.waiting import until

EXAMPLES: Final = (3, 5, 7, 11, 13, 17, 19, 23)  # what a client's update weighs: each of them something else
_HOUR: Final = 3600


class Party:
    """A client, whatever life it is in; it has a wire of its own to each selector."""

    def __init__(self, training: "Training", number: int) -> None:
        self.number = number
        self.organization = f"org {number}"
        self.directory = training.directory / f"client-{number}"
        self.wires = [
            Wire(f"client {number} to {selector.name}", partial(_url, selector)) for selector in training.selectors
        ]
        self.process = Kept(f"client-{number}", self.directory, self._told)
        self._training = training

    def _told(self) -> list[str]:
        """A new life, in a slot of its own."""
        training, kit = self._training, self.directory / "kit.json"
        kit.write_bytes(to_json(training.kit(self.organization, [wire.url() for wire in self.wires])))
        maker = training.next_maker(self.number)
        told = Told(maker, kit, training.ledger(maker), training.gate_file)
        path = self.directory / "told.json"
        path.write_bytes(msgspec.json.encode(told, enc_hook=str))
        return ["tests.faults.rounds.client", str(path)]


def _url(process: Served) -> str:
    return process.url


class Training:
    """A coordinator, selectors, clients, and wires between them: client to selector, selector to coordinator,
    coordinator to NATS and to the object store.

    Rounds are trained up to the one that `open_gate` was told last.
    """

    def __init__(self, around: Around, directory: Path, plan: Plan, clients: int, elements: int) -> None:
        self.around = around
        self.directory = directory
        self.plan = plan
        self.problem_id = str(uuid4())
        self.model = first_model(elements)
        self.makers: dict[int, Maker] = {}
        self.gate = 0
        self.gate_file = directory / "gate"
        self.blobs: Blobs
        self.recorder: Recorder
        self.bus = Wire("coordinator to nats", lambda: around.access.url)
        self.store = Wire("coordinator to s3", lambda: around.s3_url)
        self.coordinator = Served(
            "coordinator", directory / "coordinator", "fedota.runtime.coordinator", self._coordinator_settings
        )
        names = [f"selector-{number}" for number in range(plan.selectors)]
        self.lines = [Wire(f"{name} to coordinator", lambda: self.coordinator.url) for name in names]
        self.selectors = [
            Served(name, directory / name, "fedota.runtime.selector", partial(self._selector_settings, name, line))
            for name, line in zip(names, self.lines, strict=True)
        ]
        self.parties = [Party(self, number) for number in range(clients)]
        self._file: ModelFile
        self._credentials = directory / "problem.creds"
        self._key = Ed25519PrivateKey.generate()

    @classmethod
    @asynccontextmanager
    async def begun(
        cls, around: Around, directory: Path, plan: Plan, *, clients: int, elements: int = 65_536
    ) -> AsyncIterator["Training"]:
        """All of it is being started."""
        directory.mkdir()
        training = cls(around, directory, plan, clients, elements)
        async with AsyncExitStack() as stack:
            for wire in training.wires:
                await stack.enter_async_context(wire.laid())
            training.blobs = await stack.enter_async_context(around.blobs(training.store.url()))
            await training._prepare()
            members = [party.organization for party in training.parties]
            training.recorder = Recorder(training.problem_id, plan, members, training.blobs)
            await stack.enter_async_context(training.recorder.answering(around.access.url, around.access.keys))
            for process in training.processes:
                await stack.enter_async_context(process.running())
            yield training

    async def _prepare(self) -> None:
        self.open_gate(0)
        await self.around.account(self.problem_id, self._credentials)
        body = safetensors.numpy.save(self.model)
        key = f"problems/{self.problem_id}/files/model.safetensors"
        await self.blobs.put(key, body)
        self._file = ModelFile(key=key, sha256=hashlib.sha256(body).hexdigest(), size=len(body))

    @property
    def model_sha256(self) -> str:
        """What the first round begins with."""
        return self._file.sha256

    @property
    def model_size(self) -> int:
        """The bytes of a model, and of an update."""
        return self._file.size

    @property
    def processes(self) -> list[Kept]:
        """All of them."""
        return [self.coordinator, *self.selectors, *(party.process for party in self.parties)]

    @property
    def client_wires(self) -> list[Wire]:
        """Between clients and selectors."""
        return [wire for party in self.parties for wire in party.wires]

    @property
    def wires(self) -> list[Wire]:
        """All of them."""
        return [self.bus, self.store, *self.lines, *self.client_wires]

    def open_gate(self, round_: int) -> None:
        """Let clients train up to this round."""
        self.gate = round_
        draft = self.gate_file.with_suffix(".new")
        draft.write_text(str(round_))
        draft.replace(self.gate_file)

    def next_maker(self, number: int) -> Maker:
        """A new life of a client."""
        maker = Maker(len(self.makers), number, EXAMPLES[number])
        self.makers[maker.slot] = maker
        return maker

    def ledger(self, maker: Maker) -> Path:
        """Where a client's life writes what it made and what it heard."""
        return self.directory / f"ledger-{maker.slot}"

    def written(self, maker: Maker) -> list[dict[str, Any]]:
        """What a client's life wrote, the last line only when it is whole."""
        path = self.ledger(maker)
        return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []

    def trained(self) -> list[tuple[int, int]]:
        """Each training that there was, by the round and the client."""
        written = [(maker.number, line) for maker in self.makers.values() for line in self.written(maker)]
        return sorted((line["trained"], number) for number, line in written if "trained" in line)

    def kit(self, organization: str, selectors: list[str]) -> Kit:
        """What a client is given."""
        private = self._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode()
        signed = participation.sign(private, self.problem_id, organization, seconds=_HOUR)
        return Kit(
            problem_id=self.problem_id,
            name="A problem",
            organization=organization,
            token=signed.token,
            selectors=selectors,
            expires=signed.expires,
        )

    def _coordinator_settings(self, port: int) -> CoordinatorSettings:
        return CoordinatorSettings(
            problem_id=self.problem_id,
            run=1,
            plan=self.plan,
            model=self._file,
            nats_url=self.bus.url("nats"),
            nats_credentials=str(self._credentials),
            key="a shared secret",
            port=port,
        )

    def _selector_settings(self, name: str, line: Wire, port: int) -> SelectorSettings:
        public = self._key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        return SelectorSettings(
            problem_id=self.problem_id,
            run=1,
            name=name,
            coordinator=line.url(),
            token_key=public.decode(),
            key="a shared secret",
            port=port,
        )

    async def comes_to(self, what: str, condition: Callable[[], Any], patience: float = PATIENCE) -> Any:
        """Wait for something, and tell where everything stands when it does not happen."""

        async def look() -> Any:
            return condition()

        try:
            return await until(look, what, patience)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.standing()}") from None

    async def make_round(self, round_: int, fault: Coroutine[Any, Any, None]) -> None:
        """Train a round while a fault comes; return when the round is recorded, and the fault has come and gone."""
        making = asyncio.create_task(fault)
        try:
            await asyncio.sleep(0)  # the fault waits for its moment before anybody may come to that
            self.open_gate(round_)
            await making
            await self.completes(round_)
        finally:
            making.cancel()

    async def completes(self, round_: int, patience: float = PATIENCE) -> None:
        """Wait until a round is recorded as completed."""
        await self.comes_to(f"round {round_} is completed", lambda: len(self.recorder.completed) >= round_, patience)

    async def ends(self) -> None:
        """Wait until the run is over, and each client has been told so."""
        patience = PATIENCE + self.plan.rounds
        self.open_gate(self.plan.rounds)
        await self.comes_to("the run is finished", lambda: self.recorder.final, patience)
        for party in self.parties:
            await self.comes_to(f"{party.process.name} is told so", party.process.ended.is_set, patience)

    def standing(self) -> str:
        """How things stand, for who has to find out why they do not go on."""
        reports = "\n".join(
            f"  {one.report}: {one.round}.{one.attempt} {one.stage}: {one.reason}" for one in self.recorder.reports[-8:]
        )
        logs = "\n".join(f"  {one.name} (life {one.lives}): {_last_line(one.log())}" for one in self.processes)
        heard = "\n".join(
            f"  client {maker.number} in slot {maker.slot}: {self.written(maker)[-2:]}"
            for maker in self.makers.values()
        )
        return f"The gate is at {self.gate}. Reports:\n{reports}\nLogs:\n{logs}\nClients:\n{heard}"


def _last_line(text: str) -> str:
    return text.rstrip().rpartition("\n")[2][:600]
