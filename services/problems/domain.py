"""What may happen to a problem and to the organizations that take part in it: pure functions, no I/O."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal
from uuid import UUID

import msgspec

from fedota.contracts.commands import (
    ApproveParticipation,
    Command,
    CreateProblem,
    RefuseParticipation,
    RequestParticipation,
    ReviseProblem,
    RevokeParticipation,
    StartProblem,
    StopProblem,
)
from fedota.errors import FedotaError
from fedota.events import EventData, to_json
from fedota.events.orchestrator import InfraFailed
from fedota.events.problems import (
    ModelFile,
    ParticipationApproved,
    ParticipationRefused,
    ParticipationRequested,
    ParticipationRevoked,
    Plan,
    ProblemCompleted,
    ProblemCreated,
    ProblemRevised,
    ProblemStarted,
    ProblemStopped,
)
from fedota.events.rounds import RoundUpdated
from fedota.events.storage import FilesDeleted, FilesStored, StoredFile

Phase = Literal["draft", "running", "stopped", "completed"]
Membership = Literal["requested", "approved", "refused", "revoked"]

STRATEGIES: Final = ("fedavg",)
CONFIG_BYTES: Final = 64 * 1024
CONFIG_DEPTH: Final = 16
# The grammar of github.com/distribution/reference: a registry's host and port, a path in lower case, tag and digest.
_LABEL: Final = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_HOST: Final = rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-fA-F:]+\])"
_PART: Final = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_IMAGE: Final = re.compile(
    rf"(?P<name>(?:{_HOST}(?::[0-9]{{1,5}})?/)?{_PART}(?:/{_PART})*)"
    r"(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?"
    r"(?:@(?:sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}))?"
)
_NAME_LENGTH: Final = 255
_PHRASES: Final[dict[Phase, str]] = {
    "draft": "was not started yet",
    "running": "is running",
    "stopped": "is stopped",
    "completed": "is completed",
}


class State(msgspec.Struct, frozen=True, kw_only=True):
    """A problem as its own stream tells it. `run` is the newest start; `members` are organizations by name."""

    name: str
    description: str
    data_format: str
    client_image: str
    plan: Plan
    phase: Phase = "draft"
    run: int = 0
    members: dict[str, Membership] = {}


def evolve(state: State | None, data: EventData) -> State | None:
    """The state after an event of the problem's own stream; None before it was created."""
    if isinstance(data, ProblemCreated):
        return State(**_description(data))
    assert state is not None, f"{type(data).__name__} before ProblemCreated"
    match data:
        case ProblemRevised():
            return msgspec.structs.replace(state, **_description(data))
        case ProblemStarted(run=run):
            return msgspec.structs.replace(state, phase="running", run=run)
        case ProblemStopped():
            return msgspec.structs.replace(state, phase="stopped")
        case ProblemCompleted():
            return msgspec.structs.replace(state, phase="completed")
        case ParticipationRequested(organization=organization):
            return _with(state, organization, "requested")
        case ParticipationApproved(organization=organization):
            return _with(state, organization, "approved")
        case ParticipationRefused(organization=organization):
            return _with(state, organization, "refused")
        case ParticipationRevoked(organization=organization):
            return _with(state, organization, "revoked")
    return state


def _description(data: ProblemCreated | ProblemRevised | State) -> dict[str, Any]:
    return {name: getattr(data, name) for name in ("name", "description", "data_format", "client_image", "plan")}


def _with(state: State, organization: str, membership: Membership) -> State:
    return msgspec.structs.replace(state, members={**state.members, organization: membership})


def model_of(events: Iterable[EventData]) -> ModelFile | None:
    """Where training starts, from what storage recorded of the problem, oldest first; None without such a file."""
    files: dict[str, StoredFile] = {}
    for data in events:
        match data:
            case FilesStored(files=stored):
                files |= {file.name: file for file in stored}
            case FilesDeleted(names=names):
                files = {name: file for name, file in files.items() if name not in names}
    models = [file for file in files.values() if file.role == "model"]
    return ModelFile(key=models[-1].key, sha256=models[-1].sha256, size=models[-1].size) if models else None


