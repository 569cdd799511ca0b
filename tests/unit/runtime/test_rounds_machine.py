"""The round's state machine among everything that can go wrong, as Hypothesis picks.

A coordinator with its journal and its reports, selectors that obey, clients that keep their updates, a log that judges
each report by its own rules, an object store, and a network between all of them: it duplicates messages, lets newer
ones overtake older ones, delivers some only after whoever sent them has gone, and loses answers. Any process may be
killed between any two steps, the coordinator with its directory or without. Time is a number here.
"""

from collections.abc import Callable, Iterator
from random import Random
from typing import Any, NamedTuple
from uuid import UUID

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from fedota.errors import FedotaError
from fedota.events.problems import Plan
from fedota.events.rounds import Checkpoint, RoundUpdated
from fedota.runtime.coordinator import rounds, words
from fedota.runtime.coordinator.journal import Entry, begin, last_checkpoint, still_true
from fedota.runtime.coordinator.reporter import Reporter
from fedota.runtime.coordinator.state import (
    Aggregated,
    Awoken,
    Cohort,
    Event,
    Handed,
    Recorded,
    Result,
    Rules,
    Spoiled,
    Tick,
)
from fedota.runtime.protocol import Claim, Held, ModelRef, Orders, Told, Work
from services.rounds import domain


def plan(fraction: float) -> Plan:
    """Three updates a round are wanted, and more or less needed."""
    return Plan(
        rounds=4,
        goal_count=3,
        minimum_fraction=fraction,
        over_selection=1.3,
        selection_timeout=60,
        report_timeout=60,
        attempts=1000,
        selectors=2,
    )


NAMES = ("a", "b")
MODEL = "0" * 64


class Sum(NamedTuple):
    """A selector's sum: whose updates are in it."""

    life: str
    cohort: str
    collection: str
    updates: frozenset[str]


class Grant(NamedTuple):
    """The answer to a claim, on its way back."""

    life: str
    cohort: str
    ticket: str
    issuer: str


