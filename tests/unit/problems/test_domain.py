"""What may happen to a problem, command by command."""

from collections.abc import Sequence
from functools import reduce
from typing import Any, Final

import msgspec
import pytest

from fedota.contracts import commands
from fedota.contracts.commands import Command
from fedota.errors import FedotaError
from fedota.events import EventData
from fedota.events import problems as events
from fedota.events.orchestrator import InfraFailed
from fedota.events.problems import ModelFile, Plan, Strategy
from fedota.events.rounds import Checkpoint, RoundUpdated
from fedota.events.storage import FilesDeleted, FilesStored, StoredFile
from services.problems.domain import (
    CONFIG_BYTES,
    CONFIG_DEPTH,
    State,
    decide,
    evolve,
    model_of,
    react,
    require_approved,
)

ID: Final = "01890a5d-ac96-774b-bcce-b302099a8057"
PLAN: Final = Plan(rounds=3, goal_count=2)
MODEL: Final = ModelFile(key="k/model", sha256="a" * 64, size=10)
ABOUT: Final[dict[str, Any]] = {
    "problem_id": ID,
    "name": "Tumours",
    "description": "About",
    "data_format": "csv",
    "client_image": "registry.test/team/client:1.0",
    "plan": PLAN,
}
CREATED: Final = events.ProblemCreated(**ABOUT)
STARTED: Final = events.ProblemStarted(problem_id=ID, run=1, plan=PLAN, model=MODEL)
STOPPED: Final = events.ProblemStopped(problem_id=ID, run=1, reason="enough")
COMPLETED: Final = events.ProblemCompleted(problem_id=ID, run=1, rounds=3, model=MODEL)
CLINIC: Final[dict[str, Any]] = {"problem_id": ID, "organization": "Clinic A"}
REQUESTED: Final = events.ParticipationRequested(**CLINIC)
APPROVED: Final = events.ParticipationApproved(**CLINIC)
REFUSED: Final = events.ParticipationRefused(**CLINIC, reason="unknown to us")
REVOKED: Final = events.ParticipationRevoked(**CLINIC, reason="left the study")

CREATE: Final = commands.CreateProblem(**ABOUT)
REVISE: Final = commands.ReviseProblem(problem_id=ID, name="Tumors")
START: Final = commands.StartProblem(problem_id=ID)
STOP: Final = commands.StopProblem(problem_id=ID, reason="enough")
REQUEST: Final = commands.RequestParticipation(**CLINIC)
APPROVE: Final = commands.ApproveParticipation(**CLINIC)
REFUSE: Final = commands.RefuseParticipation(**CLINIC, reason="unknown to us")
REVOKE: Final = commands.RevokeParticipation(**CLINIC, reason="left the study")

DRAFT: Final = (CREATED,)
RUNNING: Final = (CREATED, STARTED)
MEMBER: Final = (CREATED, REQUESTED, APPROVED)


def after(*happened: EventData) -> State | None:
    """The state after these events."""
    state: State | None = reduce(evolve, happened, None)
    return state


def refusal(state: State | None, command: Command, model: ModelFile | None = MODEL) -> FedotaError:
    """The error that a command is answered with."""
    with pytest.raises(FedotaError) as caught:
        decide(state, command, model=model)
    assert caught.value.problem.detail.endswith("."), "says nothing in words"
    return caught.value


@pytest.mark.parametrize(
    ("happened", "command", "expected"),
    [
        ((), CREATE, CREATED),
        (DRAFT, REVISE, events.ProblemRevised(**{**ABOUT, "name": "Tumors"})),
        (DRAFT, START, STARTED),
        (RUNNING, STOP, STOPPED),
        ((*RUNNING, STOPPED), START, msgspec.structs.replace(STARTED, run=2)),
        (DRAFT, REQUEST, REQUESTED),
        (RUNNING, REQUEST, REQUESTED),
        ((*RUNNING, STOPPED), REQUEST, REQUESTED),
        ((CREATED, REQUESTED), APPROVE, APPROVED),
        ((CREATED, REQUESTED), REFUSE, REFUSED),
        ((CREATED, REQUESTED, REFUSED), REQUEST, REQUESTED),
        (MEMBER, REVOKE, REVOKED),
        ((*MEMBER, REVOKED), REQUEST, REQUESTED),
        ((*MEMBER, STARTED, COMPLETED), REVOKE, REVOKED),
    ],
)
def test_what_a_command_makes_happen(happened: Sequence[EventData], command: Command, expected: EventData) -> None:
    """Each command has exactly one event, which says what was asked for."""
    assert decide(after(*happened), command, model=MODEL) == [expected]


