"""What files a problem has, and what follows from an upload."""

import hashlib
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from fedota.contracts.commands import AnnouncedFile, StoreFiles
from fedota.events import Event, EventData, uuid7
from fedota.events.storage import FilesDeleted, FilesRejected, FilesStored, RejectedFile, Role
from services.storage.domain import (
    Fault,
    Seen,
    State,
    announcement_faults,
    content_fault,
    decide,
    discarded,
    evolve,
    manifest,
    presence_fault,
    rejection,
    stored_file,
)
from services.storage.keys import file_key

PROBLEM = "01890a5d-ac96-774b-bcce-b302099a8057"
MODEL = save({"w": np.ones(3, "f4")})


def announced(name: str, body: bytes = b"body", role: Role = "other") -> AnnouncedFile:
    """A file as its setter announces it."""
    return AnnouncedFile(name=name, size=len(body), sha256=hashlib.sha256(body).hexdigest(), role=role)


def seen(body: bytes) -> Seen:
    """An object, read to its end."""
    return Seen(len(body), hashlib.sha256(body).hexdigest(), body)


def stored(*files: AnnouncedFile) -> FilesStored:
    """These files, verified."""
    return FilesStored(problem_id=PROBLEM, files=[stored_file(PROBLEM, file) for file in files])


def state_of(*happened: EventData) -> State:
    """The state after these."""
    state = State()
    for version, data in enumerate(happened, 1):
        envelope: dict[str, Any] = {"id": uuid7(), "type": type(data).__name__, "schema": 1, "correlation": uuid7()}
        envelope |= {"subject": f"storage/{PROBLEM}", "time": datetime.now(UTC), "actor": "test"}
        state = evolve(state, Event(**envelope, version=version, position=version, data=data))
    return state


A, A2, B = announced("a", b"1"), announced("a", b"2"), announced("b", b"3")
W, V = announced("w.safetensors", MODEL, "model"), announced("v.safetensors", MODEL, "model")
REJECTED = FilesRejected(problem_id=PROBLEM, files=[RejectedFile(name="a", reason="no")])
DELETED = FilesDeleted(problem_id=PROBLEM, names=["a"])


@pytest.mark.parametrize(
    ("happened", "files"),
    [
        ([], []),
        ([stored(A, B)], [A, B]),
        ([stored(A), stored(B)], [A, B]),
        ([stored(A), stored(A2)], [A2]),
        ([stored(A), REJECTED], [A]),
        ([stored(A, B), DELETED], [B]),
        ([stored(A), DELETED, stored(A)], [A]),
    ],
)
def test_files_are_what_the_events_say(happened: list[EventData], files: list[AnnouncedFile]) -> None:
    """A name means the newest file; the version counts every event, so that appends expect the right one."""
    state = state_of(*happened)
    assert state.files == {file.name: stored_file(PROBLEM, file) for file in files}
    assert state.version == len(happened)


def test_a_key_that_was_ever_verified_stays_known() -> None:
    """Replaced and deleted files stand in the log for good."""
    state = state_of(stored(A), stored(A2), DELETED)
    assert state.keys == {file_key(PROBLEM, A), file_key(PROBLEM, A2)}


@pytest.mark.parametrize(
    ("happened", "files", "faulty"),
    [
        ([], [A, B, W], set()),
        ([stored(W)], [W], set()),
        ([stored(W)], [A], set()),
        ([stored(W)], [announced("w.safetensors", b"new", "model")], set()),
        ([stored(W)], [V, announced("w.safetensors", MODEL)], set()),
        ([stored(W), FilesDeleted(problem_id=PROBLEM, names=[W.name])], [V], set()),
        ([], [A, A2], {"a"}),
        ([], [A, A], {"a"}),
        ([], [W, V, A], {W.name, V.name}),
        ([stored(W)], [V], {V.name}),
        ([stored(W)], [V, A], {V.name}),
    ],
)
def test_an_announcement_is_judged_before_any_byte(
    happened: list[EventData], files: list[AnnouncedFile], faulty: set[str]
) -> None:
    """Each name once, and one model in the end."""
    assert announcement_faults(state_of(*happened), files).keys() == faulty


