"""The story: a setter publishes a problem, three hospitals join, they train, the final model is scored."""

import asyncio
import hashlib
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from fedota.client.api import Api, LocalFile
from fedota.contracts.kit import Kit
from fedota.errors import FedotaError
from fedota.events import Event
from fedota.events.orchestrator import InfraDegraded, InfraFailed, InfraRecovered, InfraSpawned, InfraStopped
from fedota.events.problems import Plan, ProblemCompleted, ProblemStopped
from fedota.events.rounds import RoundUpdated
from fedota.events.storage import FilesStored
from fedota.kernel.files import last_lines, private_directory, write_private
from fedota.kernel.processes import Guarded, spawn
from fedota.local.background import LOG, Detached, Progress, supervisor_argv, wait_for_start
from fedota.local.demo.example import Example, Scores
from fedota.local.demo.screen import Screen
from fedota.local.platform import MODULES, read_tokens
from fedota.local.state import LocalError

_SERVERS: Final = {
    "postgres": ("PostgreSQL", "the append-only event log"),
    "nats": ("NATS", "JetStream, the event stream"),
    "s3": ("SeaweedFS", "the S3 object store"),
}
_PROCESSES: Final = {"gateway": "the gateway for people", "notary": "signs checkpoints of the log"}
_STOP_GRACE: Final = 40.0  # seconds
_LONGEST: Final = 600.0  # seconds for the whole training
_FAREWELL: Final = {"FEDOTA_FAREWELL": "1"}  # seconds: all hospitals wait when it ends, and then so does the story


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What `fedota demo --json` prints."""

    problem_id: str
    gateway_url: str
    rounds: list[dict[str, Any]]
    accuracy: dict[str, Any]
    events: dict[str, int]
    model: dict[str, Any]
    seconds: float


class Stage(NamedTuple):
    """Where the story plays."""

    directory: Path
    screen: Screen
    example: Example
    began: float

    @property
    def data(self) -> Path:
        """One folder of patients for each hospital."""
        return self.directory / "hospitals"

    @property
    def initial(self) -> Path:
        """The setter's initial model."""
        return self.directory / "setter" / "model.safetensors"


class Training(NamedTuple):
    """How a training went."""

    completed: ProblemCompleted
    rounds: list[RoundUpdated]


async def play(directory: Path, screen: Screen, *, keep: bool) -> Result:
    """Play the whole story in an empty directory. Raises `LocalError` when it does not come to its end."""
    began = time.monotonic()
    screen.title("Fedota: three hospitals train one model together, and no patient leaves a hospital.")
    stage = Stage(directory, screen, await asyncio.to_thread(Example), began)
    await asyncio.to_thread(_write_files, stage)
    screen.chapter("The platform starts")
    async with _platform(stage, keep=keep) as progress:
        return await _tell(stage, progress.gateway_url)


def _write_files(stage: Stage) -> None:
    private_directory(stage.initial.parent)
    private_directory(stage.data)
    stage.example.problem.write_initial_model(stage.initial)
    stage.example.problem.write_data(stage.data)
    (stage.initial.parent / "data-format.md").write_text(stage.example.problem.DATA_FORMAT + "\n")


@asynccontextmanager
async def _platform(stage: Stage, *, keep: bool) -> AsyncIterator[Progress]:
    """The platform in its own process tree: it ends with us, unless it is to be kept and the story came to its end."""
    directory = private_directory(stage.directory / "platform")
    stop, ended = await (_detached if keep else _guarded)(directory)
    try:
        yield await asyncio.to_thread(wait_for_start, directory, lambda name: _tell_up(stage.screen, name), ended)
    except BaseException:
        await stop()
        raise
    if not keep:
        await stop()


async def _detached(directory: Path) -> tuple[Callable[[], Awaitable[None]], Callable[[], bool]]:
    """How to stop a platform that goes on without us, and whether it has ended."""
    supervisor = Detached(directory, {**_FAREWELL, **os.environ})
    return lambda: asyncio.to_thread(supervisor.stop), lambda: supervisor.ended


