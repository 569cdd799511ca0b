"""Which report may follow from which, and where a coordinator goes on."""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, Final

import msgspec
import pytest

from fedota.contracts.runtime import REPORT_BYTES, Resume
from fedota.errors import FedotaError
from fedota.events import EventData
from fedota.events.problems import (
    ModelFile,
    ParticipationApproved,
    ParticipationRevoked,
    Plan,
    ProblemCompleted,
    ProblemStarted,
    ProblemStopped,
)
from fedota.events.rounds import Checkpoint, Contribution, Refusal, RoundUpdated
from services.rounds.domain import State, decide, evolve, resume, stopped
from tests.support.events import recorded

ID: Final = "01890a5d-ac96-774b-bcce-b302099a8057"
PLAN: Final = Plan(rounds=2, goal_count=3, minimum_fraction=0.6, over_selection=1.3, attempts=2)  # 2 of 3; selects 4
MODEL: Final = ModelFile(key="k/model", sha256="a" * 64, size=10)
STARTED: Final = ProblemStarted(problem_id=ID, run=1, plan=PLAN, model=MODEL)
AGAIN: Final = ProblemStarted(problem_id=ID, run=2, plan=PLAN, model=MODEL)
STOPPED: Final = ProblemStopped(problem_id=ID, run=1, reason="stopped by the setter")
COMPLETED: Final = ProblemCompleted(problem_id=ID, run=1, rounds=2, model=MODEL)
CLINICS: Final = tuple(ParticipationApproved(problem_id=ID, organization=name) for name in ("Clinic A", "Clinic B"))
REVOKED: Final = ParticipationRevoked(problem_id=ID, organization="Clinic B", reason="left")


def key(name: str) -> str:
    """A checkpoint's key."""
    return f"problems/{ID}/checkpoints/{name}"


def told(stage: Any, report: int = 1, round_: int = 1, attempt: int = 1, run: int = 1, **more: Any) -> RoundUpdated:
    """A good report, but for what `more` says."""
    fields: dict[str, Any] = {
        "problem_id": ID,
        "run": run,
        "report": report,
        "round": round_,
        "attempt": attempt,
        "stage": stage,
        "goal_count": PLAN.goal_count,
        "minimum_count": PLAN.minimum_count,
        "reason": "said in words",
    }
    if stage == "completed":
        fields["checkpoint"] = Checkpoint(key=key(f"{run}/{round_}-0.safetensors"), sha256="b" * 64, size=9)
        fields |= {"reported": 3, "selected": 4, "participants": ["Clinic A", "Clinic B"], "examples": 300}
    return RoundUpdated(**{**fields, **more})


def gave(organization: str, updates: int = 0, examples: int = 0, **more: Any) -> Contribution:
    """A contribution."""
    return Contribution(organization=organization, updates=updates, examples=examples, **more)


def after(*happened: EventData) -> State:
    """The state that the log makes."""
    return reduce(evolve, (recorded(data) for data in happened), State())


def judged(update: RoundUpdated, *before: EventData) -> FedotaError | None:
    """What is said to a report after what happened before; None when it is accepted."""
    reports = [data for data in before if isinstance(data, RoundUpdated)]
    try:
        assert decide(after(*before), reports[-1] if reports else None, update) == [update]
    except FedotaError as error:
        return error
    return None


def refused(update: RoundUpdated, *before: EventData) -> str:
    """The words that a report is refused with."""
    error = judged(update, *before)
    assert error is not None, f"{update} was accepted"
    assert error.problem.code == "report_refused"
    return error.problem.detail


BEGUN: Final = (*CLINICS, STARTED)
FIRST: Final = (told("selection", 1), told("configuration", 2), told("reporting", 3))
ROUND_1: Final = (*FIRST, told("completed", 4))
LATER: Final = (told("selection", 5, 2), told("configuration", 6, 2), told("reporting", 7, 2))
FINAL: Final = told("completed", 8, 2, final=True)
ABANDONED: Final = told("abandoned", 4)