class Collector:
    """The sums of one collection."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.closed = False
        self.sums: dict[str, frozenset[str]] = {}


class Selector:
    """What a selector does, without its network."""

    def __init__(self, name: str, life: int) -> None:
        self.name = name
        self.life = f"{name}{life}"
        self.told = 0
        self.waiting = 0
        self.orders: Orders | None = None
        self.begun: set[str] = set()
        self.held: Held | None = None
        self.drop()

    def drop(self) -> None:
        """Forget the cohort."""
        self.held = None
        self.handed = ""
        self.accepted: set[str] = set()
        self.begun_clients: set[str] = set()  # tickets of this life whose clients have the model
        self.claimed: dict[str, str] = {}

    def says(self) -> Told:
        """How things stand."""
        self.told += 1
        held = self.held
        if held is not None:
            claimed = {ticket: life for ticket, life in self.claimed.items() if ticket in self.accepted}
            begun, reported = len(self.begun_clients), len(self.accepted)
            held = msgspec.structs.replace(held, begun=begun, reported=reported, claimed=claimed)
        return Told(name=self.name, life=self.life, number=self.told, waiting=self.waiting, held=held)


class World:
    """Everything around the machine; each method is one thing that may happen."""

    def __init__(self, fraction: float) -> None:
        self.plan = plan(fraction)
        self.now = 1_800_000_000.0
        self.lives = 0
        self.selectors = {name: Selector(name, 0) for name in NAMES}
        self.tickets: dict[str, tuple[str, str, str]] = {}  # cohort, selector and its life
        self.begun: set[str] = set()  # tickets whose clients have the model
        self.wire: list[Told | Claim | Sum | Grant | RoundUpdated] = []
        self.recorded: list[RoundUpdated] = []
        self.stored: set[str] = set()  # keys in the object store
        self.made: dict[str, frozenset[str]] = {}  # which updates a checkpoint is made of
        self.concluded: dict[str, tuple[str, frozenset[str]]] = {}  # by cohort, its checkpoint and the updates in it
        self.forgotten: set[str] = set()  # cohorts that a coordinator lost with its directory
        self.journal: Entry | None = None
        self.strays = 0  # reports of an earlier life that were recorded after it had gone
        run = domain.Run(number=1, plan=self.plan, cause=UUID(int=0), correlation=UUID(int=0))
        self.log = domain.State(run=run, members={"org": True})
        self.begin(keeps=True)

    # The coordinator.

    def begin(self, *, keeps: bool) -> None:
        """A coordinator's life begins, with the directory of the one before or without."""
        self.lives += 1
        before = self.forgotten
        if not keeps:
            self.journal = None
        self.rules = Rules(problem_id="p", run=1, plan=self.plan, life=f"c{self.lives}")
        self.collector: Collector | None = None
        self.merging: list[tuple[Collector, Sum]] = []
        resume = domain.resume(self.log, 1, self.recorded[::-1])
        entry = still_true(self.journal, resume, MODEL) if self.journal else None
        known = {one.checkpoint.key for one in [*self.recorded, *(entry.reports if entry else [])] if one.checkpoint}
        self.forgotten = {cohort for cohort, (key, _) in self.concluded.items() if key not in known}
        assert not self.forgotten - before or not keeps or self.strays, "a round was forgotten"
        newest = (last_checkpoint(entry.reports) if entry else None) or resume.checkpoint
        self.recorded_base = resume.checkpoint.sha256 if resume.checkpoint else MODEL
        base = ModelRef(sha256=newest.sha256 if newest else MODEL, size=1)
        self.reporter = Reporter(_nowhere, resume.report, keep=self._keep)
        self.state, reports = begin(self.rules, resume, entry, base, self.now)
        self.ended = self.state.ended
        self.reporter.restore(entry.reports if entry else [])
        self.reporter.tell(reports)

    def _keep(self, reports: Any) -> None:
        self.journal = Entry(run=1, base=self.recorded_base, reports=list(reports), ended=self.ended)

    @property
    def queue(self) -> list[RoundUpdated]:
        """The reports that are not recorded, as far as the coordinator knows."""
        return list(self.reporter._queue)

    def happens(self, event: Event) -> None:
        """The coordinator hears of something."""
        state, reports = rounds.step(self.rules, self.state, event, self.now)
        self.ended = state.ended
        self.reporter.tell(reports)
        self.state = state
        assert rounds.step(self.rules, state, Tick(), self.now) == (state, []), "it had not come to rest"
        assert rounds.wakes(state) > self.now, "time alone changes nothing now, and yet it would wake"
        assert len(state.unrecorded) <= rounds.MOST_AHEAD

    def kill_coordinator(self, *, keeps: bool, stray: bool) -> None:
        """What it sent last may be recorded long after."""
        if stray and self.queue and self._may_be_sent(self.queue[0]):
            self.wire.append(self.queue[0])
        self.begin(keeps=keeps)

    def pass_time(self, seconds: float) -> None:
        """Nothing else happens."""
        self.now += seconds
        self.happens(Tick())

    def stand_still(self, seconds: float) -> None:
        """The coordinator does not run for a while, and knows it."""
        self.now += seconds
        self.happens(Awoken())

    # Reports.

    def _may_be_sent(self, report: RoundUpdated) -> bool:
        return report.checkpoint is None or report.checkpoint.key in self.stored

    def store(self) -> None:
        """The oldest checkpoint reaches the object store."""
        waiting = [one.checkpoint.key for one in self.queue if one.checkpoint and one.checkpoint.key not in self.stored]
        self.stored |= set(waiting[:1])

    def complain(self) -> None:
        """The store is away, and the round says so before it is told to be completed."""
        if self.queue and not self._may_be_sent(self.queue[0]):
            self.reporter._put_first(words.unstored(self.queue[0], len(self.state.unrecorded), "the store is away"))

    def record(self, *, answered: bool = True) -> None:
        """The oldest report reaches the log, whose rules it must follow."""
        if not self.queue or not self._may_be_sent(report := self.queue[0]):
            return
        if not self._log(report):
            assert self.strays, "the log refused what no earlier life had a part in"
            self.begin(keeps=False)
            return
        if not answered:
            return
        self.reporter._queue.popleft()
        self.reporter._number = report.report
        if report.checkpoint:
            self.recorded_base = report.checkpoint.sha256
            self.happens(Recorded(key=report.checkpoint.key))

    def _log(self, report: RoundUpdated) -> bool:
        if report in self.recorded:
            assert self.recorded[report.report - 1] == report
            return True
        try:
            self.recorded += domain.decide(self.log, self.recorded[-1] if self.recorded else None, report)
        except FedotaError:
            return False
        return True

    # The network.

    def deliver(self, number: int, *, again: bool) -> None:
        """Any message that is under way; one that is delivered may come once more."""
        if not self.wire:
            return
        message = self.wire[number % len(self.wire)] if again else self.wire.pop(number % len(self.wire))
        match message:
            case Told():
                self.happens(message)
            case Claim():
                self._claim(message)
            case Sum():
                self._arrive(message)
            case Grant():
                self._granted(message)
            case RoundUpdated():
                self.strays += message not in self.recorded and self._log(message)

    def lose(self, number: int) -> None:
        """A message that never arrives."""
        if self.wire:
            self.wire.pop(number % len(self.wire))

    def _claim(self, claim: Claim) -> None:
        answer = rounds.claim(self.state, claim, self.now).answer
        self.happens(claim)
        if answer == "granted":
            self.wire.append(Grant(claim.life, claim.cohort, claim.ticket, claim.issuer))

    def _granted(self, grant: Grant) -> None:
        for selector in self.selectors.values():
            held = selector.held
            if selector.life == grant.life and held is not None and held.cohort == grant.cohort:
                selector.claimed[grant.ticket] = grant.issuer

    def _arrive(self, sum_: Sum) -> None:
        """A sum is taken in if it is wanted; adding it takes a while, and there is one after the other."""
        cohort = self.state.cohort
        if self.state.phase != "collecting" or cohort is None or sum_.life not in cohort.counting:
            return
        name = rounds.collection(self.rules, cohort)
        if (sum_.cohort, sum_.collection) != (cohort.id, name):
            return
        if self.collector is None or self.collector.name != name:
            self.collector = Collector(name)
        self.merging.append((self.collector, sum_))

    def merge(self) -> None:
        """The oldest sum that is here is added."""
        if not self.merging:
            return
        collector, sum_ = self.merging.pop(0)
        if collector.closed or sum_.life in collector.sums:
            return
        if sum_.updates & frozenset().union(*collector.sums.values()):
            assert not sum_.cohort.startswith(f"{self.rules.life}-"), (
                "a coordinator that saw everything lets no two sums hold one update"
            )
            self.happens(Spoiled(life=sum_.life, cohort=sum_.cohort))
            return
        collector.sums[sum_.life] = sum_.updates
        wanted = self.state.phase == "collecting" and self.state.cohort is not None
        if wanted and self.state.cohort and rounds.collection(self.rules, self.state.cohort) == collector.name:
            self.happens(Handed(life=sum_.life, cohort=sum_.cohort, reported=len(sum_.updates)))

    def conclude(self) -> None:
        """The checkpoint is computed."""
        if self.state.phase != "aggregating":
            return
        cohort, collector = self.state.cohort, self.collector
        assert cohort is not None and collector is not None
        while self.merging:
            self.merge()
        collector.closed = True
        counted = frozenset().union(*collector.sums.values())
        assert sum(map(len, collector.sums.values())) == len(counted) >= cohort.reported >= self.plan.minimum_count
        assert all(self.tickets[ticket][0] == cohort.id for ticket in counted)
        digest = f"{self.lives:08x}{self.state.round:056x}"
        key = f"problems/p/checkpoints/1/{self.state.round}-{digest[:16]}.safetensors"
        self.made[key], self.concluded[cohort.id] = counted, (key, counted)
        self.forgotten.discard(cohort.id)
        model = ModelRef(sha256=digest, size=1)
        result = Result(model=model, reported=len(counted), examples=len(counted), participants=["org"])
        checkpoint = Checkpoint(key=key, sha256=digest, size=1)
        lives = list(collector.sums)
        self.happens(Aggregated(cohort=cohort.id, lives=lives, result=result, checkpoint=checkpoint))

    # Selectors and clients.

    def kill_selector(self, name: str) -> None:
        """All it knew is gone."""
        self.lives += 1
        self.selectors[name] = Selector(name, self.lives)

    def arrive(self, name: str, count: int) -> None:
        """So many clients check in."""
        self.selectors[name].waiting += count

    def tell(self, name: str) -> None:
        """A selector says how things stand."""
        self.wire.append(self.selectors[name].says())

    def ask(self, name: str) -> None:
        """A selector gets its orders; when it follows them they may be old."""
        selector = self.selectors[name]
        selector.orders = rounds.orders(self.rules, self.state, name, selector.life)

    def obey(self, name: str) -> None:
        """A selector does what it was told to last."""
        selector, orders = self.selectors[name], self.selectors[name].orders
        if orders is None:
            return
        if orders.lost:
            self.kill_selector(name)
            self.selectors[name].waiting = selector.waiting
        elif orders.work is None:
            if not orders.settling:
                self._learn(selector, orders)
                selector.drop()
        else:
            self._work(selector, orders.work, orders)
        self.tell(name)

    def _learn(self, selector: Selector, orders: Orders) -> None:
        """What its clients are told of the updates that it has."""
        last, held = orders.last, selector.held
        if last is None or held is None or held.cohort != last.cohort or held.cohort in self.forgotten:
            return
        _, counted = self.concluded.get(held.cohort, ("", frozenset()))
        if last.counted:
            assert selector.accepted <= counted, "a client is told that its update counts, and it does not"
        else:
            assert not selector.accepted & counted, "a client is told that its update does not count, and it does"

    def _work(self, selector: Selector, work: Work, orders: Orders) -> None:
        if selector.held is None or selector.held.cohort != work.cohort:
            self._learn(selector, orders)
            selector.drop()
            self._select(selector, work)
        assert selector.held is not None
        selector.held = msgspec.structs.replace(selector.held, closed=bool(work.collect))
        if work.collect and selector.handed != work.collect and selector.accepted:
            self.wire.append(Sum(selector.life, work.cohort, work.collect, frozenset(selector.accepted)))

    def _select(self, selector: Selector, work: Work) -> None:
        selected = 0 if work.collect or work.cohort in selector.begun else min(work.share, selector.waiting)
        selector.begun.add(work.cohort)
        for _ in range(selected):
            self.tickets[f"t{len(self.tickets)}"] = (work.cohort, selector.name, selector.life)
        selector.waiting -= selected
        selector.held = Held(
            cohort=work.cohort,
            round=work.round,
            attempt=work.attempt,
            base=work.base.sha256,
            share=work.share,
            shares=work.shares,
            deadline=work.deadline,
            selected=selected,
        )

    def hear_of_sum(self, name: str) -> None:
        """A selector learns that its sum was taken in; before that it sends it again."""
        selector = self.selectors[name]
        if self.collector is not None and selector.life in self.collector.sums:
            selector.handed = self.collector.name

    def fetch(self, ticket: str, name: str) -> None:
        """A client gets the model, perhaps from another selector than the one that selected it."""
        cohort, _, life = self.tickets[ticket]
        selector = self.selectors[name]
        if selector.held is None or selector.held.cohort != cohort:
            return
        self.begun.add(ticket)
        if selector.life == life:
            selector.begun_clients.add(ticket)

    def report(self, ticket: str, name: str) -> None:
        """A client that has trained sends its update to a selector, perhaps another one than before."""
        cohort, issuer, life = self.tickets[ticket]
        selector = self.selectors[name]
        held = selector.held
        if held is None or held.cohort != cohort or held.closed:
            return
        if ticket not in self.begun or ticket in selector.accepted:
            return
        if life != selector.life and ticket not in selector.claimed:
            self.wire.append(Claim(life=selector.life, cohort=cohort, ticket=ticket, name=issuer, issuer=life))
            return
        selector.accepted.add(ticket)
        if life == selector.life:
            selector.begun_clients.add(ticket)

    # Everything together.

    def deliver_all(self) -> None:
        """The network has nothing left to deliver."""
        while self.wire:
            self.deliver(0, again=False)

    def turn(self, ticket: str, name: str) -> None:
        """A client trains and sends its update to this selector, and what the two ask and answer is quick."""
        self.fetch(ticket, self.tickets[ticket][1])
        self.report(ticket, name)
        for _ in range(2):
            if self.wire and isinstance(self.wire[-1], Claim | Grant):
                self.deliver(len(self.wire) - 1, again=False)
        self.report(ticket, name)

    def lose_touch(self, name: str) -> None:
        """Only this selector is heard of for a while."""
        for _ in range(4):
            self.pass_time(4.0)
            self.happens(self.selectors[name].says())

    def proceed(self, *, slowly: bool = False) -> None:
        """Everybody does what there is to do, but nothing is concluded or recorded; slowly, no sum is added either."""
        for name in NAMES:
            self.selectors[name].waiting = 3
            self.tell(name)
            self.deliver_all()
            self.ask(name)
            self.obey(name)
        for ticket in list(self.tickets)[-12:]:
            for name in (self.tickets[ticket][1], *NAMES):
                if not any(ticket in one.accepted for one in self.selectors.values()):
                    self.turn(ticket, name)
        self.deliver_all()
        while self.merging and not slowly:
            self.merge()
        for name in NAMES:
            self.tell(name)
        self.deliver_all()
        self.require_somebody()

    def require_somebody(self) -> None:
        """When all is known nobody waits for the deadline but for a client that may report."""
        cohort = self.state.cohort
        if self.state.phase != "reporting" or cohort is None or self.unknown(cohort):
            return
        lives = {one.life for one in self.selectors.values()} - cohort.lost
        taken: set[str] = set().union(*(one.accepted for one in self.selectors.values() if one.life in lives))
        left = [
            ticket
            for ticket, (of, _, life) in self.tickets.items()
            if of == cohort.id and ticket not in taken and (ticket in self.begun or life in lives)
        ]
        assert left, "nobody is left who can report"

    def unknown(self, cohort: Cohort) -> bool:
        """Whether the coordinator was restarted, and a selector that might tell it of its clients was lost with it."""
        return not cohort.id.startswith(f"{self.rules.life}-") and not cohort.shares.keys() <= cohort.members.keys()

    def record_all(self) -> None:
        """The object store and the log have everything."""
        while self.queue:
            self.store()
            self.record()

    def come_to_an_end(self) -> None:
        """Nothing fails any more: the last round completes, and all that was told is true."""
        for _ in range(400):
            if self.recorded and self.recorded[-1].final:
                break
            self.proceed()
            for name in NAMES:
                self.ask(name)
                self.obey(name)
            self.conclude()
            self.record_all()
            self.pass_time(1.0)
        completed = [one for one in self.recorded if one.stage == "completed"]
        assert [one.round for one in completed] == list(range(1, self.plan.rounds + 1)), "the training did not end"
        assert completed[-1].final
        made = [self.made[one.checkpoint.key] for one in completed if one.checkpoint]
        assert [one.reported for one in completed] == list(map(len, made))
        assert sum(map(len, made)) == len(frozenset().union(*made)), "an update is in two checkpoints"
        assert [one.report for one in self.recorded] == list(range(1, len(self.recorded) + 1))


