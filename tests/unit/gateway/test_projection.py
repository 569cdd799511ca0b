"""What each event changes in the read model, as values."""

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import msgspec
import pytest

from fedota.events import CATALOGUE, Event, EventData, storage
from fedota.events import orchestrator as infra
from fedota.events import problems as p
from fedota.events.rounds import Checkpoint, Contribution, Refusal, RoundUpdated
from fedota.kernel.tables import Add, Change, Drop, Put, Set
from fedota.words import sentence
from gateway.projection import PROJECTION, changes

_ID = "018f0000-0000-7000-8000-000000000000"
_TIME = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
_PLAN = p.Plan(rounds=3, goal_count=2)
_MODEL = p.ModelFile(key="k", sha256="a" * 64, size=1)
_ABOUT = {"name": "n", "description": "d", "data_format": "f", "client_image": "i", "plan": _PLAN}
_RUN: dict[str, Any] = {"problem_id": _ID, "run": 2, "namespace": "ns"}
_KEY = {"problem_id": _ID}


def event(data: EventData) -> Event:
    """The event as the log would hold it."""
    owner = CATALOGUE[type(data).__name__].owner
    return Event(
        id=UUID(int=1),
        type=type(data).__name__,
        schema=1,
        subject=f"{owner}/{_ID}",
        version=1,
        position=7,
        time=_TIME,
        actor="setter",
        correlation=UUID(int=2),
        data=data,
    )


def state(data: EventData) -> list[Change]:
    """What it changes besides the feed."""
    *found, feed = changes(event(data))
    assert isinstance(feed, Add) and feed.table == "feed"
    return found


def test_a_problem_is_a_draft_at_first() -> None:
    """Everything that the setter said, and when."""
    (put,) = state(p.ProblemCreated(problem_id=_ID, **_ABOUT))  # type: ignore[arg-type]
    assert put == Put(
        "problems",
        _KEY,
        {
            **_ABOUT,
            "setter": "setter",
            "state": "draft",
            "run": 0,
            "reason": "",
            "model": None,
            "created": _TIME,
            "changed": _TIME,
            "position": 7,
        },
    )


@pytest.mark.parametrize(
    ("data", "values"),
    [
        (p.ProblemRevised(problem_id=_ID, **_ABOUT), _ABOUT),  # type: ignore[arg-type]
        (
            p.ProblemStarted(problem_id=_ID, run=2, plan=_PLAN, model=_MODEL),
            {"state": "running", "run": 2, "plan": _PLAN, "reason": "", "model": None},
        ),
        (p.ProblemStopped(problem_id=_ID, run=2, reason="enough"), {"state": "stopped", "reason": "enough"}),
        (
            p.ProblemCompleted(problem_id=_ID, run=2, rounds=3, model=_MODEL),
            {"state": "completed", "reason": "", "model": _MODEL},
        ),
    ],
)
def test_what_happens_to_a_problem(data: EventData, values: dict[str, Any]) -> None:
    """Only the columns that the event speaks of change."""
    assert state(data) == [Set("problems", _KEY, {**values, "changed": _TIME})]


@pytest.mark.parametrize(
    ("data", "values"),
    [
        (p.ParticipationRequested(problem_id=_ID, organization="A"), ("requested", "")),
        (p.ParticipationApproved(problem_id=_ID, organization="A"), ("approved", "")),
        (p.ParticipationRefused(problem_id=_ID, organization="A", reason="no"), ("refused", "no")),
        (p.ParticipationRevoked(problem_id=_ID, organization="A", reason="no"), ("revoked", "no")),
    ],
)
def test_participations(data: EventData, values: tuple[str, str]) -> None:
    """The newest word on an organization stands."""
    row = {"state": values[0], "reason": values[1], "changed": _TIME}
    assert state(data) == [Put("participations", {**_KEY, "organization": "A"}, row)]