@pytest.mark.parametrize(
    ("before", "update"),
    [
        ((), told("selection", 1)),
        (FIRST[:1], told("selection", 2, waiting=1)),
        (FIRST[:1], told("configuration", 2)),
        (FIRST[:1], told("abandoned", 2)),
        (FIRST[:2], told("reporting", 3)),
        (FIRST[:2], told("abandoned", 3)),
        (FIRST[:2], told("selection", 3)),
        (FIRST, told("reporting", 4, reported=2)),
        (FIRST, told("completed", 4)),
        (FIRST, told("completed", 4, reported=2)),
        (FIRST, told("completed", 4, reported=4)),
        (FIRST, ABANDONED),
        (FIRST, told("selection", 4)),
        (FIRST, told("abandoned", 4, final=True)),
        (ROUND_1, told("selection", 5, 2)),
        ((*FIRST, ABANDONED), told("selection", 5, 1, 2)),
        ((*FIRST, ABANDONED, told("selection", 5, 1, 2)), told("abandoned", 6, 1, 2, final=True)),
        ((*ROUND_1, *LATER), FINAL),
        ((*ROUND_1, STOPPED, AGAIN), told("selection", 1, run=2)),
        ((*ROUND_1, *LATER, FINAL, STOPPED, AGAIN), told("selection", 1, run=2)),
    ],
)
def test_reports_that_follow(before: Sequence[EventData], update: RoundUpdated) -> None:
    """Every way a round may go."""
    assert judged(update, *BEGUN, *before) is None


@pytest.mark.parametrize(
    ("before", "update", "expected"),
    [
        ((), told("selection", 2), "Report 1 was expected, not 2"),
        ((), told("configuration", 1), "stage selection"),
        ((), told("abandoned", 1), "stage selection"),
        ((), told("selection", 1, 2), "round 1, attempt 1"),
        ((), told("selection", 1, 1, 2), "round 1, attempt 1"),
        (FIRST[:1], told("selection", 1), "Report 2 was expected, not 1"),
        (FIRST[:1], told("reporting", 2), "selection or configuration or abandoned"),
        (FIRST[:1], told("completed", 2), "selection or configuration or abandoned"),
        (FIRST[:1], told("configuration", 2, 2), "round 1, attempt 1"),
        (FIRST[:2], told("configuration", 3), "reporting or abandoned or selection"),
        (FIRST[:2], told("completed", 3), "reporting or abandoned or selection"),
        (FIRST, told("configuration", 4), "reporting or completed or abandoned or selection"),
        (FIRST, told("completed", 4, attempt=2), "round 1, attempt 1"),
        (ROUND_1, told("completed", 5), "round 2, attempt 1, stage selection"),
        (ROUND_1, told("selection", 5), "round 2, attempt 1, stage selection"),
        ((*FIRST, ABANDONED), told("selection", 5, 2), "round 1, attempt 2, stage selection"),
        ((*FIRST, ABANDONED), told("selection", 5), "round 1, attempt 2, stage selection"),
        ((*ROUND_1, *LATER, FINAL), told("selection", 9, 3), "Report 8 was final"),
        ((STOPPED,), told("selection"), "Run 1 is over (stopped by the setter)"),
        ((msgspec.structs.replace(STOPPED, reason=""),), told("selection"), "Run 1 is over"),
        ((COMPLETED,), told("selection"), "Run 1 is over (the training is completed)"),
        ((*FIRST, STOPPED), told("completed", 4), "Run 1 is over"),
        ((STOPPED, AGAIN), told("selection"), "run 2 has been started"),
        ((), told("selection", run=2), "Run 2 of this problem was never started"),
    ],
)
def test_reports_out_of_order(before: Sequence[EventData], update: RoundUpdated, expected: str) -> None:
    """What does not follow is refused, and the words say what was expected."""
    assert expected in refused(update, *BEGUN, *before)


def test_nothing_is_reported_before_the_start() -> None:
    """A problem that nobody started has no rounds, and neither has an unknown one."""
    assert "never started" in refused(told("selection"))
    assert "never started" in refused(told("selection"), *CLINICS)


