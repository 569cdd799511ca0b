"""Any order of uploads, right and wrong ones, against a model that a person can check at a glance."""

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fedota.contracts.commands import AnnouncedFile, StoreFiles
from fedota.events import Event, uuid7
from fedota.events.storage import FilesDeleted, FilesRejected, FilesStored
from services.storage.domain import (
    Fault,
    State,
    announcement_faults,
    decide,
    discarded,
    evolve,
    is_stored,
    manifest,
    stored_file,
)

ID = "01890a5d-ac96-774b-bcce-b302099a8057"
FILES = st.builds(
    lambda name, body, model: AnnouncedFile(
        name=name,
        size=1,
        sha256=hashlib.sha256(body.encode()).hexdigest(),
        role="model" if model else "other",
    ),
    st.sampled_from(["a", "b", "c"]),
    st.sampled_from(["1", "2"]),
    st.booleans(),
)


class Uploads(RuleBasedStateMachine):
    """`files` is what the problem has, `ever` what was ever verified, both kept by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.state = State()
        self.happened = 0
        self.files: dict[str, AnnouncedFile] = {}
        self.ever: set[tuple[str, str]] = set()

    def record(self, data: Any) -> None:
        """It is in the stream."""
        self.happened += 1
        envelope: dict[str, Any] = {"id": uuid7(), "type": type(data).__name__, "schema": 1, "correlation": uuid7()}
        envelope |= {"subject": f"storage/{ID}", "time": datetime.now(UTC), "actor": "setter"}
        event = Event(**envelope, version=self.happened, position=self.happened, data=data)
        self.state = evolve(self.state, event)

    @rule(files=st.lists(FILES, min_size=1, max_size=3), wrong=st.booleans())
    def upload(self, files: Sequence[AnnouncedFile], wrong: bool) -> None:
        """All of it is stored or nothing, and what is there already is not said again."""
        command, faults = StoreFiles(problem_id=ID, files=list(files)), announcement_faults(self.state, files)
        assert bool(faults) == (not self._is_sound(files))
        if wrong and not faults:
            faults = {files[0].name: Fault("made up", discard=True)}
            lost = {(files[0].name, files[0].sha256)} - self.ever
            assert len(discarded(self.state, command, faults)) == len(lost), "what was ever verified is kept"
        fresh = [file for file in files if self.files.get(file.name) != file]
        event = decide(self.state, command, faults)
        if faults:
            assert isinstance(event, FilesRejected) and {file.name for file in event.files} == set(faults)
        elif not fresh:
            assert event is None
            return
        else:
            assert event == FilesStored(problem_id=ID, files=[stored_file(ID, file) for file in fresh])
            self.files |= {file.name: file for file in fresh}
            self.ever |= {(file.name, file.sha256) for file in fresh}
        self.record(event)

    def _is_sound(self, files: Sequence[AnnouncedFile]) -> bool:
        """Each name once, and no more than one model afterwards among those that come and those that stay."""
        names = [file.name for file in files]
        after = self.files | {file.name: file for file in files}
        models = {name for name, file in after.items() if file.role == "model"}
        return len(names) == len(set(names)) and not (len(models) > 1 and models.intersection(names))

    @rule(name=st.sampled_from(["a", "b", "c"]))
    def delete(self, name: str) -> None:
        """A file goes, and stays known."""
        self.files.pop(name, None)
        self.record(FilesDeleted(problem_id=ID, names=[name]))

    @invariant()
    def agrees(self) -> None:
        """Files, keys and version; a manifest of them, by name."""
        assert self.state.files == {name: stored_file(ID, file) for name, file in self.files.items()}
        assert len(self.state.keys) == len(self.ever) and self.state.version == self.happened
        assert all(is_stored(self.state, ID, file) for file in self.files.values())
        assert [file.name for file in manifest(ID, self.state).files] == sorted(self.files)


TestUploads = Uploads.TestCase
TestUploads.settings = settings(max_examples=150, stateful_step_count=20, deadline=None)
