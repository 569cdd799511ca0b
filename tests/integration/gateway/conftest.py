"""The gateway between real servers; the services behind it are played by the tests."""

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web

from fedota.contracts import commands
from fedota.contracts.commands import AnnouncedFile, Command, Reply, Request, UploadSlot
from fedota.errors import FedotaError
from fedota.events import CATALOGUE, Event, EventData, NewEvent
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
from fedota.events.rounds import Checkpoint, Contribution, RoundUpdated
from fedota.events.storage import FilesStored, StoredFile
from fedota.kernel.database import Pool
from fedota.kernel.event_log import Append, Context
from fedota.kernel.projection import Projector
from gateway.app import create_app
from gateway.parts import PARTS
from gateway.projection import PROJECTION
from gateway.settings import Settings
from gateway.stream import Feed
from tests.support.servers import RunningServers
from tests.support.services import Platform, Running, running

TOKENS = {name: f"fdt_{name}_made_up" for name in ("setter", "organization", "operator", "clinic")}
PLAN = Plan(rounds=3, goal_count=2)
MODEL = ModelFile(key="k/model.safetensors", sha256="a" * 64, size=10)
STAGES = ("selection", "configuration", "reporting", "completed")
GIVEN = [
    Contribution(organization="Clinic A", updates=1, examples=300, size=4000, seconds=1.5, clipped=1),
    Contribution(organization="Clinic B", updates=1, examples=100, size=4000, seconds=2.5),
    Contribution(organization="Clinic C", refusals={"update_not_finite": 2}),
]


class Stage:
    """Everything that the gateway meets: log, relay and bus, the services' answers, and itself at its own address."""

    def __init__(self, platform: Platform) -> None:
        self.ground = platform
        self.record = platform.record
        self.s3_url = platform.servers.s3.url
        self.gateway: Running
        self.requests: list[tuple[Request, Command]] = []
        self.refusal: FedotaError | None = None
        self.slot: Callable[[AnnouncedFile], UploadSlot] = _nowhere

    @property
    def url(self) -> str:
        """Where the gateway answers."""
        return self.gateway.url

    @property
    def app(self) -> web.Application:
        """The gateway."""
        return self.gateway.app

    def story(self, problem_id: str) -> list[EventData]:
        """A problem from its publication to the end of its first round."""
        about = {"name": "Name", "description": "About", "data_format": "csv", "client_image": "registry.test/i"}
        infra: dict[str, Any] = {
            "namespace": "ns",
            "backend": "processes",
            "coordinator": "http://c",
            "selectors": ["http://s0"],
            "authority": "PEM",
        }
        file = StoredFile(name="model.safetensors", role="model", key=MODEL.key, sha256=MODEL.sha256, size=MODEL.size)
        return [
            ProblemCreated(problem_id=problem_id, plan=PLAN, **about),
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
            participants=["Clinic A", "Clinic B"] if done else [],
            examples=400 if done else 0,
            contributions=GIVEN if done else [],
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
            slots = [self.slot(file) for file in command.files]
            return Reply(result=commands.UploadSlots(slots=slots, seconds=600))
        return Reply(position=await self.record(_event(command), actor=request.actor))

    async def follow_up(self, cause: Event, *events: EventData) -> list[Event]:
        """Events that their owners record because of another one."""
        found: list[Event] = []
        for data in events:
            owner = CATALOGUE[type(data).__name__].owner
            subject = f"{owner}/{data.problem_id}"
            append = Append(subject=subject, events=[NewEvent(data=data)], context=Context.of_event(owner, cause))
            await self.ground.logs[owner].append(append)
            found.append((await self.ground.events(subject))[-1])
        return found

    @property
    def projector(self) -> Projector:
        """The gateway's own projection."""
        return self.app[PARTS].reads._projector

    @property
    def pool(self) -> Pool:
        """The gateway's own connections."""
        return self.app[PARTS].reads._pool

    @property
    def feed(self) -> Feed:
        """The gateway's own feed."""
        return self.app[PARTS].feed

    async def rows(self) -> dict[str, list[tuple[Any, ...]]]:
        """Every row of the read model."""
        pool = self.pool
        names = PROJECTION.names
        return {
            name: [tuple(row) for row in await pool.fetch(f"select * from {name} order by 1, 2, 3, 4, 5")]
            for name in names
        }

    @asynccontextmanager
    async def client(self, role: str | None) -> AsyncIterator[aiohttp.ClientSession]:
        """Somebody with a role's token, or with none."""
        headers = {"Authorization": f"Bearer {TOKENS[role]}"} if role else {}
        jar = aiohttp.CookieJar(unsafe=True)  # cookies of an address without a name
        async with aiohttp.ClientSession(self.url, headers=headers, cookie_jar=jar) as session:
            yield session


def _nowhere(file: AnnouncedFile) -> UploadSlot:
    return UploadSlot(name=file.name, url="https://s3.test/up", headers={})


def _event(command: Any) -> EventData:
    named = {name: getattr(command, name) for name in command.__struct_fields__}
    match command:
        case commands.CreateProblem():
            return ProblemCreated(**named)
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


@pytest.fixture
async def platform(servers: RunningServers, migrated_url: str, tmp_path: Path) -> AsyncIterator[Stage]:
    """A gateway that runs, with an empty log."""
    async with Platform.open(servers, migrated_url) as ground, AsyncExitStack() as stack:
        stage = Stage(ground)
        for owner in ("problems", "storage"):
            service = await stack.enter_async_context(ground.bus(owner))
            mine = [kind for name, kind in commands.OWNERS.values() if name == owner]
            await service.answer_commands(dict.fromkeys(mine, stage.answer))
        files = {"tokens_file": write_tokens(tmp_path / "tokens.json"), "s3_public_url": stage.s3_url}
        settings = ground.settings(Settings, "gateway", heartbeat=0.2, **files)
        stage.gateway = await stack.enter_async_context(running(create_app, settings))
        yield stage
