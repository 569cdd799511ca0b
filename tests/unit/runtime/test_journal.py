"""What a coordinator remembers of rounds that are not recorded yet, held against what the log says."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from fedota.contracts.runtime import Resume
from fedota.events.problems import Plan
from fedota.events.rounds import Checkpoint, RoundUpdated
from fedota.runtime.coordinator import rounds
from fedota.runtime.coordinator.journal import Entry, Journal, begin, last_checkpoint, still_true
from fedota.runtime.coordinator.state import Ended, Rules
from fedota.runtime.protocol import Concluded, ModelRef

MODEL = "0" * 64


def checkpoint(round_: int) -> Checkpoint:
    """The weights after a round."""
    return Checkpoint(key=f"problems/p/checkpoints/1/{round_}-c.safetensors", sha256=f"{round_:064x}", size=10)


def report(number: int, round_: int, stage: Any, attempt: int = 1) -> RoundUpdated:
    """One report of a run."""
    return RoundUpdated(
        problem_id="p",
        run=1,
        report=number,
        round=round_,
        attempt=attempt,
        stage=stage,
        goal_count=1,
        minimum_count=1,
        checkpoint=checkpoint(round_) if stage == "completed" else None,
    )


def entry(**changes: Any) -> Entry:
    """Two rounds and an attempt that were not recorded when it was written; five reports were."""
    reports = [
        report(6, 2, "reporting"),
        report(7, 2, "completed"),
        report(8, 3, "selection"),
        report(9, 3, "configuration"),
        report(10, 3, "reporting"),
        report(11, 3, "completed"),
        report(12, 4, "selection"),
        report(13, 4, "abandoned"),
    ]
    usual: dict[str, Any] = {"run": 1, "base": checkpoint(1).sha256, "reports": reports}
    return Entry(**{**usual, **changes})


def resume(number: int, round_: int, attempt: int = 1, **changes: Any) -> Resume:
    """The log knows so many reports, and the checkpoint of the round before."""
    known = checkpoint(round_ - 1) if round_ > 1 else None
    return Resume(**{"report": number, "round": round_, "attempt": attempt, "checkpoint": known, **changes})


@pytest.mark.parametrize(
    ("log", "first"),
    [
        (resume(5, 2), 6),
        (resume(6, 2), 7),
        (resume(7, 3), 8),
        (resume(10, 3), 11),
        (resume(11, 4), 12),
        (resume(12, 4), 13),
    ],
)
def test_what_the_log_has_not_is_still_to_be_recorded(log: Resume, first: int) -> None:
    """From the first report that is missing to the last."""
    rest = still_true(entry(), log, MODEL)
    assert rest is not None and rest.position == (4, 2)
    assert [one.report for one in rest.reports] == list(range(first, 14))


@pytest.mark.parametrize("log", [resume(13, 4, 2), resume(14, 4, 2), resume(90, 20), resume(13, 4, 2, finished=True)])
def test_what_the_log_has_is_done_with(log: Resume) -> None:
    """However long ago that was. How the cohort before has ended is worth knowing where nothing came since."""
    rest = still_true(entry(ended=Ended(cohort="c")), log, MODEL)
    assert rest is not None and rest.reports == []
    assert rest.ended == (Ended(cohort="c") if (log.round, log.attempt) == (4, 2) else None)


@pytest.mark.parametrize(
    "log",
    [
        resume(4, 2),  # it was restored from a backup, and has lost what it once had
        resume(0, 1),
        resume(7, 2, 2),  # it says that the attempt was abandoned
        resume(7, 3, checkpoint=checkpoint(9)),  # other weights
        resume(6, 2, checkpoint=None),
        resume(9, 3, 2),
        resume(9, 5),
        resume(8, 3, finished=True),  # nothing more is recorded of a run that is over
    ],
)
def test_a_log_that_tells_another_story_is_right(log: Resume) -> None:
    """Nothing of the journal is to be recorded then."""
    assert still_true(entry(), log, MODEL) is None


def test_the_first_round_begins_with_the_problem_s_model() -> None:
    """There is no checkpoint before it."""
    first = Entry(run=1, base=MODEL, reports=[report(1, 1, "selection"), report(2, 1, "completed")])
    assert still_true(first, Resume(), MODEL) == first
    rest = still_true(first, Resume(report=1), MODEL)
    assert rest is not None and rest.reports == first.reports[1:]
    assert still_true(first, Resume(report=1), "f" * 64) is None


def test_positions() -> None:
    """What comes after the last report, and the weights that it begins with."""
    assert entry().position == (4, 2)
    assert entry(reports=[report(7, 2, "completed")]).position == (3, 1)
    assert last_checkpoint(entry().reports) == checkpoint(3)
    assert last_checkpoint(entry().reports[:1]) is None


def test_a_journal_is_read_as_it_was_kept(tmp_path: Path) -> None:
    """The newest, whole; by the same run only."""
    journal = Journal(tmp_path / "journal.json", 1)
    assert journal.read() is None
    journal.keep(entry(base="d" * 64))
    journal.keep(kept := entry(ended=Ended(cohort="c", counted=["a", "b"])))
    assert journal.read() == kept
    assert Journal(tmp_path / "journal.json", 2).read() is None
    assert [path.name for path in tmp_path.iterdir()] == ["journal.json"]
    journal.drop()
    journal.drop()
    assert journal.read() is None


def test_of_a_run_that_is_over_clients_still_hear_that_they_counted() -> None:
    """Whether its last report was recorded or not: who kept an update of the last round is told that it counts."""
    rules = Rules(problem_id="p", run=1, plan=Plan(rounds=3, goal_count=1), life="c2")
    base, ended = ModelRef(sha256=checkpoint(3).sha256, size=10), Ended(cohort="c1-3-1", counted=["a"])
    last = msgspec.structs.replace(report(11, 3, "completed"), final=True)
    kept = Entry(run=1, base=checkpoint(2).sha256, reports=[last], ended=ended)
    for log in (resume(10, 3), resume(11, 4, finished=True)):
        state, reports = begin(rules, log, still_true(kept, log, MODEL), base, 0.0)
        assert (state.phase, reports, state.ended) == ("finished", [], ended)
        last_word = rounds.orders(rules, state, "selector 1", "a").last
        assert last_word == Concluded(cohort="c1-3-1", counted=True)


@pytest.mark.parametrize("body", [b"", b'{"run": 1', b'{"run": 1, "base": "", "reports": []}', b"\0" * 100])
def test_a_journal_that_is_not_whole_is_none(tmp_path: Path, body: bytes) -> None:
    """After a machine has lost its power, say."""
    (tmp_path / "journal.json").write_bytes(body)
    assert Journal(tmp_path / "journal.json", 1).read() is None


def test_a_draft_that_was_never_finished_is_not_read(tmp_path: Path) -> None:
    """What was there before still is."""
    journal = Journal(tmp_path / "journal.json", 1)
    journal.keep(entry())
    (tmp_path / "journal.new").write_bytes(b'{"run": 1')
    assert journal.read() == entry()


RULES = Rules(problem_id="p", run=1, plan=Plan(rounds=9, goal_count=1), life="c2")
BASE = ModelRef(sha256="b" * 64, size=10)


def test_a_coordinator_begins_after_what_it_remembers() -> None:
    """With the checkpoints that are still to be recorded."""
    state, reports = begin(RULES, resume(5, 2), entry(ended=Ended(cohort="c")), BASE, 100.0)
    assert (state.phase, state.round, state.attempt, state.ended) == ("settling", 4, 2, Ended(cohort="c"))
    assert state.unrecorded == [checkpoint(2).key, checkpoint(3).key]
    assert [(one.round, one.attempt, one.stage) for one in reports] == [(4, 2, "selection")]


def test_a_coordinator_that_remembers_nothing_begins_after_the_log() -> None:
    """Where it stands, or at the end."""
    state, reports = begin(RULES, resume(5, 2), None, BASE, 100.0)
    assert (state.phase, state.round, state.attempt, state.unrecorded) == ("settling", 2, 1, [])
    assert len(reports) == 1
    state, reports = begin(RULES, resume(5, 2, finished=True), entry(reports=[]), BASE, 100.0)
    assert (state.phase, state.finished, reports) == ("finished", "The training is finished.", [])


@pytest.mark.parametrize(
    ("last", "said"),
    [
        (report(6, 9, "completed"), "The training is finished."),
        (
            msgspec.structs.replace(report(6, 9, "abandoned"), reason="abandoned: nobody came"),
            "The training ended in round 9: nobody came.",
        ),
    ],
)
def test_a_training_that_was_over_stays_so(last: RoundUpdated, said: str) -> None:
    """Though its last report is still to be recorded."""
    kept = entry(reports=[msgspec.structs.replace(last, final=True)])
    state, reports = begin(RULES, resume(5, 9), kept, BASE, 100.0)
    assert (state.phase, state.finished, reports) == ("finished", said, [])
    assert len(state.unrecorded) == (last.stage == "completed")