def decide(state: State | None, command: Command, *, model: ModelFile | None = None) -> Sequence[EventData]:
    """What the command makes happen. Raises `FedotaError`, which says what to do next.

    `model` is the problem's stored model; nothing but a start looks at it.
    """
    _require_text(command)
    if isinstance(command, CreateProblem):
        return [_create(state, command)]
    state = existing(state)
    match command:
        case ReviseProblem():
            return [_revise(state, command)]
        case StartProblem(problem_id=problem_id):
            return [_start(state, problem_id, model)]
        case StopProblem(problem_id=problem_id, reason=reason):
            if state.phase != "running":
                raise _wrong_phase(state, "Only a training that runs can be stopped.")
            return [ProblemStopped(problem_id=problem_id, run=state.run, reason=reason)]
    return [_decide_membership(state, command)]


def existing(state: State | None) -> State:
    """The state. Raises `problem_not_found` when there is none."""
    if state is None:
        raise FedotaError("problem_not_found", "No problem has this id. Look it up in the list of problems.")
    return state


def react(state: State | None, data: EventData) -> Sequence[EventData]:
    """What somebody else's event makes happen to the run that it is about; nothing when that run is over."""
    run = state.run if state and state.phase == "running" else None
    match data:
        case RoundUpdated(final=True, stage="completed", checkpoint=result) if data.run == run and result:
            model = ModelFile(key=result.key, sha256=result.sha256, size=result.size)
            return [ProblemCompleted(problem_id=data.problem_id, run=data.run, rounds=data.round, model=model)]
        case RoundUpdated(final=True, stage="abandoned") if data.run == run:
            return [ProblemStopped(problem_id=data.problem_id, run=data.run, reason=data.reason)]
        case InfraFailed() if data.run == run:
            return [ProblemStopped(problem_id=data.problem_id, run=data.run, reason=data.reason)]
    return []


def require_approved(state: State | None, organization: str) -> None:
    """Raise unless the organization takes part in the problem."""
    membership = existing(state).members.get(organization)
    if membership != "approved":
        raise _wrong_membership(organization, membership, "Tokens are for organizations that are approved.")


def _create(state: State | None, command: CreateProblem) -> ProblemCreated:
    if state is not None:
        raise FedotaError("problem_exists", "There is a problem with this id already. Publish yours with a new id.")
    _require_problem_id(command.problem_id)
    data = ProblemCreated(**msgspec.structs.asdict(command))
    _validate(data)
    return data


def _revise(state: State, command: ReviseProblem) -> ProblemRevised:
    if state.phase != "draft":
        raise _wrong_phase(state, "A problem can be changed before its first start only. Publish a new one.")
    changes = {name: value for name, value in msgspec.structs.asdict(command).items() if value is not None}
    data = ProblemRevised(**{**_description(state), **changes})
    _validate(data)
    return data


def _start(state: State, problem_id: str, model: ModelFile | None) -> ProblemStarted:
    if state.phase == "completed":
        raise _wrong_phase(state, "Its last round is done. Publish a new problem to train on.")
    if state.phase == "running":
        raise _wrong_phase(state, "Stop it before you start it again.")
    if model is None:
        raise FedotaError(
            "files_missing", "The problem has no file of the role model. Upload one, then start the problem again."
        )
    return ProblemStarted(problem_id=problem_id, run=state.run + 1, plan=state.plan, model=model)


