"""What should run, what was said of it, and what to do next: pure functions, no I/O.

`evolve` turns the log into one `State` a problem. `decide` compares it with what runs and names one step; the
reconciler takes it and asks again until there is none. Whatever was interrupted is thus taken up where it stands.
"""

from collections.abc import Sequence
from typing import Any, Final, Literal

import msgspec

from fedota.events import Event, EventData
from fedota.events.orchestrator import InfraDegraded, InfraFailed, InfraRecovered, InfraSpawned, InfraStopped
from fedota.events.problems import ModelFile, Plan, ProblemCompleted, ProblemStarted, ProblemStopped

COORDINATOR: Final = "coordinator"
_PREFIX: Final = "fedota-"


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """A run that is over, `InfraStopped` still to be said; `cause` is the position of the event that ended it."""

    run: int
    reason: str
    cause: int


class State(msgspec.Struct, frozen=True, kw_only=True):
    """One problem as the log tells it.

    `cause` is the position of the run's `ProblemStarted`, `version` how much the orchestrator has said of the problem.
    `said` and what follows it is of the newest run; `degraded` names the components that were last said to have died.
    """

    problem_id: str
    run: int
    plan: Plan
    model: ModelFile
    cause: int
    wanted: bool = True
    ended: list[Ended] = []
    version: int = 0
    said: Literal["nothing", "spawned", "failed"] = "nothing"
    coordinator: str = ""
    selectors: list[str] = []
    authority: str = ""
    degraded: list[str] = []

    @property
    def settled(self) -> bool:
        """Whether nothing should run and nothing is left to say."""
        return not self.ended and (not self.wanted or self.said == "failed")


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """What a launcher is asked to keep running."""

    problem_id: str
    run: int
    plan: Plan
    model: ModelFile

    @property
    def namespace(self) -> str:
        """Where it runs."""
        return namespace_of(self.problem_id)


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a launcher gave up, and the last lines that the component wrote."""

    reason: str
    log: list[str]


class Infra(msgspec.Struct, frozen=True, kw_only=True):
    """What there is of a namespace.

    `answering` has the address of each component that answers now. `authority` is the certificate (PEM) behind those of
    the selectors, empty where they speak plain HTTP. `launched` is false for what an earlier life of the
    launcher left behind: its addresses are remembered, but nothing of it runs.
    """

    namespace: str
    run: int
    backend: str
    launched: bool = True
    answering: dict[str, str] = {}
    authority: str = ""
    failure: Failure | None = None


class Death(msgspec.Struct, frozen=True, kw_only=True):
    """A component that had answered in this run does not any more; `life` is unique to the process that ended."""

    run: int
    component: str
    life: str
    reason: str
    log: list[str]


class Launch(msgspec.Struct, frozen=True):
    """Bring this up and keep it up."""

    spec: Spec


class Remove(msgspec.Struct, frozen=True):
    """Leave nothing of the namespace.

    `farewell` when it may stay for a while: its run is over, clients that come late do not know yet, and its selectors
    are there to tell them.
    """

    namespace: str
    farewell: bool = False


class Say(msgspec.Struct, frozen=True):
    """Append `data`, once for this `key`; `cause` is the position of the event that it follows from.

    `death` is the one that is told by this.
    """

    data: EventData
    cause: int
    key: str
    death: Death | None = None


Step = Launch | Remove | Say


def namespace_of(problem_id: str) -> str:
    """The namespace of a problem."""
    return f"{_PREFIX}{problem_id}"


def problem_of(namespace: str) -> str:
    """The problem of a namespace."""
    return namespace.removeprefix(_PREFIX)


def is_namespace(name: str) -> bool:
    """Whether `namespace_of` gave this name: only such ones are the orchestrator's to remove."""
    return name.startswith(_PREFIX)


def selector_names(plan: Plan) -> list[str]:
    """The plan's selectors, in the order of their addresses."""
    return [f"selector-{number}" for number in range(plan.selectors)]


def evolve(state: State | None, event: Event) -> State | None:
    """The state after an event; None as long as the problem was never started."""
    match event.data:
        case ProblemStarted() as started:
            return _started(state, started, event.position)
        case ProblemStopped(run=run, reason=reason) if state:
            return _ended(state, Ended(run=run, reason=reason, cause=event.position))
        case ProblemCompleted(run=run) if state:
            return _ended(state, Ended(run=run, reason="The training is completed.", cause=event.position))
        case InfraSpawned() | InfraFailed() | InfraDegraded() | InfraRecovered() | InfraStopped() as said if state:
            return _said(msgspec.structs.replace(state, version=event.version), said)
    return state