def test_a_second_model_is_told_the_way_out() -> None:
    """The words name the model that is there."""
    fault = announcement_faults(state_of(stored(W)), [V])[V.name]
    assert W.name in fault.reason
    assert not fault.discard


@pytest.mark.parametrize(
    ("file", "found", "word", "discard"),
    [
        (A, None, "not uploaded", False),
        (A, seen(b""), "0 bytes, but 1", True),
        (A, seen(b"11"), "2 bytes, but 1", True),
        (A, seen(b"2"), A2.sha256, True),
    ],
)
def test_a_wrong_upload_is_told(file: AnnouncedFile, found: Seen | None, word: str, discard: bool) -> None:
    """What is there and wrong has to go, what is not there cannot."""
    fault = content_fault(file, found)
    assert fault is not None
    assert word in fault.reason
    assert fault.discard == discard


def test_a_file_that_is_no_model_is_told() -> None:
    """It is what was announced, and still of no use."""
    fault = content_fault(W, seen(MODEL), "It holds no tensor")
    assert fault is not None
    assert fault.reason.startswith("It holds no tensor. ")
    assert fault.discard


@pytest.mark.parametrize(
    ("file", "body"), [(A, b"1"), (W, MODEL), (announced("e", b""), b""), (announced("m"), b"body")]
)
def test_a_right_upload_has_no_fault(file: AnnouncedFile, body: bytes) -> None:
    """Only a model has to be safetensors."""
    assert presence_fault(file, len(body)) is None
    assert content_fault(file, seen(body)) is None


@pytest.mark.parametrize(
    ("happened", "files", "event"),
    [
        ([], [A, W], stored(A, W)),
        ([stored(A)], [A, B], stored(B)),
        ([stored(A)], [A2], stored(A2)),
        ([stored(A), stored(A2)], [A], stored(A)),
        ([stored(A)], [announced("a", b"1", "model")], stored(announced("a", b"1", "model"))),
        ([stored(A, B)], [B, A], None),
    ],
)
def test_what_is_new_is_recorded(
    happened: list[EventData], files: list[AnnouncedFile], event: FilesStored | None
) -> None:
    """What the problem has already is not said again."""
    assert decide(state_of(*happened), StoreFiles(problem_id=PROBLEM, files=files), {}) == event


def test_one_fault_refuses_all() -> None:
    """And only the faulty ones are named."""
    event = decide(State(), StoreFiles(problem_id=PROBLEM, files=[A, B]), {"a": Fault("wrong")})
    assert event == FilesRejected(problem_id=PROBLEM, files=[RejectedFile(name="a", reason="wrong")])


def test_a_rejection_names_each_file() -> None:
    """In the sentence for people, in the fields for programs."""
    problem = rejection({"a": Fault("too small."), "b": Fault("not there.")}).problem
    assert problem.code == "file_rejected"
    assert problem.fields == {"a": "too small.", "b": "not there."}
    assert "a: too small. b: not there." in problem.detail


def test_only_wrong_objects_that_nobody_verified_are_discarded() -> None:
    """A good neighbour of a wrong file need not be sent again; a verified object stands in the log."""
    command = StoreFiles(problem_id=PROBLEM, files=[A, B, W])
    faults = {"a": Fault("wrong", discard=True), "b": Fault("missing")}
    assert discarded(State(), command, faults) == [file_key(PROBLEM, A)]
    assert discarded(state_of(stored(A), DELETED), command, faults) == []


def test_a_manifest_lists_the_files_by_name() -> None:
    """The same files give the same bytes, in whatever order they came."""
    made = manifest(PROBLEM, state_of(stored(B), stored(A)))
    assert [file.name for file in made.files] == ["a", "b"]
    assert made.version == 2