def _decide_membership(state: State, command: Command) -> EventData:
    match command:
        case RequestParticipation(organization=name):
            _require_membership(state, name, (None, "refused", "revoked"), "There is nothing to request.")
            if state.phase == "completed":
                raise _wrong_phase(state, "Nobody can join it any more.")
            return ParticipationRequested(problem_id=command.problem_id, organization=name)
        case ApproveParticipation(organization=name):
            _require_membership(state, name, ("requested",), "Only a request that is open can be approved.")
            return ParticipationApproved(problem_id=command.problem_id, organization=name)
        case RefuseParticipation(organization=name, reason=reason):
            hint = "Only a request that is open can be refused; revoke a participation that is approved."
            _require_membership(state, name, ("requested",), hint)
            return ParticipationRefused(problem_id=command.problem_id, organization=name, reason=reason)
        case RevokeParticipation(organization=name, reason=reason):
            hint = "Only a participation that is approved can be revoked; refuse a request that is open."
            _require_membership(state, name, ("approved",), hint)
            return ParticipationRevoked(problem_id=command.problem_id, organization=name, reason=reason)
    raise AssertionError(f"{type(command).__name__} is not a command to problems")


def _require_membership(state: State, organization: str, allowed: Sequence[Membership | None], hint: str) -> None:
    membership = state.members.get(organization)
    if membership not in allowed:
        raise _wrong_membership(organization, membership, hint)


def _wrong_membership(organization: str, membership: Membership | None, hint: str) -> FedotaError:
    if membership is None:
        return FedotaError(
            "participation_not_found", f"{organization} has not asked to take part in this problem. {hint}"
        )
    return FedotaError("participation_state", f"The participation of {organization} is {membership}. {hint}")


def _wrong_phase(state: State, hint: str) -> FedotaError:
    return FedotaError("problem_state", f"The problem {_PHRASES[state.phase]}. {hint}")


def _require_text(command: Command) -> None:
    """PostgreSQL's text holds no NUL: an event that has one could be recorded and never be shown."""
    texts = msgspec.structs.asdict(command).items()
    if faults := {name: "holds a NUL character" for name, text in texts if isinstance(text, str) and "\0" in text}:
        raise _invalid(faults)


def _require_problem_id(problem_id: str) -> None:
    """The id becomes part of NATS subjects and of keys in the object store: nothing but a plain UUID may."""
    try:
        if str(UUID(problem_id)) == problem_id:
            return
    except ValueError:
        pass
    raise _invalid({"problem_id": "not a UUID in lower case with dashes"})


def _validate(data: ProblemCreated | ProblemRevised) -> None:
    """Raise `invalid_field` for what its type allows and what still makes no sense."""
    faults = {
        "client_image": _image_fault(data.client_image),
        "plan.strategy.name": _strategy_fault(data.plan),
        "plan.strategy.parameters": _parameters_fault(data.plan),
        "plan.client_config": _config_fault(data.plan),
    }
    if found := {field: fault for field, fault in faults.items() if fault}:
        raise _invalid(found)


def _image_fault(image: str) -> str | None:
    match = _IMAGE.fullmatch(image)
    if match is None or len(match["name"]) > _NAME_LENGTH:
        return "not an OCI image reference, such as registry.example/team/client:1.0@sha256:…"
    return None


def _strategy_fault(plan: Plan) -> str | None:
    if plan.strategy.name not in STRATEGIES:
        return f"no strategy that is known; there is {', '.join(STRATEGIES)}"
    return None


def _parameters_fault(plan: Plan) -> str | None:
    if plan.strategy.name in STRATEGIES and plan.strategy.parameters:
        return f"{plan.strategy.name} takes no parameters"
    return None


def _config_fault(plan: Plan) -> str | None:
    """It travels in events: one that is too large for NATS, or too deep for a reader, would hold up all others."""
    if _deeper_than(CONFIG_DEPTH, plan.client_config):
        return f"nested deeper than {CONFIG_DEPTH} levels"
    if (size := len(to_json(plan.client_config))) > CONFIG_BYTES:
        return f"{size} bytes of JSON, more than {CONFIG_BYTES}"
    return None


def _deeper_than(levels: int, value: Any) -> bool:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    if inside is None:
        return False
    return levels == 0 or any(_deeper_than(levels - 1, one) for one in inside)


def _invalid(fields: dict[str, str]) -> FedotaError:
    told = "; ".join(f"{field}: {what}" for field, what in fields.items())
    return FedotaError("invalid_field", f"{told}. Correct it and send the request again.", fields=fields)
