"""The round's state machine among selectors and clients that fail at any moment, as Hypothesis picks."""

from random import Random
from typing import Any
from uuid import UUID

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from fedota.events.problems import Plan
from fedota.events.rounds import Checkpoint, RoundUpdated
from fedota.runtime.coordinator import rounds
from fedota.runtime.coordinator.state import Aggregated, Event, Handed, Result, Rules, Spoiled, Stored, Tick
from fedota.runtime.protocol import Claim, Held, ModelRef, Told
from services.rounds import domain

PLAN = Plan(
    rounds=3,
    goal_count=3,
    minimum_fraction=0.6,
    over_selection=1.3,
    selection_timeout=60,
    report_timeout=60,
    attempts=1000,
    selectors=2,
)
_NAMES = ("a", "b")


class Selector:
    """What a selector does, without its network."""

    def __init__(self, name: str, life: int) -> None:
        self.name = name
        self.life = f"{name}{life}"
        self.waiting = 0
        self.held: Held | None = None
        self.accepted: set[str] = set()
        self.claimed: set[str] = set()

    def told(self) -> Told:
        """How things stand."""
        held = self.held
        if held is not None:
            held = msgspec.structs.replace(
                held, reported=len(self.accepted), claimed=sorted(self.claimed & self.accepted)
            )
        return Told(name=self.name, life=self.life, waiting=self.waiting, held=held)


