"""The gateway between real servers; the services behind it are played by the tests."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import aiohttp
import asyncpg
import msgspec
import nats
import pytest
from aiohttp import web
from nats.js.errors import NotFoundError

from fedota.contracts import commands, subjects
from fedota.contracts.commands import Command, Reply, Request
from fedota.errors import FedotaError
from fedota.events import CATALOGUE, EventData, NewEvent, uuid7
from fedota.events.orchestrator import InfraSpawned
from fedota.events.problems import (
    ModelFile,
    ParticipationApproved,
    ParticipationRefused,
    ParticipationRequested,
    ParticipationRevoked,
    Plan,
    ProblemCreated,
    ProblemRevised,
    ProblemStarted,
    ProblemStopped,
)
from fedota.events.rounds import Checkpoint, RoundUpdated
from fedota.events.storage import FilesStored, StoredFile
from fedota.kernel.bus import Bus
from fedota.kernel.database import connect_pool
from fedota.kernel.event_log import Append, Context, EventLog, listen
from fedota.kernel.migrations import PROCESSES, migrate, role_of
from fedota.kernel.projection import Projector
from fedota.kernel.relay import Relay
from fedota.kernel.service import Service, serving
from fedota.kernel.settings import Secret
from gateway.app import create_app
from gateway.parts import PARTS
from gateway.projection import PROJECTION
from gateway.settings import Settings
from gateway.stream import Feed

TOKENS = {name: f"fdt_{name}_made_up" for name in ("setter", "organization", "operator", "clinic")}
PLAN = Plan(rounds=3, goal_count=2)
MODEL = ModelFile(key="k/model.safetensors", sha256="a" * 64, size=10)
STAGES = ("selection", "configuration", "reporting", "completed")
_PASSWORD = "made-up"


class Platform:
    """Everything that the gateway meets: the log with each owner's pen, the services' answers, its own address."""

    def __init__(self) -> None:
        self.url = ""
        self.app: web.Application = web.Application()
        self.logs: dict[str, EventLog] = {}
        self.requests: list[tuple[Request, Command]] = []
        self.refusal: FedotaError | None = None

    async def record(self, *events: EventData) -> int:
        """Append events as their owners; the position of the last."""
        position = 0
        for data in events:
            owner = CATALOGUE[type(data).__name__].owner
            context = Context(actor="test", correlation=uuid7())
            append = Append(subject=f"{owner}/{data.problem_id}", events=[NewEvent(data=data)], context=context)
            position = (await self.logs[owner].append(append)).position
        return position

    def story(self, problem_id: str) -> list[EventData]:
        """A problem from its publication to the end of its first round."""
        about = {"name": "Name", "description": "About", "data_format": "csv", "client_image": "registry.test/i"}
        infra: dict[str, Any] = {
            "namespace": "ns",
            "backend": "processes",
            "coordinator": "http://c",
            "selectors": ["http://s0"],
        }
        file = StoredFile(name="model.safetensors", role="model", key=MODEL.key, sha256=MODEL.sha256, size=MODEL.size)
        return [
            ProblemCreated(problem_id=problem_id, plan=PLAN, setter="setter", **about),
            FilesStored(problem_id=problem_id, files=[file]),
            ParticipationRequested(problem_id=problem_id, organization="Clinic A"),
            ParticipationApproved(problem_id=problem_id, organization="Clinic A"),
            ProblemStarted(problem_id=problem_id, run=1, plan=PLAN, model=MODEL),
            InfraSpawned(problem_id=problem_id, run=1, **infra),
            *(self.round(problem_id, report, stage) for report, stage in enumerate(STAGES, 1)),
        ]

    def round(self, problem_id: str, report: int, stage: Any, number: int = 1) -> RoundUpdated:
        """A report on a round."""
        done = stage == "completed"
        return RoundUpdated(
            problem_id=problem_id,
            run=1,
            report=report,
            round=number,
            attempt=1,
            stage=stage,
            goal_count=2,
            minimum_count=2,
            reported=2 if done else 0,
            participants=["Clinic A"] if done else [],
            metrics={"loss": 1 / number} if done else {},
            checkpoint=Checkpoint(key=f"k/{number}.safetensors", sha256="b" * 64, size=9) if done else None,
            reason=f"{stage}, said in words",
        )

    async def answer(self, request: Request, command: Command) -> Reply:
        """What the services would do, in short."""
        self.requests.append((request, command))
        if self.refusal:
            raise self.refusal
        if isinstance(command, commands.IssueToken):
            return Reply(result=commands.IssuedToken(token="a.b.c", expires=2_000_000_000))
        if isinstance(command, commands.PresignDownload):
            return Reply(result=commands.Download(url=f"https://s3.test/{command.key}", seconds=600))
        if isinstance(command, commands.PrepareUpload):
            slots = [commands.UploadSlot(name=f.name, url="https://s3.test/up", headers={}) for f in command.files]
            return Reply(result=commands.UploadSlots(slots=slots, seconds=600))
        return Reply(position=await self.record(_event(request.actor, command)))

    @property
    def projector(self) -> Projector:
        """The gateway's own projection."""
        return self.app[PARTS].reads._projector

    @property
    def feed(self) -> Feed:
        """The gateway's own feed."""
        return self.app[PARTS].feed

    async def rows(self) -> dict[str, list[tuple[Any, ...]]]:
        """Every row of the read model."""
        pool = self.app[PARTS].reads._pool
        names = PROJECTION.names
        return {
            name: [tuple(row) for row in await pool.fetch(f"select * from {name} order by 1, 2, 3")] for name in names
        }

    @asynccontextmanager
    async def client(self, role: str | None) -> AsyncIterator[aiohttp.ClientSession]:
        """Somebody with a role's token, or with none."""
        headers = {"Authorization": f"Bearer {TOKENS[role]}"} if role else {}
        jar = aiohttp.CookieJar(unsafe=True)  # cookies of an address without a name
        async with aiohttp.ClientSession(self.url, headers=headers, cookie_jar=jar) as session:
            yield session