async def _guarded(directory: Path) -> tuple[Callable[[], Awaitable[None]], Callable[[], bool]]:
    """How to stop a platform that ends when we do, and whether it has ended."""
    environment = {name: value for name, value in os.environ.items() if name.startswith("FEDOTA_")}
    supervisor = await spawn(
        supervisor_argv(directory), directory=directory, env={**_FAREWELL, **environment}, log=directory / LOG
    )
    return lambda: supervisor.stop(_STOP_GRACE), lambda: supervisor.ended


def _tell_up(screen: Screen, name: str) -> None:
    if name in _SERVERS:
        screen.done(*_SERVERS[name])
    elif name in MODULES:
        screen.done(name, _PROCESSES.get(name, "service"))


async def _tell(stage: Stage, url: str) -> Result:
    tokens = read_tokens(stage.directory / "platform")
    async with (
        Api.open(url, tokens["setter"]) as setter,
        Api.open(url, tokens["organization"]) as organization,
    ):
        problem_id = await _publish(stage, setter, url)
        await _join(stage, problem_id, setter, organization)
        training = await _train(stage, problem_id, setter, organization)
        return await _conclude(stage, problem_id, url, setter, training)


async def _publish(stage: Stage, setter: Api, url: str) -> str:
    problem, screen = stage.example.problem, stage.screen
    screen.chapter("A setter publishes a problem")
    plan = Plan(
        rounds=problem.ROUNDS,
        goal_count=len(stage.example.hospitals),
        minimum_fraction=1.0,
        selection_timeout=60,
        report_timeout=60,
        selectors=2,
        client_config=problem.CLIENT_CONFIG,
    )
    problem_id = await setter.create_problem(
        name=problem.NAME,
        description=problem.DESCRIPTION,
        data_format=problem.DATA_FORMAT,
        client_image=problem.CLIENT_IMAGE,
        plan=plan,
    )
    screen.done("problem", f"“{problem.NAME}”: {plan.rounds} rounds, goal count {plan.goal_count}")
    screen.done("page", f"{url}/problems/{problem_id}")
    await setter.upload(
        problem_id, [LocalFile(stage.initial, "model"), LocalFile(stage.initial.parent / "data-format.md")]
    )
    stored = [event.data for event in await setter.events(problem_id) if isinstance(event.data, FilesStored)]
    for file in (file for data in stored for file in data.files):
        screen.done("file in S3", f"{file.name}, {file.size} bytes, sha256 {file.sha256[:12]}…")
    return problem_id


async def _join(stage: Stage, problem_id: str, setter: Api, organization: Api) -> None:
    stage.screen.chapter("Three hospitals ask to take part, and the setter lets them in")
    for hospital in stage.example.hospitals:
        await organization.request_participation(problem_id, hospital)
        await setter.approve_participation(problem_id, hospital)
        benign, malignant = stage.example.counts(stage.data, hospital)
        stage.screen.done("hospital", f"{hospital}: {benign} benign, {malignant} malignant cases")


async def _train(stage: Stage, problem_id: str, setter: Api, organization: Api) -> Training:
    stage.screen.chapter("Training starts")
    await setter.start(problem_id)
    async with AsyncExitStack() as hospitals:
        try:
            async with asyncio.timeout(_LONGEST):
                return await _follow(stage, problem_id, setter, organization, hospitals)
        except TimeoutError:
            raise LocalError(f"The training did not end within {_LONGEST:g} seconds.") from None


async def _follow(stage: Stage, problem_id: str, setter: Api, organization: Api, hospitals: AsyncExitStack) -> Training:
    rounds: list[RoundUpdated] = []
    completed: ProblemCompleted | None = None
    async with aclosing(_events(setter, problem_id)) as events:
        async for event in events:
            match event.data:
                case InfraSpawned() as data:
                    organization.saw(event.position)
                    await _show_infrastructure(stage, data)
                    await _start_hospitals(stage, problem_id, organization, hospitals)
                    hospitals.enter_context(stage.screen.following(stage.example.problem.ROUNDS))
                case RoundUpdated() as data:
                    stage.screen.round(data)
                    rounds.append(data)
                case InfraDegraded(component=component, reason=reason):
                    stage.screen.note(f"{component} {reason} and is started again")
                case InfraRecovered(component=component):
                    stage.screen.note(f"{component} runs again")
                case InfraFailed(reason=reason, log=log):
                    raise LocalError("\n    ".join([f"The infrastructure failed: {reason}", *log]))
                case ProblemStopped(reason=reason):
                    raise LocalError(f"The training was stopped: {reason}")
                case ProblemCompleted() as data:
                    completed = data
                case InfraStopped() if completed:
                    return Training(completed, rounds)
    raise LocalError("The event stream ended before the training did.")