@pytest.mark.parametrize(
    ("update", "expected"),
    [
        (told("completed", 4, goal_count=2), "goal count is 3"),
        (told("completed", 4, minimum_count=1), "minimum count is 2"),
        (told("completed", 4, reported=1, participants=["Clinic A"]), "it takes 2"),
        (told("completed", 4, reported=5), "selects 4"),
        (told("completed", 4, selected=5), "selects 4"),
        (told("completed", 4, waiting=-1), "waiting is -1"),
        (told("completed", 4, selected=-1), "selected is -1"),
        (told("completed", 4, examples=-1), "examples is -1"),
        (told("reporting", 4, reported=-1), "reported is -1"),
        (told("selection", 4, waiting=2**31), "not between 0 and 2147483647"),
        (told("reporting", 4, examples=2**70), "not between 0 and"),
        (told("reporting", 4, seconds=-0.1), "no age"),
        (told("reporting", 4, reason="a\0b"), "NUL"),
        (told("completed", 4, reason="a\0b"), "NUL"),
        (told("completed", 4, participants=[]), "0 organizations"),
        (told("completed", 4, reported=2, participants=["Clinic A", "Clinic B", "C"]), "3 organizations"),
        (told("completed", 4, participants=["Clinic A", "Clinic A"]), "named twice"),
        (told("completed", 4, participants=["Clinic A", "Clinic C"]), "Clinic C had no approved participation"),
        (told("reporting", 4, participants=["Clinic C"]), "Clinic C had no approved participation"),
        (told("completed", 4, checkpoint=None), "needs its checkpoint"),
        (told("completed", 4, final=True), "completed report of round 2 is the final one"),
        (told("reporting", 4, final=True), "cannot be final"),
        (told("selection", 4, final=True), "cannot be final"),
        (told("abandoned", 4, reason=""), "needs its reason"),
        (told("reporting", 4, checkpoint=Checkpoint(key=key("1"), sha256="b" * 64, size=1)), "only a completed round"),
        (told("abandoned", 4, checkpoint=Checkpoint(key=key("1"), sha256="b" * 64, size=1)), "only a completed round"),
        (told("completed", 4, checkpoint=Checkpoint(key=key("1"), sha256="b" * 63, size=1)), "SHA-256"),
        (told("completed", 4, checkpoint=Checkpoint(key=key("1"), sha256="b" * 64, size=0)), "its size"),
        (told("reporting", 4, reason="x" * REPORT_BYTES), f"more than {REPORT_BYTES}"),
    ],
)
def test_reports_that_cannot_be(update: RoundUpdated, expected: str) -> None:
    """Counts, flags and names that disagree with the plan, with each other or with the stage are refused."""
    assert expected in refused(update, *BEGUN, *FIRST)


@pytest.mark.parametrize(
    "wrong",
    [
        "problems/another/checkpoints/1.safetensors",
        f"problems/{ID}/files/1.safetensors",
        f"problems/{ID}/checkpoints/",
        key("../files/1"),
        key("1/../../../other"),
        key("/1"),
        key("1\n"),
        key(".hidden"),
    ],
)
def test_checkpoints_lie_below_the_problem(wrong: str) -> None:
    """No report makes another problem's object, or a file, this one's result."""
    update = told("completed", 4, checkpoint=Checkpoint(key=wrong, sha256="b" * 64, size=1))
    assert "is not a plain one below" in refused(update, *BEGUN, *FIRST)


def test_the_last_round_and_the_last_attempt_are_final() -> None:
    """A run cannot go on past its plan."""
    last = msgspec.structs.replace(FINAL, final=False)
    assert "completed report of round 2 is the final one" in refused(last, *BEGUN, *ROUND_1, *LATER)
    second = told("selection", 5, 1, 2)
    assert "plan's last" in refused(told("abandoned", 6, 1, 2), *BEGUN, *FIRST, ABANDONED, second)


def test_who_was_revoked_may_be_named() -> None:
    """An update that was summed before its organization left cannot be taken out again; who was never in may not be."""
    before = (*BEGUN, *FIRST, REVOKED)
    assert judged(told("completed", 4), *before) is None
    assert after(*before).revoked == ["Clinic B"]
    assert after(*before, CLINICS[1]).revoked == []  # approved again


def test_a_newer_runs_reports_end_the_older_one() -> None:
    """Though the news of the start is late: a stream in which runs take turns could not be resumed from."""
    with pytest.raises(FedotaError, match="run 2 has reported since"):
        decide(after(*BEGUN), told("selection", run=2), told("selection"))