@pytest.mark.parametrize(
    ("happened", "command", "code"),
    [
        (DRAFT, CREATE, "problem_exists"),
        *(((), command, "problem_not_found") for command in (REVISE, START, STOP, REQUEST, APPROVE, REFUSE, REVOKE)),
        (RUNNING, REVISE, "problem_state"),
        ((*RUNNING, STOPPED), REVISE, "problem_state"),
        (RUNNING, START, "problem_state"),
        ((*RUNNING, COMPLETED), START, "problem_state"),
        (DRAFT, STOP, "problem_state"),
        ((*RUNNING, STOPPED), STOP, "problem_state"),
        ((*RUNNING, COMPLETED), STOP, "problem_state"),
        ((*RUNNING, COMPLETED), REQUEST, "problem_state"),
        ((CREATED, REQUESTED), REQUEST, "participation_state"),
        (MEMBER, REQUEST, "participation_state"),
        (DRAFT, APPROVE, "participation_not_found"),
        (DRAFT, REFUSE, "participation_not_found"),
        (DRAFT, REVOKE, "participation_not_found"),
        (MEMBER, APPROVE, "participation_state"),
        (MEMBER, REFUSE, "participation_state"),
        ((CREATED, REQUESTED), REVOKE, "participation_state"),
        ((CREATED, REQUESTED, REFUSED), APPROVE, "participation_state"),
        ((*MEMBER, REVOKED), APPROVE, "participation_state"),
        ((*MEMBER, REVOKED), REVOKE, "participation_state"),
    ],
)
def test_what_is_refused(happened: Sequence[EventData], command: Command, code: str) -> None:
    """What makes no sense now is refused with its code."""
    assert refusal(after(*happened), command).problem.code == code


def test_a_start_needs_a_model() -> None:
    """A training that has nowhere to begin is not started, and the setter reads what is missing."""
    error = refusal(after(CREATED), START, model=None)
    assert error.problem.code == "files_missing" and "model" in error.problem.detail


def test_refusals_name_the_state() -> None:
    """Whoever is refused reads where the problem or the participation stands."""
    assert "is running" in refusal(after(*RUNNING), START).problem.detail
    assert "is approved" in refusal(after(*MEMBER), REQUEST).problem.detail


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"problem_id": ID.upper()}, "problem_id"),
        ({"problem_id": "abc"}, "problem_id"),
        ({"problem_id": ID.replace("-", "")}, "problem_id"),
        ({"client_image": "Team Client"}, "client_image"),
        ({"client_image": "registry.test/Team/client"}, "client_image"),
        ({"client_image": "https://registry.test/client"}, "client_image"),
        ({"client_image": "registry.test/client:"}, "client_image"),
        ({"client_image": "registry.test/client@sha256:abc"}, "client_image"),
        ({"client_image": "registry.test/client\n"}, "client_image"),
        ({"client_image": "a/" * 140 + "client"}, "client_image"),
        ({"client_image": "-" * 500}, "client_image"),
        ({"client_image": "a-" * 249 + "!"}, "client_image"),
        ({"plan": Plan(rounds=1, goal_count=1, strategy=Strategy(name="magic"))}, "plan.strategy.name"),
        (
            {"plan": Plan(rounds=1, goal_count=1, strategy=Strategy(parameters={"beta": 0.9}))},
            "plan.strategy.parameters",
        ),
        ({"plan": Plan(rounds=1, goal_count=1, client_config={"x": "y" * CONFIG_BYTES})}, "plan.client_config"),
    ],
)
def test_wrong_fields_are_named(changes: dict[str, Any], field: str) -> None:
    """What its type allows and what still makes no sense is refused, by the field's name; so is its revision."""
    error = refusal(None, commands.CreateProblem(**{**ABOUT, **changes}))
    assert error.problem.code == "invalid_field" and list(error.problem.fields) == [field]
    if field != "problem_id":
        error = refusal(after(CREATED), commands.ReviseProblem(problem_id=ID, **changes))
        assert list(error.problem.fields) == [field]


@pytest.mark.parametrize(
    ("command", "field"),
    [
        (msgspec.structs.replace(CREATE, name="a\0b"), "name"),
        (msgspec.structs.replace(CREATE, description="\0"), "description"),
        (msgspec.structs.replace(REVISE, data_format="\0"), "data_format"),
        (msgspec.structs.replace(STOP, reason="\0"), "reason"),
        (msgspec.structs.replace(REVOKE, reason="\0"), "reason"),
    ],
)
def test_text_that_no_table_can_hold_is_refused(command: Command, field: str) -> None:
    """An event with a NUL in it would be parked by every read model."""
    assert list(refusal(after(*MEMBER, STARTED), command).problem.fields) == [field]


def test_all_wrong_fields_are_named_at_once() -> None:
    """Nobody corrects one field to learn of the next."""
    plan = Plan(rounds=1, goal_count=1, strategy=Strategy(name="magic"))
    error = refusal(None, commands.CreateProblem(**{**ABOUT, "client_image": "!", "plan": plan}))
    assert set(error.problem.fields) == {"client_image", "plan.strategy.name"}


@pytest.mark.parametrize(("depth", "allowed"), [(CONFIG_DEPTH, True), (CONFIG_DEPTH + 1, False)])
def test_the_client_config_is_not_too_deep(depth: int, allowed: bool) -> None:
    """One that a reader's stack cannot hold would park every event that has it."""
    inner: list[Any] = []
    for _ in range(depth - 2):
        inner = [inner]
    nested = {"inner": inner}
    command = commands.CreateProblem(**{**ABOUT, "plan": Plan(rounds=1, goal_count=1, client_config=nested)})
    if allowed:
        assert decide(None, command)
    else:
        assert list(refusal(None, command).problem.fields) == ["plan.client_config"]