def test_files() -> None:
    """Stored files replace those of their name, deleted ones go, rejected ones were never there."""
    file = storage.StoredFile(name="m", role="model", key="k", sha256="a" * 64, size=1)
    key = {**_KEY, "name": "m"}
    values = {"role": "model", "key": "k", "sha256": "a" * 64, "size": 1, "stored": _TIME}
    assert state(storage.FilesStored(problem_id=_ID, files=[file])) == [Put("files", key, values)]
    assert state(storage.FilesDeleted(problem_id=_ID, names=["m"])) == [Drop("files", key)]
    rejected = storage.RejectedFile(name="m", reason="too short")
    assert state(storage.FilesRejected(problem_id=_ID, files=[rejected])) == []


def test_infrastructure_starts_clean() -> None:
    """A launch forgets what an earlier one of the same run left."""
    drop, put = state(infra.InfraSpawned(**_RUN, backend="b", coordinator="c", selectors=["s"], authority="PEM"))
    assert drop == Drop("infrastructure", {**_KEY, "run": 2})
    assert put == Put(
        "infrastructure",
        {**_KEY, "run": 2, "component": ""},
        {
            "state": "running",
            "namespace": "ns",
            "changed": _TIME,
            "backend": "b",
            "coordinator": "c",
            "selectors": ["s"],
            "authority": "PEM",
        },
        {"reason": "", "failure": "", "log": []},
    )


@pytest.mark.parametrize(
    ("data", "component", "values"),
    [
        (
            infra.InfraDegraded(**_RUN, component="selector-0", reason="killed", log=["x"]),
            "selector-0",
            {"state": "degraded", "reason": "killed", "log": ["x"]},
        ),
        (
            infra.InfraRecovered(**_RUN, component="selector-0"),
            "selector-0",
            {"state": "running", "reason": "", "log": []},
        ),
        (
            infra.InfraFailed(**_RUN, reason="no memory", log=["x"]),
            "",
            {"state": "failed", "reason": "no memory", "failure": "no memory", "log": ["x"]},
        ),
        (infra.InfraStopped(**_RUN, reason="removed"), "", {"state": "stopped", "reason": "removed"}),
    ],
)
def test_infrastructure_keeps_what_an_event_does_not_speak_of(
    data: EventData, component: str, values: dict[str, Any]
) -> None:
    """Above all: removing what failed does not hide why it failed."""
    (put,) = state(data)
    assert isinstance(put, Put)
    assert put.key == {**_KEY, "run": 2, "component": component}
    assert put.values == {**values, "namespace": "ns", "changed": _TIME}
    assert set(put.values) | set(put.defaults) == {
        *("state", "namespace", "backend", "coordinator", "selectors", "authority"),
        *("reason", "failure", "log", "changed"),
    }


def test_a_round_is_one_row_an_attempt() -> None:
    """The row holds the newest report, whole; each organization's contribution has a row of its own."""
    update = RoundUpdated(
        problem_id=_ID,
        run=2,
        report=9,
        round=3,
        attempt=1,
        stage="completed",
        goal_count=2,
        minimum_count=2,
        waiting=1,
        selected=2,
        reported=2,
        participants=["A"],
        refusals=[Refusal(organization="B", code="update_not_finite", detail="NaN")],
        examples=10,
        metrics={"loss": 0.5},
        seconds=1.5,
        checkpoint=Checkpoint(key="k", sha256="b" * 64, size=1),
        contributions=[
            Contribution(organization="A", updates=2, examples=10, size=80, seconds=1.2, clipped=1),
            Contribution(organization="B", refusals={"update_not_finite": 1}),
        ],
        final=True,
        reason="2 of 2 reported",
    )
    values = msgspec.structs.asdict(update)
    key = {name: values.pop(name) for name in ("problem_id", "run", "round", "attempt")}
    del values["report"], values["contributions"]
    nothing = {"updates": 0, "examples": 0, "size": 0, "seconds": 0.0, "clipped": 0}
    of_a = {"organization": "A", "updates": 2, "examples": 10, "size": 80, "seconds": 1.2, "clipped": 1, "refusals": {}}
    of_b = {"organization": "B", **nothing, "refusals": {"update_not_finite": 1}}
    assert state(update) == [
        Put("rounds", key, {**values, "changed": _TIME, "position": 7}),
        Add("contributions", {**key, **of_a}),
        Add("contributions", {**key, **of_b}),
    ]