def _event(actor: str, command: Any) -> EventData:
    named = {name: getattr(command, name) for name in command.__struct_fields__}
    match command:
        case commands.CreateProblem():
            return ProblemCreated(**named, setter=actor)
        case commands.ReviseProblem():
            revised = {name: value for name, value in named.items() if value is not None}
            whole = {"name": "n", "description": "d", "data_format": "f", "client_image": "i", "plan": PLAN}
            return ProblemRevised(**{**whole, **revised})
        case commands.StartProblem():
            return ProblemStarted(**named, run=1, plan=PLAN, model=MODEL)
        case commands.StopProblem():
            return ProblemStopped(**named, run=1)
        case commands.RequestParticipation():
            return ParticipationRequested(**named)
        case commands.ApproveParticipation():
            return ParticipationApproved(**named)
        case commands.RefuseParticipation():
            return ParticipationRefused(**named)
        case commands.RevokeParticipation():
            return ParticipationRevoked(**named)
        case commands.StoreFiles():
            files = [
                StoredFile(name=f.name, role=f.role, key=f"k/{f.name}", sha256=f.sha256, size=f.size)
                for f in command.files
            ]
            return FilesStored(problem_id=command.problem_id, files=files)
    raise AssertionError(command)


def _as_role(url: str, process: str) -> Secret:
    parts = urlsplit(url)
    place = parts.netloc.rpartition("@")[2]
    return Secret(urlunsplit(parts._replace(netloc=f"{role_of(process)}:{_PASSWORD}@{place}")))


def write_tokens(path: Path) -> Path:
    """A tokens file with a token of each role, and one of an organization by name."""
    entries = [
        {"role": "organization" if name == "clinic" else name, "sha256": hashlib.sha256(token.encode()).hexdigest()}
        | ({"organization": "Clinic A"} if name == "clinic" else {})
        for name, token in TOKENS.items()
    ]
    path.write_bytes(msgspec.json.encode(entries))
    path.chmod(0o600)
    return path


async def _forget_stream(url: str, credentials: Path | None) -> None:
    """The log of this test is a new one: what the stream holds is another's."""
    client = await nats.connect(url, user_credentials=str(credentials) if credentials else None)
    try:
        await client.jetstream().delete_stream(subjects.STREAM)
    except NotFoundError:
        pass
    finally:
        await client.close()


@pytest.fixture
async def platform(servers: Any, database_url: str, tmp_path: Path) -> AsyncIterator[Platform]:
    """A gateway that runs, with an empty log."""
    keys = servers.nats_keys
    await migrate(database_url, dict.fromkeys(PROCESSES, _PASSWORD))
    await _forget_stream(servers.nats_url, keys["anything"])
    made = Platform()
    settings = Settings(
        database_url=_as_role(database_url, "gateway"),
        nats_url=servers.nats_url,
        nats_credentials=keys.get("gateway"),
        tokens_file=write_tokens(tmp_path / "tokens.json"),
        heartbeat=0.2,
    )
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        for owner in ("problems", "storage", "orchestrator", "rounds"):
            pool = await enter(connect_pool(_as_role(database_url, owner), owner, size=2))
            made.logs[owner] = await enter(EventLog.open(pool))
        bus = await enter(Bus.connect(servers.nats_url, "relay", keys.get("relay")))
        pool = await enter(connect_pool(_as_role(database_url, "relay"), "relay", size=2))
        relay = Relay(await enter(EventLog.open(pool)), bus)
        wake = asyncio.Event()
        await enter(Service("relay").running("relay", relay.run(wake)))
        listener = await asyncpg.connect(_as_role(database_url, "relay").reveal())
        stack.push_async_callback(listener.close)
        await listen(listener, wake)
        for owner in ("problems", "storage"):
            service = await enter(Bus.connect(servers.nats_url, owner, keys.get(owner)))
            mine = [kind for name, kind in commands.OWNERS.values() if name == owner]
            await service.answer_commands(dict.fromkeys(mine, made.answer))
        made.app = create_app(settings)
        made.url = await enter(serving(made.app, "127.0.0.1", 0))
        yield made