def test_refusals_may_name_anybody() -> None:
    """Whose update was not counted need not be a member."""
    refusal = Refusal(organization="Stranger", code="token_refused", detail="No.")
    assert judged(told("reporting", 4, refusals=[refusal]), *BEGUN, *FIRST) is None


A: Final = gave("Clinic A", 2, 200, size=80, seconds=1.5, clipped=1, refusals={"update_not_finite": 3})
B: Final = gave("Clinic B", 1, 100, size=40, seconds=2.5)
CAPPED: Final = msgspec.structs.replace(PLAN, clients_per_organization=2, examples_per_update=100, clip_norm=1.0)
BEGUN_CAPPED: Final = (*CLINICS, msgspec.structs.replace(STARTED, plan=CAPPED))


@pytest.mark.parametrize(
    "update",
    [
        told("completed", 4, contributions=[A, B]),
        told("completed", 4, contributions=[A]),  # of very many, some are left out
        told("completed", 4, contributions=[A, B], participants=["Clinic B", "Clinic A"]),
        told("abandoned", 4, contributions=[gave("Clinic B", refusals={"update_too_large": 1})]),
        told("completed", 4, contributions=[A, B, gave("Clinic C", refusals={"ticket_refused": 1})]),  # never approved
        told("abandoned", 4, contributions=[B], participants=["Clinic B"], reported=1, examples=100),
    ],
)
def test_contributions_that_can_be(update: RoundUpdated) -> None:
    """Of all participants they come to the report's counts; of some to no more."""
    assert judged(update, *BEGUN_CAPPED, *FIRST) is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"stage": "reporting", "checkpoint": None, "contributions": [A, B]}, "only the end of an attempt does"),
        ({"contributions": [A, A]}, "told twice"),
        (
            {"contributions": [A, B, gave("Clinic C", 1, 9)], "participants": ["Clinic A", "Clinic B", "Clinic C"]},
            "the contributions come to 4 updates",
        ),
        ({"contributions": [A, gave("Clinic B", 2, 100)]}, "come to 4 updates, the report to 3"),
        ({"contributions": [A, gave("Clinic B", 1, 99)]}, "come to 299 examples, the report to 300"),
        ({"contributions": [gave("Clinic A", 2, 150), B]}, "come to 250 examples, the report to 300"),
        ({"contributions": [A, B], "participants": ["Clinic A"]}, "Clinic B gave an update and is not among"),
        ({"contributions": [gave("Clinic A", 3, 300)]}, "at most 2 clients of an organization"),
        ({"contributions": [gave("Clinic A", 2, 201)]}, "at most 100"),
        ({"contributions": [gave("Clinic A", 2, 1)]}, "2 updates cannot weigh 1 examples"),
        ({"contributions": [gave("Clinic A", 0, 1)]}, "0 updates cannot weigh 1 examples"),
        ({"contributions": [gave("Clinic A", -1, 0)]}, "updates is -1"),
        ({"contributions": [gave("Clinic A", size=-1)]}, "size is -1"),
        ({"contributions": [gave("Clinic A", size=2**53 + 1)]}, "size is 9007199254740993"),
        ({"contributions": [gave("Clinic A", seconds=-0.5)]}, "no duration"),
        ({"contributions": [gave("Clinic A", seconds=float("inf"))]}, "no duration"),
        ({"contributions": [gave("Clinic A", 1, 1, clipped=2)]}, "2 of 1 updates cannot have been clipped"),
        ({"contributions": [gave("Clinic A", refusals={"Not a code": 1})]}, "by error code"),
        ({"contributions": [gave("Clinic A", refusals={"a" * 65: 1})]}, "by error code"),
        ({"contributions": [gave("Clinic A", refusals={"a" * n: 1 for n in range(1, 66)})]}, "by error code"),
        ({"contributions": [gave("Clinic A", refusals={"round_over": 0})]}, "between 1 and"),
    ],
)
def test_contributions_that_cannot_be(changes: dict[str, Any], expected: str) -> None:
    """They agree with the plan's caps, with the report and with themselves, or the report is refused."""
    update = msgspec.structs.replace(told("completed", 4), **changes)
    assert expected in refused(update, *BEGUN_CAPPED, *FIRST)


def test_nothing_is_clipped_without_a_norm() -> None:
    """A coordinator that changes updates against the plan is not believed."""
    assert "the plan clips none" in refused(told("completed", 4, contributions=[A, B]), *BEGUN, *FIRST)