async def _nowhere(_: object) -> None:
    raise AssertionError("reports are taken out of the queue by hand here")


@pytest.fixture(scope="module", autouse=True)
def not_far_ahead() -> Iterator[None]:
    """Two rounds that are not recorded are as many as there may be, so that it comes to that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "MOST_AHEAD", 2)
        yield


_SECONDS = (0.0, 0.1, 1.0, 3.0, 6.0, 16.0, 61.0)
_NAME = st.sampled_from(NAMES)
_FRACTIONS = (0.6, 1.0)
_NUMBER = st.integers(0, 11)


class Machine(RuleBasedStateMachine):
    """What goes wrong is made as short as it can be."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(1.0)

    @initialize(fraction=st.sampled_from(_FRACTIONS))
    def start(self, fraction: float) -> None:
        """With most of the updates a round may complete, or only with all."""
        self.world = World(fraction)

    @rule(name=_NAME, count=st.integers(1, 6))
    def arrive(self, name: str, count: int) -> None:
        """Clients."""
        self.world.arrive(name, count)

    @rule(name=_NAME, what=st.sampled_from(["tell", "ask", "obey", "hear_of_sum"]))
    def selector(self, name: str, what: str) -> None:
        """A selector does one thing."""
        getattr(self.world, what)(name)

    @rule(number=_NUMBER, name=_NAME, what=st.sampled_from(["fetch", "report", "turn"]))
    def client(self, number: int, name: str, what: str) -> None:
        """A client sends one of the last updates, to any selector."""
        if tickets := list(self.world.tickets)[-12:]:
            getattr(self.world, what)(tickets[number % len(tickets)], name)

    @rule(number=_NUMBER, again=st.booleans())
    def deliver(self, number: int, again: bool) -> None:
        """A message arrives."""
        self.world.deliver(number, again=again)

    @rule(number=_NUMBER)
    def lose(self, number: int) -> None:
        """A message does not arrive."""
        self.world.lose(number)

    @rule(what=st.sampled_from(["merge", "conclude", "store", "complain", "record_all"]))
    def coordinator(self, what: str) -> None:
        """The coordinator does one thing."""
        getattr(self.world, what)()

    @rule(slowly=st.booleans())
    def proceed(self, slowly: bool) -> None:
        """Everybody does something."""
        self.world.proceed(slowly=slowly)

    @rule(name=_NAME)
    def lose_touch(self, name: str) -> None:
        """All but one selector are silent."""
        self.world.lose_touch(name)

    @rule(answered=st.booleans())
    def record(self, answered: bool) -> None:
        """A report reaches the log; the answer may be lost."""
        self.world.record(answered=answered)

    @rule(seconds=st.sampled_from(_SECONDS), still=st.booleans())
    def pass_time(self, seconds: float, still: bool) -> None:
        """Time, with the coordinator or without."""
        (self.world.stand_still if still else self.world.pass_time)(seconds)

    @rule(name=_NAME)
    def kill_selector(self, name: str) -> None:
        """And start it again."""
        self.world.kill_selector(name)

    @rule(keeps=st.booleans(), stray=st.booleans())
    def kill_coordinator(self, keeps: bool, stray: bool) -> None:
        """And start it again."""
        self.world.kill_coordinator(keeps=keeps, stray=stray)

    def teardown(self) -> None:
        """Then nothing fails any more."""
        self.world.come_to_an_end()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)

