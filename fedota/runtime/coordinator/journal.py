"""What a coordinator must not forget though it is not recorded yet: the reports of attempts that have ended.

A round counts as soon as its checkpoint lies on the coordinator's own disk, while the log, the object store or both may
be out of reach. From then on its selectors hold nothing of it any more. So the journal says so first: one JSON file in
the coordinator's directory, replaced as a whole. It outlives a process, not a machine: nothing here waits for the disk,
and whoever reads it checks what it speaks of.
"""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import structlog

from fedota.contracts.runtime import Resume
from fedota.events import to_json
from fedota.events.rounds import Checkpoint, RoundUpdated
from fedota.runtime.coordinator import rounds, words
from fedota.runtime.coordinator.state import Ended, Reports, Rules, State
from fedota.runtime.protocol import ModelRef

_log = structlog.get_logger(__name__)


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """The reports that were not recorded when this was written, in order and numbered; the last one ends an attempt.

    `base` is the SHA-256 of the weights that the first one's round began with, `ended` the cohort of the last one.
    """

    run: int
    base: str
    reports: list[RoundUpdated]
    ended: Ended | None = None

    @property
    def position(self) -> tuple[int, int]:
        """Round and attempt that come after it."""
        return _after(self.reports[-1])


class Journal:
    """The file."""

    def __init__(self, path: Path, run: int) -> None:
        self._path = path
        self._run = run

    def keep(self, entry: Entry) -> None:
        """Have this, and nothing else, in the file; after a crash either this or what was there before."""
        draft = self._path.with_suffix(".new")
        draft.write_bytes(to_json(entry))
        draft.replace(self._path)

    def drop(self) -> None:
        """Forget it."""
        self._path.unlink(missing_ok=True)

    def read(self) -> Entry | None:
        """What was kept of this run; None when there is nothing, or nothing that can be read."""
        try:
            entry = msgspec.json.decode(self._path.read_bytes(), type=Entry)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError) as error:
            _log.warning("the journal cannot be read; the log alone says where to go on", error=str(error))
            return None
        return entry if entry.run == self._run and entry.reports else None


def still_true(entry: Entry, resume: Resume, model: str) -> Entry | None:
    """The journal with the reports that are still to be recorded; None when the log tells another story.

    Where all of them are, there is none left, and it only says what had ended before the log went on. `model` is the
    SHA-256 of the weights that the run began with.
    """
    first = entry.reports[0].report
    if resume.report < first - 1:
        return None  # the log has lost what was recorded
    known = entry.reports[: resume.report - first + 1]
    rest = entry.reports[len(known) :]
    if not rest:
        ended = entry.ended if entry.position == (resume.round, resume.attempt) else None
        return msgspec.structs.replace(entry, reports=[], ended=ended)
    newest = last_checkpoint(known)
    recorded = resume.checkpoint.sha256 if resume.checkpoint else model
    if resume.finished or recorded != (newest.sha256 if newest else entry.base):
        return None
    if (rest[0].round, rest[0].attempt) != (resume.round, resume.attempt):
        return None
    return msgspec.structs.replace(entry, reports=rest)


def begin(rules: Rules, resume: Resume, entry: Entry | None, base: ModelRef, now: float) -> tuple[State, Reports]:
    """Where a coordinator begins: after what the journal remembers, if that is still true, else after the log."""
    ended = entry.ended if entry else None
    if entry is None or not entry.reports:
        round_, attempt = resume.round, resume.attempt
        if resume.finished:
            reason = words.FINISHED if resume.stopped is None else words.stopped(resume.stopped)
            return rounds.over(round=round_, attempt=attempt, base=base, now=now, ended=ended, reason=reason), []
        return rounds.start(rules, round=round_, attempt=attempt, base=base, now=now, ended=ended)
    (round_, attempt), last = entry.position, entry.reports[-1]
    keys = [one.checkpoint.key for one in entry.reports if one.checkpoint]
    if last.final:
        state = rounds.over(
            round=last.round,
            attempt=last.attempt,
            base=base,
            now=now,
            unrecorded=keys,
            ended=ended,
            reason=words.farewell(last),
        )
        return state, []
    return rounds.start(rules, round=round_, attempt=attempt, base=base, now=now, unrecorded=keys, ended=ended)


def last_checkpoint(reports: Sequence[RoundUpdated]) -> Checkpoint | None:
    """The newest one in some reports."""
    return next((one.checkpoint for one in reversed(reports) if one.checkpoint), None)


def _after(last: RoundUpdated) -> tuple[int, int]:
    return (last.round + 1, 1) if last.stage == "completed" else (last.round, last.attempt + 1)