def _started(state: State | None, data: ProblemStarted, position: int) -> State:
    return State(
        problem_id=data.problem_id,
        run=data.run,
        plan=data.plan,
        model=data.model,
        cause=position,
        ended=state.ended if state else [],
        version=state.version if state else 0,
    )


def _ended(state: State, ended: Ended) -> State:
    if ended.run != state.run or not state.wanted:
        return state
    return msgspec.structs.replace(state, wanted=False, ended=[*state.ended, ended])


def _said(state: State, data: EventData) -> State:
    match data:
        case InfraStopped(run=run):
            return msgspec.structs.replace(state, ended=[ended for ended in state.ended if ended.run != run])
        case InfraSpawned(run=state.run, coordinator=coordinator, selectors=selectors, authority=authority):
            addresses = {"coordinator": coordinator, "selectors": selectors, "authority": authority}
            return msgspec.structs.replace(state, said="spawned", **addresses)
        case InfraFailed(run=state.run):
            return msgspec.structs.replace(state, said="failed")
        case InfraDegraded(run=state.run, component=component):
            return msgspec.structs.replace(state, degraded=sorted({*state.degraded, component}))
        case InfraRecovered(run=state.run, component=component):
            return msgspec.structs.replace(state, degraded=[name for name in state.degraded if name != component])
    return state


def decide(state: State | None, infra: Infra | None, deaths: Sequence[Death] = ()) -> Step | None:
    """The next step, given what there is and which deaths were not told yet; None when all is as it should be."""
    run = state.run if state and state.wanted and state.said != "failed" else None
    if infra and infra.run != run:
        return Remove(infra.namespace, farewell=state is not None and _is_to_be_told(state, infra))
    if state and state.ended:
        return _say_stopped(state, state.ended[0])
    if state is None or run is None:
        return None
    if infra is None or not infra.launched:
        return Launch(Spec(problem_id=state.problem_id, run=state.run, plan=state.plan, model=state.model))
    return _say(state, infra, deaths)


def _is_to_be_told(state: State, infra: Infra) -> bool:
    """Whether it is of the newest run and came up: its clients may not know yet that it is over, and can be told."""
    return infra.run == state.run and state.said == "spawned" and infra.launched and infra.failure is None


def _say_stopped(state: State, ended: Ended) -> Say:
    namespace = namespace_of(state.problem_id)
    data = InfraStopped(problem_id=state.problem_id, run=ended.run, namespace=namespace, reason=ended.reason)
    return Say(data, ended.cause, f"{namespace}/{ended.run}/stopped")


def _say(state: State, infra: Infra, deaths: Sequence[Death]) -> Say | None:
    """What is not said yet of infrastructure that should run."""
    about: dict[str, Any] = {"problem_id": state.problem_id, "run": state.run, "namespace": infra.namespace}
    key = f"{infra.namespace}/{state.run}"
    for death in (death for death in deaths if death.run == state.run):
        degraded = InfraDegraded(**about, component=death.component, reason=death.reason, log=death.log)
        return Say(degraded, state.cause, f"{key}/degraded/{death.life}", death)
    if infra.failure:
        failed = InfraFailed(**about, reason=infra.failure.reason, log=infra.failure.log)
        return Say(failed, state.cause, f"{key}/failed")
    names = [COORDINATOR, *selector_names(state.plan)]
    now = [infra.answering.get(name, "") for name in names]
    before = [state.coordinator, *state.selectors]
    if all(now) and (state.said != "spawned" or now != before or infra.authority != state.authority):
        answering: dict[str, Any] = {"coordinator": now[0], "selectors": now[1:], "authority": infra.authority}
        spawned = InfraSpawned(**about, backend=infra.backend, **answering)
        return Say(spawned, state.cause, f"{key}/spawned/{state.version}")
    same = {name for name, new, old in zip(names, now, before, strict=False) if new and new == old}
    for name in sorted(same.intersection(state.degraded)):
        recovered = InfraRecovered(**about, component=name)
        return Say(recovered, state.cause, f"{key}/recovered/{name}/{state.version}")
    return None
