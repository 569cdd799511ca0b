"""What the log says of a problem's infrastructure, and what the orchestrator does about it: every branch, as values."""

from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

import msgspec
import pytest

from fedota.events import CATALOGUE, Event, EventData
from fedota.events.orchestrator import InfraDegraded, InfraFailed, InfraRecovered, InfraSpawned, InfraStopped
from fedota.events.problems import (
    ModelFile,
    ParticipationApproved,
    Plan,
    ProblemCompleted,
    ProblemStarted,
    ProblemStopped,
)
from services.orchestrator.domain import (
    Death,
    Ended,
    Failure,
    Infra,
    Launch,
    Remove,
    Say,
    Spec,
    State,
    Step,
    decide,
    evolve,
    is_namespace,
    namespace_of,
    problem_of,
    selector_names,
)

ID: Final = "018f0000-0000-7000-8000-000000000000"
NAMESPACE: Final = f"fedota-{ID}"
PLAN: Final = Plan(rounds=3, goal_count=2, selectors=2)
MODEL: Final = ModelFile(key="k", sha256="a" * 64, size=1)
ANSWERING: Final = {"coordinator": "http://c", "selector-0": "http://s0", "selector-1": "http://s1"}
RUN: Final[dict[str, Any]] = {"problem_id": ID, "run": 2, "namespace": NAMESPACE}
STARTED: Final = State(problem_id=ID, run=2, plan=PLAN, model=MODEL, cause=7, version=4)
SPAWNED: Final = msgspec.structs.replace(
    STARTED, said="spawned", coordinator="http://c", selectors=["http://s0", "http://s1"]
)
SPAWNED_EVENT: Final = InfraSpawned(
    **RUN, backend="processes", coordinator="http://c", selectors=["http://s0", "http://s1"]
)
INFRA: Final = Infra(namespace=NAMESPACE, run=2, backend="processes", answering=ANSWERING)
DEATH: Final = Death(run=2, component="selector-0", life="a", reason="was killed by signal 9", log=["last words"])


def changed(state: State, **changes: Any) -> State:
    """The state with these changes."""
    return msgspec.structs.replace(state, **changes)


def infra(**changes: Any) -> Infra:
    """The infrastructure of run 2, all of it answering, with these changes."""
    return msgspec.structs.replace(INFRA, **changes)


def event(data: EventData, position: int = 9, version: int = 5) -> Event:
    """The event as the log would hold it."""
    return Event(
        id=UUID(int=1),
        type=type(data).__name__,
        schema=1,
        subject=f"{CATALOGUE[type(data).__name__].owner}/{ID}",
        version=version,
        position=position,
        time=datetime(2026, 1, 2, tzinfo=UTC),
        actor="setter",
        correlation=UUID(int=2),
        data=data,
    )


def started(run: int) -> ProblemStarted:
    """The start of a run."""
    return ProblemStarted(problem_id=ID, run=run, plan=PLAN, model=MODEL)


def test_names_lead_there_and_back() -> None:
    """A namespace is named after its problem, and other directories are nobody's namespace."""
    assert namespace_of(ID) == NAMESPACE
    assert problem_of(NAMESPACE) == ID
    assert Spec(problem_id=ID, run=1, plan=PLAN, model=MODEL).namespace == NAMESPACE
    assert is_namespace(NAMESPACE) and not is_namespace("orchestrator.lock")
    assert selector_names(PLAN) == ["selector-0", "selector-1"]


@pytest.mark.parametrize(
    "data",
    [
        ProblemStopped(problem_id=ID, run=1, reason="enough"),
        ProblemCompleted(problem_id=ID, run=1, rounds=3, model=MODEL),
        InfraStopped(**RUN, reason="enough"),
        ParticipationApproved(problem_id=ID, organization="A"),
    ],
)
def test_nothing_is_known_of_a_problem_that_was_never_started(data: EventData) -> None:
    """Whatever else happens to it."""
    assert evolve(None, event(data)) is None


_END = Ended(run=2, reason="enough", cause=9)
_EARLIER = Ended(run=1, reason="enough", cause=3)


