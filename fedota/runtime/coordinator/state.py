"""What a coordinator knows, and what may happen to it: plain data, the nouns of `rounds`."""

from collections import Counter
from typing import Literal

import msgspec

from fedota.events.problems import Plan
from fedota.events.rounds import Checkpoint, Contribution, Refusal, RoundUpdated
from fedota.runtime.protocol import Claim, Held, ModelRef, Told

Phase = Literal["settling", "selection", "configuration", "reporting", "collecting", "aggregating", "ahead", "finished"]


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """What never changes while a coordinator lives. `life` is unique to its process."""

    problem_id: str
    run: int
    plan: Plan
    life: str


class Presence(msgspec.Struct, frozen=True, kw_only=True):
    """A selector that was heard of lately. `number` is of the newest message of its life."""

    life: str
    heard: float
    number: int = 0
    waiting: int = 0
    organizations: dict[str, int] = {}
    held: Held | None = None


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One life of a selector, as part of a cohort. `handed` when its sum was handed over.

    `begun` of the clients that it `selected` have the model, as it told last.
    """

    name: str
    share: int = 0
    quotas: dict[str, int] = {}
    selected: int | None = None
    begun: int = 0
    reported: int = 0
    contributions: list[Contribution] = []
    refusals: list[Refusal] = []
    closed: bool = False
    handed: bool = False


class Grant(msgspec.Struct, frozen=True, kw_only=True):
    """The `holder` may accept the update of a ticket that the `issuer` had given out; both are lives."""

    holder: str
    issuer: str


class Cohort(msgspec.Struct, frozen=True, kw_only=True):
    """The clients of one attempt.

    `members` are selectors by life; those in `lost` count no more, whatever they say. `claims` are by ticket. `shares`
    say by life how many clients were to be selected, or, of a life that was lost before the coordinator was restarted,
    had begun; a life that is no member has not been heard of since. `collections` counts how often the sums were asked
    for.
    """

    id: str
    deadline: float
    shares: dict[str, int] = {}
    members: dict[str, Member] = {}
    lost: frozenset[str] = frozenset()
    claims: dict[str, Grant] = {}
    collections: int = 0

    @property
    def counting(self) -> dict[str, Member]:
        """The members that are not lost."""
        return {life: member for life, member in self.members.items() if life not in self.lost}

    @property
    def selected(self) -> int:
        """How many clients were selected, also those whose selector was lost."""
        return sum(member.selected or 0 for member in self.members.values())

    @property
    def expected(self) -> int:
        """How many updates may come.

        Clients of a selector that was lost may report to another one, but only if they have the model. How many do, it
        told last; some more may have shown it since by reporting. The larger number counts, not both: mostly they are
        the same clients, and nobody is to be waited for who will not come.
        """
        claimed = Counter(grant.issuer for grant in self.claims.values())
        lives = {**self.shares, **self.members, **claimed}
        return sum(max(self.begun(life), claimed[life]) if life in self.lost else self._chosen(life) for life in lives)

    def begun(self, life: str) -> int:
        """How many clients of a life had the model when it told last; as many as its share where nobody knows."""
        return member.begun if (member := self.members.get(life)) else self.shares.get(life, 0)

    def _chosen(self, life: str) -> int:
        """How many clients of a life were selected; as many as its share where nobody knows."""
        return (member.selected or 0) if (member := self.members.get(life)) else self.shares.get(life, 0)

    @property
    def reported(self) -> int:
        """How many updates are in sums that count."""
        return sum(member.reported for member in self.counting.values())


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """A cohort that is over, and the lives whose sums are part of a checkpoint: none where it was abandoned."""

    cohort: str
    counted: list[str] = []


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What the sums of a cohort came to."""

    model: ModelRef
    reported: int
    examples: int
    participants: list[str]
    metrics: dict[str, float] = {}
    contributions: list[Contribution] = []


class State(msgspec.Struct, frozen=True, kw_only=True):
    """`base` is what the round begins with. `began` and `until` are of the attempt and of its present waiting; before
    `rests` nobody is selected.

    `ended` is the cohort before. `unrecorded` are the keys of the checkpoints whose rounds count but are not recorded
    yet, for want of the object store or of the log. `past` are the lives of selectors that a newer one of the same name
    has followed: what they said and comes late says nothing any more. Should one of them live, it has to begin again.
    """

    round: int
    attempt: int
    base: ModelRef
    phase: Phase
    began: float
    until: float
    rests: float = 0.0
    presences: dict[str, Presence] = {}
    cohort: Cohort | None = None
    ended: Ended | None = None
    unrecorded: list[str] = []
    past: frozenset[str] = frozenset()
    finished: str | None = None
    revoked: list[str] = []

    @property
    def waiting(self) -> int:
        """The clients that are here and wait to be selected."""
        return sum(presence.waiting for presence in self.presences.values())


class Tick(msgspec.Struct, frozen=True):
    """Time has passed."""


class Awoken(msgspec.Struct, frozen=True):
    """The coordinator itself stood still: that nobody was heard of meanwhile says nothing about them."""


class Handed(msgspec.Struct, frozen=True, kw_only=True):
    """The sum of a member was taken in: so many updates, and whose."""

    life: str
    cohort: str
    reported: int
    contributions: list[Contribution] = []


class Spoiled(msgspec.Struct, frozen=True, kw_only=True):
    """The sum of a member cannot be used."""

    life: str
    cohort: str


class Aggregated(msgspec.Struct, frozen=True, kw_only=True):
    """The next weights were computed from the sums of these lives of the cohort, and lie on the coordinator's own disk.

    `checkpoint` is where they will be in the object store.
    """

    cohort: str
    lives: list[str]
    result: Result
    checkpoint: Checkpoint


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """The checkpoint with this key is in the object store, and the log says so."""

    key: str


class Revoked(msgspec.Struct, frozen=True, kw_only=True):
    """These organizations, and no others, take part no more."""

    organizations: list[str]


class Stopped(msgspec.Struct, frozen=True, kw_only=True):
    """The run was ended before its last round: nothing more counts. `words` are for its clients."""

    words: str


Event = Tick | Awoken | Told | Claim | Handed | Spoiled | Aggregated | Recorded | Revoked | Stopped
Reports = list[RoundUpdated]