@pytest.mark.parametrize(
    "image",
    [
        "client",
        "team/client",
        "client:1.0",
        "localhost:5000/client",
        "registry.test/team/client_x/y--z:v1.0_a-b",
        "registry.test:5000/client:1@sha256:" + "0" * 64,
        "client@sha512:" + "0" * 128,
        "[::1]:5000/client",
    ],
)
def test_image_references_that_are_valid(image: str) -> None:
    """All that a container engine would take."""
    assert decide(None, commands.CreateProblem(**{**ABOUT, "client_image": image}))


def test_a_revision_keeps_what_it_does_not_name() -> None:
    """Fields left out stay as they are, over several revisions."""
    longer = commands.ReviseProblem(problem_id=ID, plan=Plan(rounds=9, goal_count=1))
    state = after(CREATED, *decide(after(CREATED), longer))
    [revised] = decide(state, commands.ReviseProblem(problem_id=ID, description="More"))
    assert isinstance(revised, events.ProblemRevised)
    assert (revised.description, revised.plan.rounds, revised.data_format) == ("More", 9, "csv")


def stored(name: str, role: Any, sha256: str) -> FilesStored:
    """A file that storage verified."""
    file = StoredFile(name=name, role=role, key=f"k/{sha256}/{name}", sha256=sha256, size=1)
    return FilesStored(problem_id=ID, files=[file])


@pytest.mark.parametrize(
    ("happened", "sha256"),
    [
        ([], None),
        ([stored("a", "other", "1")], None),
        ([stored("a", "model", "1"), stored("b", "other", "2")], "1"),
        ([stored("a", "model", "1"), stored("a", "model", "2")], "2"),
        ([stored("a", "model", "1"), stored("a", "other", "2")], None),
        ([stored("a", "model", "1"), FilesDeleted(problem_id=ID, names=["a"])], None),
        ([stored("a", "model", "1"), FilesDeleted(problem_id=ID, names=["a"]), stored("c", "model", "3")], "3"),
    ],
)
def test_where_training_starts(happened: list[EventData], sha256: str | None) -> None:
    """The file of role model that is there now."""
    model = model_of(happened)
    assert (model.sha256 if model else None) == sha256


def told(stage: Any, *, run: int = 1, final: bool = True) -> RoundUpdated:
    """A round's report."""
    return RoundUpdated(
        problem_id=ID,
        run=run,
        report=9,
        round=3,
        attempt=5,
        stage=stage,
        goal_count=2,
        minimum_count=2,
        checkpoint=Checkpoint(key="k/3", sha256="b" * 64, size=7) if stage == "completed" else None,
        final=final,
        reason="abandoned: nobody came",
    )


def failed(run: int = 1) -> InfraFailed:
    """The infrastructure gave up."""
    return InfraFailed(problem_id=ID, run=run, namespace="ns", reason="no memory", log=[])


RESULT: Final = ModelFile(key="k/3", sha256="b" * 64, size=7)


@pytest.mark.parametrize(
    ("happened", "event", "expected"),
    [
        (RUNNING, told("completed"), [events.ProblemCompleted(problem_id=ID, run=1, rounds=3, model=RESULT)]),
        (
            RUNNING,
            told("abandoned"),
            [events.ProblemStopped(problem_id=ID, run=1, reason="abandoned: nobody came")],
        ),
        (RUNNING, failed(), [events.ProblemStopped(problem_id=ID, run=1, reason="no memory")]),
        (RUNNING, told("completed", final=False), []),
        (RUNNING, told("abandoned", final=False), []),
        (RUNNING, told("selection", final=False), []),
        (RUNNING, told("completed", run=2), []),
        ((*RUNNING, STOPPED), told("completed"), []),
        ((*RUNNING, STOPPED), failed(), []),
        ((*RUNNING, COMPLETED), told("abandoned"), []),
        ((*RUNNING, STOPPED, msgspec.structs.replace(STARTED, run=2)), told("completed"), []),
        ((*RUNNING, STOPPED, msgspec.structs.replace(STARTED, run=2)), failed(), []),
        (DRAFT, failed(), []),
        ((), failed(), []),
    ],
)
def test_what_ends_a_run(
    happened: Sequence[EventData], event: RoundUpdated | InfraFailed, expected: list[EventData]
) -> None:
    """Only the last word on the run that goes on ends it; a late one on another run does nothing."""
    assert list(react(after(*happened), event)) == expected


@pytest.mark.parametrize(
    ("happened", "code"),
    [
        ((), "problem_not_found"),
        (DRAFT, "participation_not_found"),
        ((CREATED, REQUESTED), "participation_state"),
        ((*MEMBER, REVOKED), "participation_state"),
    ],
)
def test_tokens_are_for_approved_organizations(happened: Sequence[EventData], code: str) -> None:
    """Nobody else gets one."""
    with pytest.raises(FedotaError) as caught:
        require_approved(after(*happened), "Clinic A")
    assert caught.value.problem.code == code
    require_approved(after(*MEMBER), "Clinic A")
