"""What a coordinator knows, and what may happen to it: plain data, the nouns of `rounds`."""

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
    """One life of a selector, as part of a cohort. `handed` when its sum was handed over."""

    name: str
    share: int = 0
    quotas: dict[str, int] = {}
    selected: int | None = None
    reported: int = 0
    contributions: list[Contribution] = []
    refusals: list[Refusal] = []
    closed: bool = False
    handed: bool = False


class Cohort(msgspec.Struct, frozen=True, kw_only=True):
    """The clients of one attempt.

    `members` are selectors by life; those in `lost` count no more, whatever they say. `claims` tells which life may
    accept the update of a ticket that another one had given out. `shares` say by life how many clients were to be
    selected; a life that is no member has not been heard of since the coordinator was restarted. `collections` counts
    how often the sums were asked for.
    """

    id: str
    deadline: float
    shares: dict[str, int] = {}
    members: dict[str, Member] = {}
    lost: frozenset[str] = frozenset()
    claims: dict[str, str] = {}
    collections: int = 0

    @property
    def counting(self) -> dict[str, Member]:
        """The members that are not lost."""
        return {life: member for life, member in self.members.items() if life not in self.lost}

    @property
    def selected(self) -> int:
        """How many clients were selected, also those whose selector was lost: they may report to another one."""
        return sum(member.selected or 0 for member in self.members.values())

    @property
    def expected(self) -> int:
        """How many updates may come: of a selector that was not heard of since a restart, as many as its share."""
        return self.selected + sum(share for life, share in self.shares.items() if life not in self.members)

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
    """`base` is what the round begins with. `began` and `until` are of the attempt and of its present waiting.

    `ended` is the cohort before. `unrecorded` are the keys of the checkpoints whose rounds count but are not recorded
    yet, for want of the object store or of the log. `past` are the lives of selectors that a newer one of the same name
    has followed: what they said and comes late says nothing any more.
    """

    round: int
    attempt: int
    base: ModelRef
    phase: Phase
    began: float
    until: float
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


Event = Tick | Awoken | Told | Claim | Handed | Spoiled | Aggregated | Recorded | Revoked
Reports = list[RoundUpdated]