@pytest.mark.parametrize(
    ("before", "data", "after"),
    [
        (None, started(1), State(problem_id=ID, run=1, plan=PLAN, model=MODEL, cause=9)),
        (
            changed(SPAWNED, wanted=False, ended=[_END], degraded=["coordinator"]),
            started(3),
            State(problem_id=ID, run=3, plan=PLAN, model=MODEL, cause=9, ended=[_END], version=4),
        ),
        (SPAWNED, ProblemStopped(problem_id=ID, run=2, reason="enough"), changed(SPAWNED, wanted=False, ended=[_END])),
        (
            SPAWNED,
            ProblemCompleted(problem_id=ID, run=2, rounds=3, model=MODEL),
            changed(SPAWNED, wanted=False, ended=[Ended(run=2, reason="The training is completed.", cause=9)]),
        ),
        (SPAWNED, ProblemStopped(problem_id=ID, run=1, reason="of an earlier run"), SPAWNED),
        (
            changed(SPAWNED, wanted=False),
            ProblemCompleted(problem_id=ID, run=2, rounds=3, model=MODEL),
            changed(SPAWNED, wanted=False),
        ),
        (STARTED, SPAWNED_EVENT, changed(SPAWNED, version=5)),
        (STARTED, changed(SPAWNED_EVENT, authority="PEM"), changed(SPAWNED, authority="PEM", version=5)),  # type: ignore[arg-type]
        (STARTED, InfraFailed(**RUN, reason="r", log=[]), changed(STARTED, said="failed", version=5)),
        (
            changed(SPAWNED, degraded=["selector-1"]),
            InfraDegraded(**RUN, component="coordinator", reason="r", log=[]),
            changed(SPAWNED, degraded=["coordinator", "selector-1"], version=5),
        ),
        (
            changed(SPAWNED, degraded=["coordinator", "selector-1"]),
            InfraRecovered(**RUN, component="coordinator"),
            changed(SPAWNED, degraded=["selector-1"], version=5),
        ),
        (
            changed(STARTED, ended=[_EARLIER, _END]),
            InfraStopped(problem_id=ID, run=1, namespace=NAMESPACE, reason="enough"),
            changed(STARTED, ended=[_END], version=5),
        ),
        # what was said of an earlier run counts as said, and changes nothing in this one
        (SPAWNED, changed(SPAWNED_EVENT, run=1, coordinator="http://old"), changed(SPAWNED, version=5)),  # type: ignore[arg-type]
        (SPAWNED, InfraFailed(**{**RUN, "run": 1}, reason="r", log=[]), changed(SPAWNED, version=5)),
        (
            SPAWNED,
            InfraDegraded(**{**RUN, "run": 1}, component="coordinator", reason="r", log=[]),
            changed(SPAWNED, version=5),
        ),
        (
            changed(SPAWNED, degraded=["coordinator"]),
            InfraRecovered(**{**RUN, "run": 1}, component="coordinator"),
            changed(SPAWNED, degraded=["coordinator"], version=5),
        ),
        (SPAWNED, ParticipationApproved(problem_id=ID, organization="A"), SPAWNED),
    ],
)
def test_events_make_the_state(before: State | None, data: EventData, after: State) -> None:
    """One event, one change."""
    assert evolve(before, event(data)) == after


@pytest.mark.parametrize(
    ("state", "settled"),
    [
        (STARTED, False),
        (SPAWNED, False),
        (changed(STARTED, said="failed"), True),
        (changed(SPAWNED, wanted=False, ended=[_END]), False),
        (changed(SPAWNED, wanted=False), True),
        (changed(STARTED, said="failed", ended=[_EARLIER]), False),
    ],
)
def test_only_settled_problems_are_left_alone(state: State, settled: bool) -> None:
    """A failed run stays as it is until somebody ends it."""
    assert state.settled is settled


def stopped(run: int, cause: int) -> Say:
    """That a run's infrastructure is gone."""
    data = InfraStopped(problem_id=ID, run=run, namespace=NAMESPACE, reason="enough")
    return Say(data, cause, f"{NAMESPACE}/{run}/stopped")


def said(data: EventData, key: str, death: Death | None = None) -> Say:
    """Something about run 2."""
    return Say(data, 7, f"{NAMESPACE}/2/{key}", death)


_LAUNCH = Launch(Spec(problem_id=ID, run=2, plan=PLAN, model=MODEL))
_DEGRADED = said(InfraDegraded(**RUN, component="selector-0", reason=DEATH.reason, log=DEATH.log), "degraded/a", DEATH)
_FAILURE = Failure(reason="it hangs", log=["l"])
_MOVED = {**ANSWERING, "selector-1": "http://elsewhere"}
_ENDED = changed(SPAWNED, wanted=False, ended=[_END])