async def _events(api: Api, problem_id: str) -> AsyncGenerator[Event, None]:
    """A problem's events from the first on; a broken stream goes on where it was."""
    position = 0
    while True:
        try:
            async with aclosing(api.follow(problem_id, position)) as stream:
                async for event in stream:
                    position = event.position
                    yield event
        except FedotaError as error:
            if error.problem.code != "unavailable":
                raise
            await asyncio.sleep(error.problem.retry_after or 0.5)


async def _show_infrastructure(stage: Stage, spawned: InfraSpawned) -> None:
    stage.screen.done("namespace", spawned.namespace)
    stage.screen.done("coordinator", spawned.coordinator)
    for address in spawned.selectors:
        stage.screen.done("selector", address)


async def _start_hospitals(stage: Stage, problem_id: str, organization: Api, stack: AsyncExitStack) -> None:
    """One client process for each hospital, with its kit and its own folder of data; they end with the stack."""
    for hospital in stage.example.hospitals:
        kit = await organization.kit(problem_id, hospital)
        process = await _start_client(stage, hospital, kit)
        stack.push_async_callback(_end_client, stage, hospital, process)
        stage.screen.done("client", f"{hospital} trains beside its own data")
    stage.screen.chapter("Rounds (metrics are those of the model that a round starts from)")


async def _start_client(stage: Stage, hospital: str, kit: Kit) -> Guarded:
    directory = private_directory(stage.directory / "clients" / hospital)
    write_private(directory / "kit.json", msgspec.json.encode(kit))
    options = ["--kit", str(directory / "kit.json"), "--data", str(stage.data / hospital)]
    argv = [sys.executable, "-m", "fedota", "client", "run", *options, str(stage.example.train_file)]
    return await spawn(argv, directory=directory, env={"OMP_NUM_THREADS": "1"}, log=directory / "log")


async def _end_client(stage: Stage, hospital: str, process: Guarded) -> None:
    """A client ends by itself when it hears that the training is over; one that failed says why."""
    if not process.ended:
        await process.stop(5)
    elif code := await process.wait():
        lines = "\n    ".join(last_lines(stage.directory / "clients" / hospital / "log"))
        stage.screen.note(f"The client of {hospital} ended with exit code {code}:\n    {lines}")


async def _conclude(stage: Stage, problem_id: str, url: str, setter: Api, training: Training) -> Result:
    stage.screen.chapter("The final model comes back")
    model, final = training.completed.model, stage.directory / "final.safetensors"
    await setter.download_model(problem_id, final)
    content = final.read_bytes()
    if (len(content), hashlib.sha256(content).hexdigest()) != (model.size, model.sha256):
        raise LocalError("The model that came out of S3 is not the one that the log names.")
    stage.screen.done("model", f"{model.size} bytes, sha256 {model.sha256[:12]}… as the log says")
    scores = await asyncio.to_thread(stage.example.score, stage.data, stage.initial, final, training.completed.rounds)
    stage.screen.scores(scores, sum(stage.example.counts(stage.data, "held-out")))
    if scores.shortfall:
        raise LocalError(scores.shortfall)
    return Result(
        problem_id=problem_id,
        gateway_url=url,
        rounds=[_round(update) for update in training.rounds if update.stage in ("completed", "abandoned")],
        accuracy=_accuracy(scores),
        events=dict(sorted(Counter(event.type for event in await setter.events(problem_id)).items())),
        model={"key": model.key, "sha256": model.sha256, "bytes": model.size},
        seconds=round(time.monotonic() - stage.began, 2),
    )


def _round(update: RoundUpdated) -> dict[str, Any]:
    names = ("round", "attempt", "stage", "participants", "metrics", "seconds")
    return {name: getattr(update, name) for name in names}


def _accuracy(scores: Scores) -> dict[str, Any]:
    return {"federated": scores.federated, "pooled": scores.pooled, "alone": scores.alone}