_SMOOTH = ["proceed"] * 6 + ["conclude", "record_all"] * 3
_SINGLE = ["tell", "ask", "obey", "arrive", "turn", "turn", "deliver", "deliver", "merge", "merge", "store", "record"]
_OTHER = ["pass_time", "stand_still", "lose", "hear_of_sum", "complain", "report", "proceed_slowly", "proceed_slowly"]
_FAULTS = ["fetch", "kill_selector", "kill_coordinator", "lose_touch"]


@settings(max_examples=500, deadline=None)
@given(
    st.randoms(use_true_random=True)
)  # drawn evenly: what Hypothesis prefers, short and simple, seldom goes wrong here
def test_whatever_fails_the_training_ends_and_no_update_counts_twice(chance: Random) -> None:
    """The reports always follow the log's rules, and once nothing fails any more, the last round completes."""
    world = World(chance.choice(_FRACTIONS))
    for action in chance.choices(_SMOOTH + _SINGLE + _OTHER + _FAULTS, k=chance.randint(5, 90)):
        _act(world, action, chance)
    world.come_to_an_end()


def _act(world: World, action: str, chance: Random) -> None:
    name, number, flag = chance.choice(NAMES), chance.randrange(12), chance.random() < 0.3
    arguments: dict[str, Callable[[], object]] = {
        "arrive": lambda: world.arrive(name, 1 + number % 6),
        "deliver": lambda: world.deliver(number, again=flag),
        "lose": lambda: world.lose(number),
        "record": lambda: world.record(answered=not flag),
        "pass_time": lambda: world.pass_time(_SECONDS[number % len(_SECONDS)]),
        "stand_still": lambda: world.stand_still(_SECONDS[number % len(_SECONDS)]),
        "kill_coordinator": lambda: world.kill_coordinator(keeps=not flag, stray=chance.random() < 0.2),
        "proceed_slowly": lambda: world.proceed(slowly=True),
    }
    if action in arguments:
        arguments[action]()
    elif action in ("fetch", "report", "turn"):
        if tickets := list(world.tickets)[-6:]:
            getattr(world, action)(tickets[number % len(tickets)], name)
    elif action in ("tell", "ask", "obey", "hear_of_sum", "kill_selector", "lose_touch"):
        getattr(world, action)(name)
    else:
        getattr(world, action)()