@pytest.mark.parametrize(
    ("state", "there", "deaths", "step"),
    [
        # what should not be there
        (None, None, [], None),
        (None, INFRA, [], Remove(NAMESPACE)),
        # clients that come late hear of the end, for as long as there is somebody to tell them and nobody else waits
        (_ENDED, INFRA, [DEATH], Remove(NAMESPACE, farewell=True)),
        (_ENDED, infra(answering={}), [], Remove(NAMESPACE, farewell=True)),
        (_ENDED, infra(launched=False), [], Remove(NAMESPACE)),
        (_ENDED, infra(failure=_FAILURE), [], Remove(NAMESPACE)),
        (changed(_ENDED, said="nothing"), INFRA, [], Remove(NAMESPACE)),
        (changed(SPAWNED, run=3, ended=[_END]), INFRA, [], Remove(NAMESPACE)),
        (changed(SPAWNED, run=3, ended=[_END], wanted=False), INFRA, [], Remove(NAMESPACE)),
        (_ENDED, None, [DEATH], stopped(2, 9)),
        (changed(_ENDED, ended=[]), None, [], None),
        (changed(_ENDED, ended=[]), infra(launched=False), [], Remove(NAMESPACE)),
        (STARTED, infra(run=1), [], Remove(NAMESPACE)),
        (STARTED, infra(run=0, launched=False), [], Remove(NAMESPACE)),
        (changed(STARTED, said="failed"), infra(failure=_FAILURE), [], Remove(NAMESPACE)),
        (changed(STARTED, said="failed"), None, [], None),
        # an earlier run is told to be over before the next is launched
        (changed(STARTED, ended=[_EARLIER]), None, [], stopped(1, 3)),
        # what should be there
        (STARTED, None, [], _LAUNCH),
        (STARTED, infra(launched=False), [], _LAUNCH),
        (SPAWNED, infra(launched=False), [], _LAUNCH),
        # what there is to say of it
        (STARTED, infra(answering={}), [], None),
        (STARTED, infra(answering={k: v for k, v in ANSWERING.items() if k != "selector-1"}), [], None),
        (STARTED, INFRA, [], said(SPAWNED_EVENT, "spawned/4")),
        (SPAWNED, INFRA, [], None),
        (SPAWNED, infra(answering={}), [], None),
        (
            SPAWNED,
            infra(answering=_MOVED),
            [],
            said(changed(SPAWNED_EVENT, selectors=["http://s0", "http://elsewhere"]), "spawned/4"),  # type: ignore[arg-type]
        ),
        # who is to trust the selectors must hear of another authority
        (STARTED, infra(authority="PEM"), [], said(changed(SPAWNED_EVENT, authority="PEM"), "spawned/4")),  # type: ignore[arg-type]
        (SPAWNED, infra(authority="PEM"), [], said(changed(SPAWNED_EVENT, authority="PEM"), "spawned/4")),  # type: ignore[arg-type]
        (changed(SPAWNED, authority="PEM"), infra(authority="PEM"), [], None),
        (SPAWNED, infra(answering={}), [DEATH], _DEGRADED),
        (SPAWNED, INFRA, [DEATH], _DEGRADED),  # it has recovered already: both are told, in order
        (STARTED, INFRA, [DEATH], _DEGRADED),
        (SPAWNED, INFRA, [msgspec.structs.replace(DEATH, run=1)], None),
        (STARTED, infra(failure=_FAILURE), [], said(InfraFailed(**RUN, reason="it hangs", log=["l"]), "failed")),
        (STARTED, infra(failure=_FAILURE), [DEATH], _DEGRADED),
        (
            changed(SPAWNED, degraded=["selector-0", "selector-1"]),
            infra(answering={k: v for k, v in ANSWERING.items() if k != "selector-0"}),
            [],
            said(InfraRecovered(**RUN, component="selector-1"), "recovered/selector-1/4"),
        ),
        (changed(SPAWNED, degraded=["coordinator"]), infra(answering={}), [], None),
        # it is back, at an address that is told when the others are back as well
        (changed(SPAWNED, degraded=["selector-1"]), infra(answering={"selector-1": "http://elsewhere"}), [], None),
    ],
)
def test_one_step_at_a_time(state: State | None, there: Infra | None, deaths: list[Death], step: Step | None) -> None:
    """What should run and what runs name the next step."""
    assert decide(state, there, deaths) == step