def test_every_event_is_told_in_the_feed() -> None:
    """No type is forgotten, and nobody reads a class's name."""
    assert PROJECTION.kinds is None
    assert PROJECTION.reactions == {}
    feed = changes(event(p.ProblemStopped(problem_id=_ID, run=1, reason="it is over.")))[-1]
    told = {"type": "ProblemStopped", "time": _TIME, "actor": "setter", "said": "Training was stopped: it is over."}
    assert feed == Add("feed", {**_KEY, "position": 7, **told})


_ONLY_TOLD = {"FilesRejected"}  # types that the feed alone tells of
_LEFT_OUT = {  # fields that need no column, or have rows of their own
    "ProblemStopped": {"run"},
    "ProblemCompleted": {"run", "rounds"},
    "FilesStored": {"files"},
    "FilesRejected": {"files"},
    "FilesDeleted": {"names"},
    "RoundUpdated": {"report", "contributions"},
}


@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_each_type_and_each_field_is_projected(name: str) -> None:
    """A new type or field reaches the read model, or is named above as one that does not."""
    kind = CATALOGUE[name].data
    found = state(some(kind))
    assert bool(found) == (name not in _ONLY_TOLD)
    columns = {column for change in found for column in _columns(change)}
    fields = {field.name for field in msgspec.structs.fields(kind)} - {"problem_id"}
    assert fields - columns == _LEFT_OUT.get(name, set())


def test_each_field_of_a_file_and_of_a_contribution_is_a_column() -> None:
    """What is stored of a file, and told of an organization, can be read."""
    (put,) = state(some(storage.FilesStored))
    assert _columns(put) - {"problem_id", "stored"} == set(storage.StoredFile.__struct_fields__)
    told = msgspec.structs.replace(some(RoundUpdated), contributions=[Contribution(organization="A")])
    _, add = state(told)
    attempt = {"problem_id", "run", "round", "attempt"}
    assert _columns(add) - attempt == set(Contribution.__struct_fields__)


def _columns(change: Change) -> set[str]:
    return set(change.row) if isinstance(change, Add) else {*change.key, *getattr(change, "values", {})}


def some(kind: type[EventData]) -> EventData:
    """An event with a value in every field that has to have one."""
    values = {field.name: _some(field.type) for field in msgspec.structs.fields(kind) if field.required}
    if kind is storage.FilesStored:
        values["files"] = [storage.StoredFile(name="m", role="model", key="k", sha256="a" * 64, size=1)]
    if kind is storage.FilesDeleted:
        values["names"] = ["m"]
    return msgspec.convert(values, kind)


@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_each_type_has_a_sentence(name: str) -> None:
    """It starts like a sentence, ends with one full stop and is not the type's name."""
    said = sentence(some(CATALOGUE[name].data))
    assert said[-1] == "." and said[-2] != "." and name not in said


def test_reasons_keep_one_full_stop() -> None:
    """Words of others end with a full stop or without; the sentence around them has one."""
    rejected = [
        storage.RejectedFile(name="m", reason="It is cut off."),
        storage.RejectedFile(name="n", reason="missing"),
    ]
    said = sentence(storage.FilesRejected(problem_id=_ID, files=rejected))
    assert said == "Rejected: m (It is cut off), n (missing)."


def _some(kind: Any) -> Any:
    match kind:
        case _ if kind is int:
            return 1
        case _ if kind is str:
            return "word"
        case _ if kind is p.Plan:
            return _PLAN
        case _ if kind is p.ModelFile:
            return _MODEL
        case _ if "list" in str(kind):
            return []
        case _:
            return "selection"