class World:
    """A coordinator, selectors, clients that keep their updates, and what was recorded."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0
        self.lives = 0
        self.selectors = {name: Selector(name, 0) for name in _NAMES}
        self.tickets: dict[str, tuple[str, str, str]] = {}  # cohort, selector and its life
        self.recorded: list[RoundUpdated] = []
        self.unrecorded: list[tuple[RoundUpdated, frozenset[str]]] = []
        self.counted: list[frozenset[str]] = []
        members = {"org": True}
        run = domain.Run(number=1, plan=PLAN, cause=UUID(int=0), correlation=UUID(int=0))
        self.log = domain.State(run=run, members=members)
        self.restart_coordinator()

    def restart_coordinator(self) -> None:
        """What was not recorded is forgotten."""
        self.lives += 1
        self.unrecorded = []
        self.sums: dict[str, frozenset[str]] = {}
        self.rules = Rules(problem_id="p", run=1, plan=PLAN, life=f"c{self.lives}")
        resume = domain.resume(self.log, 1, self.recorded[::-1])
        digest = resume.checkpoint.sha256 if resume.checkpoint else "0" * 64
        where: dict[str, Any] = {"round": resume.round, "attempt": resume.attempt, "now": self.now}
        base = ModelRef(sha256=digest, size=1)
        if resume.finished:
            self.state = rounds.over(base=base, **where)
        else:
            self.state, reports = rounds.start(self.rules, base=base, **where)
            self.unrecorded += [(one, frozenset()) for one in reports]

    def happens(self, event: Event, counted: frozenset[str] = frozenset()) -> None:
        """The coordinator hears of something."""
        before = self.state
        self.state, reports = rounds.step(self.rules, before, event, self.now)
        self.unrecorded += [(one, counted if one.stage == "completed" else frozenset()) for one in reports]
        if before.phase == "collecting" != self.state.phase and self.state.phase != "aggregating":
            self.sums = {}

    def record(self) -> None:
        """The oldest report reaches the log, whose rules it must follow."""
        if self.unrecorded:
            report, counted = self.unrecorded.pop(0)
            report = msgspec.structs.replace(report, report=len(self.recorded) + 1)
            self.recorded += domain.decide(self.log, self.recorded[-1] if self.recorded else None, report)
            if report.stage == "completed":
                self.counted.append(counted)

    def restart_selector(self, name: str) -> None:
        """All it knew is gone."""
        self.lives += 1
        self.selectors[name] = Selector(name, self.lives)

    def tell(self, name: str) -> None:
        """A selector says how things stand."""
        self.happens(self.selectors[name].told())

    def obey(self, name: str) -> None:
        """A selector does what it is told to."""
        selector = self.selectors[name]
        orders = rounds.orders(self.rules, self.state, name, selector.life)
        if orders.work is None:
            if not orders.settling:
                selector.held, selector.accepted, selector.claimed = None, set(), set()
            return
        work = orders.work
        if selector.held is None or selector.held.cohort != work.cohort:
            selected = 0 if work.collect else min(work.share, selector.waiting)
            for _ in range(selected):
                self.tickets[f"t{len(self.tickets)}"] = (work.cohort, name, selector.life)
            selector.waiting -= selected
            selector.accepted, selector.claimed = set(), set()
            selector.held = Held(
                cohort=work.cohort,
                round=work.round,
                attempt=work.attempt,
                base=work.base.sha256,
                share=work.share,
                deadline=work.deadline,
                selected=selected,
            )
        selector.held = msgspec.structs.replace(selector.held, closed=bool(work.collect))
        self.tell(name)
        if work.collect and selector.accepted and self.state.phase == "collecting":
            self._hand_over(selector, work.cohort)

    def _hand_over(self, selector: Selector, cohort: str) -> None:
        assert self.state.cohort is not None
        if self.state.cohort.id != cohort or selector.life not in self.state.cohort.counting:
            return
        others = [sum_ for life, sum_ in self.sums.items() if life != selector.life]
        if selector.accepted & frozenset().union(*others):
            assert self.state.cohort.taken_up, "a coordinator that saw everything lets no two sums hold one update"
            self.happens(Spoiled(life=selector.life, cohort=cohort))
            return
        self.sums[selector.life] = frozenset(selector.accepted)
        self.happens(Handed(life=selector.life, cohort=cohort, reported=len(selector.accepted)))

    def report(self, ticket: str, name: str) -> None:
        """A client sends its update to a selector, perhaps another one than before."""
        cohort, issuer, life = self.tickets[ticket]
        selector = self.selectors[name]
        held = selector.held
        if held is None or held.cohort != cohort or held.closed or ticket in selector.accepted:
            return
        if life != selector.life and ticket not in selector.claimed:
            wanted = Claim(life=selector.life, cohort=cohort, ticket=ticket, name=issuer, issuer=life)
            answer = rounds.claim(self.state, wanted, self.now).answer
            self.happens(wanted)
            if answer != "granted":
                return
            selector.claimed.add(ticket)
        selector.accepted.add(ticket)

    def conclude(self) -> None:
        """The checkpoint is computed and stored."""
        if self.state.phase == "aggregating":
            cohort = self.state.cohort
            assert cohort is not None
            handed = [self.sums[life] for life, member in cohort.members.items() if member.handed]
            counted = frozenset().union(*handed)
            assert sum(map(len, handed)) == len(counted) == cohort.reported >= PLAN.minimum_count
            assert all(self.tickets[ticket][0] == cohort.id for ticket in counted)
            digest = f"{self.lives:08x}{self.state.round:056x}"
            model = ModelRef(sha256=digest, size=1)
            result = Result(model=model, reported=len(counted), examples=len(counted), participants=["org"])
            self.happens(Aggregated(result=result))
            key = f"problems/p/checkpoints/1/{self.state.round}.safetensors"
            self.sums = {}
            self.happens(Stored(checkpoint=Checkpoint(key=key, sha256=digest, size=1)), counted)

    def proceed(self) -> None:
        """Everybody does what there is to do, but nothing is concluded or recorded."""
        for name in _NAMES:
            self.selectors[name].waiting = 3
            self.tell(name)
            self.obey(name)
        for ticket in list(self.tickets)[-12:]:
            self.report(ticket, self.tickets[ticket][1])
        for name in _NAMES:
            self.tell(name)

    def record_all(self) -> None:
        """The log has everything."""
        while self.unrecorded:
            self.record()

    def pass_time(self, seconds: float) -> None:
        """Nothing else happens."""
        self.now += seconds
        self.happens(Tick())


_SMOOTH = ["proceed"] * 6 + ["conclude", "record_all"] * 3
_SINGLE = ["tell", "obey", "arrive", "report", "report", "record", "pass_time"]
_FAULTS = ["restart_selector", "restart_coordinator"]


@settings(max_examples=1000, deadline=None)
@given(
    st.randoms(use_true_random=True)
)  # drawn evenly: what Hypothesis prefers, short and simple, seldom goes wrong here
def test_whatever_fails_the_training_ends_and_no_update_counts_twice(chance: Random) -> None:
    """The reports always follow the log's rules, and once nothing fails any more, the last round completes."""
    actions = chance.choices(_SMOOTH + _SINGLE + _FAULTS, k=chance.randint(5, 60))
    world = World()
    for action in actions:
        name, number = chance.choice(_NAMES), chance.randrange(6)
        match action:
            case "tell" | "obey" | "restart_selector":
                getattr(world, action)(name)
            case "arrive":
                world.selectors[name].waiting += 1 + number
            case "report":
                for ticket in list(world.tickets)[-6:][number : number + 1]:
                    world.report(ticket, name)
            case "pass_time":
                world.pass_time([0.1, 1.0, 3.0, 6.0, 16.0, 61.0][number])
            case _:
                getattr(world, action)()
    for _ in range(400):
        if world.recorded and world.recorded[-1].final:
            break
        world.proceed()
        for name in _NAMES:
            world.obey(name)
        world.conclude()
        world.record_all()
        world.pass_time(1.0)
    completed = [one for one in world.recorded if one.stage == "completed"]
    assert [one.round for one in completed] == [1, 2, 3], "the training did not come to its end"
    assert completed[-1].final
    assert sum(map(len, world.counted)) == len(frozenset().union(*world.counted))
    assert [one.reported for one in completed] == list(map(len, world.counted))
