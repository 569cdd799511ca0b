"""What files a problem has, and what follows from an upload: pure functions, no I/O."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from fedota.contracts.commands import AnnouncedFile, StoreFiles
from fedota.errors import FedotaError
from fedota.events import Event
from fedota.events.storage import FilesDeleted, FilesRejected, FilesStored, RejectedFile, StoredFile
from services.storage.keys import file_key

_UPLOAD: Final = "Ask for an upload slot and PUT the file to it."


class State(msgspec.Struct, frozen=True, kw_only=True):
    """A problem's files as the log tells them.

    `files` are the problem's files by name now. `keys` are all that were ever verified: the log speaks
    of them for good, so no object among them is ever removed.
    """

    version: int = 0
    files: dict[str, StoredFile] = {}
    keys: frozenset[str] = frozenset()


class Seen(NamedTuple):
    """What lies in the object store, read to its end: its size, its SHA-256 in hex and its first bytes."""

    size: int
    sha256: str
    head: bytes


class Fault(NamedTuple):
    """Why a file is refused, and what to do. `discard`: what was uploaded is of no use and has to go."""

    reason: str
    discard: bool = False


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """A problem's files, as they lie beside them; `version` is that of the stream that it was made from."""

    problem_id: str
    version: int
    files: list[StoredFile]


def evolve(state: State, event: Event) -> State:
    """The state after an event of the problem's own stream."""
    state = msgspec.structs.replace(state, version=event.version)
    match event.data:
        case FilesStored(files=files):
            by_name = {**state.files, **{file.name: file for file in files}}
            return msgspec.structs.replace(state, files=by_name, keys=state.keys.union(file.key for file in files))
        case FilesDeleted(names=names):
            left = {name: file for name, file in state.files.items() if name not in names}
            return msgspec.structs.replace(state, files=left)
    return state


def stored_file(problem_id: str, file: AnnouncedFile) -> StoredFile:
    """What an announced file is once it is verified."""
    key = file_key(problem_id, file)
    return StoredFile(name=file.name, role=file.role, key=key, sha256=file.sha256, size=file.size)


def is_stored(state: State, problem_id: str, file: AnnouncedFile) -> bool:
    """Whether the problem has this very file already, so that its bytes need not be read again."""
    return state.files.get(file.name) == stored_file(problem_id, file)


def announcement_faults(state: State, files: Sequence[AnnouncedFile]) -> dict[str, Fault]:
    """What is wrong with an announcement whatever the bytes are: said before anything is uploaded."""
    times = Counter(file.name for file in files)
    faults = {name: Fault("It is announced twice. Announce each name once.") for name in times if times[name] > 1}
    roles = {name: file.role for name, file in state.files.items()} | {file.name: file.role for file in files}
    models = [name for name, role in roles.items() if role == "model"]
    for name in times:
        if name not in faults and name in models and (others := [other for other in models if other != name]):
            faults[name] = Fault(
                f"A problem has one file of the role model, and {', '.join(others)} would be another. "
                "Give the new model the name of the old one, or announce all but one with the role other."
            )
    return faults


def presence_fault(file: AnnouncedFile, size: int | None) -> Fault | None:
    """What the size of the uploaded object (None when there is none) says against the file."""
    if size is None:
        return Fault(f"It was not uploaded. {_UPLOAD}")
    if size != file.size:
        reason = f"It has {size} bytes, but {file.size} were announced. Announce it as it is, and upload it again."
        return Fault(reason, discard=True)
    return None


def content_fault(file: AnnouncedFile, seen: Seen | None, no_model: str | None = None) -> Fault | None:
    """What the bytes of the uploaded object (None when it went while it was read) say against the file.

    `no_model` is why they cannot be a model, where the file is to be one.
    """
    if seen is None or seen.size != file.size:
        return presence_fault(file, None if seen is None else seen.size)
    if seen.sha256 != file.sha256:
        reason = (
            f"Its SHA-256 is {seen.sha256}, but {file.sha256} was announced. Announce it as it is, and upload it again."
        )
        return Fault(reason, discard=True)
    if no_model:
        return Fault(f"{no_model}. Save the model with safetensors and upload that.", discard=True)
    return None


def decide(state: State, command: StoreFiles, faults: Mapping[str, Fault]) -> FilesStored | FilesRejected | None:
    """What is recorded of an upload, all or nothing; None when all of it is stored already."""
    problem_id = command.problem_id
    if faults:
        rejected = [RejectedFile(name=name, reason=fault.reason) for name, fault in faults.items()]
        return FilesRejected(problem_id=problem_id, files=rejected)
    fresh = [stored_file(problem_id, file) for file in command.files if not is_stored(state, problem_id, file)]
    return FilesStored(problem_id=problem_id, files=fresh) if fresh else None


def rejection(faults: Mapping[str, Fault]) -> FedotaError:
    """The error that names each refused file and says what to do."""
    told = " ".join(f"{name}: {fault.reason}" for name, fault in faults.items())
    return FedotaError(
        "file_rejected",
        f"Nothing of the upload was stored. {told}",
        fields={name: fault.reason for name, fault in faults.items()},
    )


def discarded(state: State, command: StoreFiles, faults: Mapping[str, Fault]) -> list[str]:
    """The keys whose objects have to go after a rejection: never one that was verified before."""
    wrong = [file for file in command.files if file.name in faults and faults[file.name].discard]
    return [key for file in wrong if (key := file_key(command.problem_id, file)) not in state.keys]


def manifest(problem_id: str, state: State) -> Manifest:
    """The list of the problem's files that lies beside them."""
    return Manifest(
        problem_id=problem_id, version=state.version, files=[state.files[name] for name in sorted(state.files)]
    )
