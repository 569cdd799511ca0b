"""Whatever happens in whatever order, the orchestrator settles in the right state and says each thing once."""

from collections import Counter
from functools import reduce
from typing import Any

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fedota.events import Event, EventData
from fedota.events.orchestrator import InfraDegraded, InfraFailed, InfraRecovered, InfraSpawned, InfraStopped
from fedota.events.problems import ModelFile, Plan, ProblemCompleted, ProblemStarted, ProblemStopped
from services.orchestrator.domain import (
    COORDINATOR,
    Death,
    Failure,
    Infra,
    Launch,
    Remove,
    Say,
    State,
    Step,
    decide,
    evolve,
    selector_names,
)
from tests.unit.orchestrator.test_domain import ID, event

_PLAN = Plan(rounds=1, goal_count=1, selectors=2)
_MODEL = ModelFile(key="k", sha256="a" * 64, size=1)
_NAMES = [COORDINATOR, *selector_names(_PLAN)]
_ENOUGH_STEPS = 50


class World(RuleBasedStateMachine):
    """One problem, its log, and a launcher whose components live and die as they like."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[Event] = []
        self.keys: dict[str, EventData] = {}
        self.seen = 0  # how much of the log the read model knows
        self.run = 0
        self.going = False  # as the problems service sees it
        self.infra: Infra | None = None
        self.deaths: list[Death] = []
        self.addresses: dict[str, str] = {}  # what the namespace's directory remembers
        self.counter = 0

    def append(self, data: EventData) -> None:
        """As the log would."""
        owner = "orchestrator" if type(data).__name__.startswith("Infra") else "problems"
        version = 1 + sum(entry.subject == f"{owner}/{ID}" for entry in self.log)
        self.log.append(event(data, position=len(self.log) + 1, version=version))

    def state(self) -> State | None:
        """What the read model knows."""
        return reduce(evolve, self.log[: self.seen], None)

    def take(self, step: Step, *, caught_up: bool = True) -> None:
        """Do as the reconciler does; without `caught_up` the read model has not heard of it yet."""
        match step:
            case Launch(spec=spec):
                assert self.infra is None or not self.infra.launched, "launched twice"
                if self.infra is None:
                    self.addresses = {}
                self.infra = Infra(namespace=spec.namespace, run=spec.run, backend="processes")
            case Remove():
                self.infra = None
            case Say(data=data, key=key, death=death):
                if key not in self.keys:
                    self.append(data)
                assert self.keys.setdefault(key, data) == data, "the key was used for something else"
                if death:
                    self.deaths.remove(death)
        if caught_up:
            self.seen = len(self.log)

    @initialize()
    def start_first(self) -> None:
        """Every problem that matters is started."""
        self.start()

    @precondition(lambda self: not self.going)
    @rule()
    def start(self) -> None:
        """The setter starts a run."""
        self.run += 1
        self.going = True
        self.append(ProblemStarted(problem_id=ID, run=self.run, plan=_PLAN, model=_MODEL))

    @precondition(lambda self: self.going)
    @rule(completed=st.booleans())
    def end(self, completed: bool) -> None:
        """The run is over."""
        self.going = False
        self.append(
            ProblemCompleted(problem_id=ID, run=self.run, rounds=1, model=_MODEL)
            if completed
            else ProblemStopped(problem_id=ID, run=self.run, reason="enough")
        )

    @rule()
    def read(self) -> None:
        """The read model catches up."""
        self.seen = len(self.log)

    @rule(caught_up=st.booleans())
    def step(self, caught_up: bool) -> None:
        """The reconciler takes one step."""
        if step := decide(self.state(), self.infra, self.deaths):
            self.take(step, caught_up=caught_up)

    @precondition(lambda self: self.infra is not None and self.infra.launched and not self.infra.failure)
    @rule(names=st.sets(st.sampled_from(_NAMES), min_size=1) | st.just(set(_NAMES)), moves=st.booleans())
    def answer(self, names: set[str], moves: bool) -> None:
        """Components answer, at the address that they had unless somebody has taken that."""
        assert self.infra
        for name in sorted(names - set(self.infra.answering)):
            if moves or name not in self.addresses:
                self.counter += 1
                self.addresses[name] = f"http://{name}/{self.counter}"
            self.there(answering={**self.infra.answering, name: self.addresses[name]})

    @precondition(lambda self: self.infra is not None and self.infra.answering)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        """A component that answered dies."""
        assert self.infra
        name = data.draw(st.sampled_from(sorted(self.infra.answering)))
        self.counter += 1
        death = Death(run=self.infra.run, component=name, life=str(self.counter), reason="killed", log=[])
        self.deaths.append(death)
        self.there(answering={key: url for key, url in self.infra.answering.items() if key != name})

    @precondition(lambda self: self.infra is not None and self.infra.launched)
    @rule()
    def give_up(self) -> None:
        """The launcher loses its patience."""
        self.there(failure=Failure(reason="never answered", log=[]))

    @rule()
    def restart(self) -> None:
        """The orchestrator is killed and started again: processes and memory are gone, the directory is not."""
        self.deaths = []
        self.seen = len(self.log)
        if self.infra:
            self.there(launched=False, answering={}, failure=None)

    def there(self, **changes: Any) -> None:
        """Change the infrastructure."""
        assert self.infra
        self.infra = msgspec.structs.replace(self.infra, **changes)

    @rule()
    def settle(self) -> None:
        """Left alone, it comes to rest, and then everything is as it should be."""
        self.seen = len(self.log)
        for _ in range(_ENOUGH_STEPS):
            step = decide(self.state(), self.infra, self.deaths)
            if step is None:
                break
            self.take(step)
        else:
            raise AssertionError("never comes to rest")
        failed = self.run in {entry.data.run for entry in self.log if isinstance(entry.data, InfraFailed)}
        if self.going and not failed:
            assert self.infra and self.infra.launched and self.infra.run == self.run
            assert not any(death.run == self.run for death in self.deaths), "a death was not told"
            self.check_what_was_said()
        else:
            assert self.infra is None
        over = range(1, self.run if self.going else self.run + 1)
        assert Counter(self.said(InfraStopped)) == Counter(over), "each run that is over was told to be so, once"

    def check_what_was_said(self) -> None:
        """Of a run that goes on people know the addresses, and what does not answer after it had."""
        assert self.infra
        if set(self.infra.answering) == set(_NAMES):
            spawned = [entry.data for entry in self.log if isinstance(entry.data, InfraSpawned)][-1]
            now = [self.infra.answering[name] for name in _NAMES]
            assert [spawned.coordinator, *spawned.selectors] == now and spawned.run == self.run
            state = self.state()
            assert state and state.degraded == []

    def said(self, kind: type[Any]) -> list[int]:
        """The runs of which this was said."""
        return [entry.data.run for entry in self.log if isinstance(entry.data, kind)]

    @invariant()
    def nothing_is_said_twice(self) -> None:
        """Not even by a restarted orchestrator, nor on a read model that lags."""
        assert max(Counter(self.said(InfraFailed)).values(), default=0) <= 1
        assert max(Counter(self.said(InfraStopped)).values(), default=0) <= 1
        addresses: dict[int, tuple[str, ...]] = {}
        degraded: set[tuple[int, str]] = set()
        for entry in self.log:
            match entry.data:
                case InfraSpawned(run=run, coordinator=coordinator, selectors=selectors):
                    assert addresses.get(run) != (coordinator, *selectors), "spawned again, at the same addresses"
                    addresses[run] = (coordinator, *selectors)
                case InfraDegraded(run=run, component=component):
                    degraded.add((run, component))
                case InfraRecovered(run=run, component=component):
                    assert (run, component) in degraded, "recovered from nothing"
                    degraded.remove((run, component))

    def teardown(self) -> None:
        """Every story ends settled."""
        self.settle()


TestWorld = World.TestCase
TestWorld.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