def test_a_run_that_is_not_the_newest_ends_nothing() -> None:
    """What is said late of another run leaves the state as it is."""
    state = after(*BEGUN, FIRST[0])
    assert evolve(state, recorded(ProblemStopped(problem_id=ID, run=7, reason="r"))) is state


ONE: Final = ROUND_1[-1].checkpoint
_SINCE: Final = "run 2 has been started since; it has new join kits"
RESUMES: Final[list[tuple[Sequence[EventData], Resume]]] = [
    ((), Resume()),
    (FIRST[:1], Resume(report=1)),
    (FIRST, Resume(report=3)),
    ((*FIRST, told("selection", 4)), Resume(report=4)),
    ((*FIRST, ABANDONED), Resume(report=4, attempt=2)),
    (ROUND_1, Resume(report=4, round=2, checkpoint=ONE)),
    ((*ROUND_1, *LATER), Resume(report=7, round=2, checkpoint=ONE)),
    ((*ROUND_1, *LATER, told("abandoned", 8, 2)), Resume(report=8, round=2, attempt=2, checkpoint=ONE)),
    (
        (*ROUND_1, *LATER, FINAL),
        Resume(report=8, round=3, checkpoint=FINAL.checkpoint, finished=True),
    ),
    (
        (*ROUND_1, *LATER, FINAL, COMPLETED),
        Resume(report=8, round=3, checkpoint=FINAL.checkpoint, finished=True),
    ),
    (  # the last report was as quick as the stop: the round is done
        (*ROUND_1, *LATER, FINAL, STOPPED),
        Resume(report=8, round=3, checkpoint=FINAL.checkpoint, finished=True),
    ),
    ((*FIRST, STOPPED), Resume(report=3, finished=True, stopped="stopped by the setter")),
    ((STOPPED,), Resume(finished=True, stopped="stopped by the setter")),
    ((msgspec.structs.replace(STOPPED, reason=""),), Resume(finished=True, stopped="")),
    ((*FIRST, STOPPED, AGAIN), Resume(report=3, finished=True, stopped=_SINCE)),
    (
        (*FIRST, told("abandoned", 4, final=True), STOPPED),
        Resume(report=4, attempt=2, finished=True, stopped="stopped by the setter"),
    ),
]


@pytest.mark.parametrize(("before", "expected"), RESUMES)
def test_where_a_coordinator_goes_on(before: Sequence[EventData], expected: Resume) -> None:
    """After what was recorded: the same attempt if it was under way, else the next, from the last checkpoint."""
    reports = [data for data in before if isinstance(data, RoundUpdated)]
    assert resume(after(*BEGUN, *before), 1, reports[::-1]) == expected


@pytest.mark.parametrize(("before", "expected"), [row for row in RESUMES if not row[1].finished])
def test_what_resumes_is_accepted(before: Sequence[EventData], expected: Resume) -> None:
    """A coordinator that does as it is told finds its first report accepted."""
    first = told("selection", expected.report + 1, expected.round, expected.attempt)
    assert judged(first, *BEGUN, *before) is None


@pytest.mark.parametrize(
    ("before", "run", "why"),
    [
        ((), 1, None),
        ((STARTED,), 1, None),
        ((STARTED,), 2, None),
        ((STARTED, STOPPED), 1, "stopped by the setter"),
        ((STARTED, STOPPED), 0, None),  # who does not say of which run it is
        ((STARTED, STOPPED, AGAIN), 1, _SINCE),
        ((STARTED, STOPPED, AGAIN), 2, None),
        ((STARTED, COMPLETED), 1, None),
    ],
)
def test_a_stop_is_known_by_its_reason(before: Sequence[EventData], run: int, why: str | None) -> None:
    """A completed run was not stopped, however it is asked."""
    assert stopped(after(*before), run) == why


@pytest.mark.parametrize("state", [lambda: State(), lambda: after(STARTED)])
def test_an_unknown_run_is_not_finished(state: Callable[[], State]) -> None:
    """A coordinator of a run that nobody started hears so, and is not sent home as if its work were done."""
    with pytest.raises(FedotaError, match="never started"):
        resume(state(), 2, [])
