"""What a coordinator knows, and what may happen to it: plain data, the nouns of `rounds`."""

from typing import Literal

import msgspec

from fedota.events.problems import Plan
from fedota.events.rounds import Checkpoint, Refusal, RoundUpdated
from fedota.runtime.protocol import Claim, Held, ModelRef, Told

Phase = Literal[
    "settling", "selection", "configuration", "reporting", "collecting", "aggregating", "storing", "finished"
]


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """What never changes while a coordinator lives. `life` is unique to its process."""

    problem_id: str
    run: int
    plan: Plan
    life: str


class Presence(msgspec.Struct, frozen=True, kw_only=True):
    """A selector that was heard of lately."""

    life: str
    heard: float
    waiting: int = 0
    held: Held | None = None


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One life of a selector, as part of a cohort. `handed` when its sum was handed over."""

    name: str
    share: int = 0
    selected: int | None = None
    reported: int = 0
    examples: int = 0
    organizations: list[str] = []
    refusals: list[Refusal] = []
    closed: bool = False
    handed: bool = False


class Cohort(msgspec.Struct, frozen=True, kw_only=True):
    """The clients of one attempt.

    `members` are selectors by life; those in `lost` count no more, whatever they say. `claims` tells which life may
    accept the update of a ticket that another one had given out. One that is `taken_up` was made by an earlier life of
    the coordinator: how many clients it selected is known only as far as their selectors still live.
    """

    id: str
    deadline: float
    members: dict[str, Member] = {}
    lost: frozenset[str] = frozenset()
    claims: dict[str, str] = {}
    collecting_until: float = 0.0
    taken_up: bool = False

    @property
    def counting(self) -> dict[str, Member]:
        """The members that are not lost."""
        return {life: member for life, member in self.members.items() if life not in self.lost}

    @property
    def selected(self) -> int:
        """How many clients were selected, also those whose selector was lost: they may report to another one."""
        return sum(member.selected or 0 for member in self.members.values())

    @property
    def reported(self) -> int:
        """How many updates are in sums that count."""
        return sum(member.reported for member in self.counting.values())


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What the sums of a cohort came to."""

    model: ModelRef
    reported: int
    examples: int
    participants: list[str]
    metrics: dict[str, float] = {}


class State(msgspec.Struct, frozen=True, kw_only=True):
    """`base` is what the round begins with. `began` and `until` are of the attempt and of its present waiting."""

    round: int
    attempt: int
    base: ModelRef
    phase: Phase
    began: float
    until: float
    presences: dict[str, Presence] = {}
    cohort: Cohort | None = None
    concluded: Cohort | None = None
    completed: bool = False  # whether `concluded` is part of a checkpoint
    result: Result | None = None
    finished: str | None = None
    revoked: list[str] = []
    trouble: str = ""  # why the checkpoint is not stored yet

    @property
    def waiting(self) -> int:
        """The clients that are here and wait to be selected."""
        return sum(presence.waiting for presence in self.presences.values())


class Tick(msgspec.Struct, frozen=True):
    """Time has passed."""


class Awoken(msgspec.Struct, frozen=True):
    """The coordinator itself stood still: that nobody was heard of meanwhile says nothing about them."""


class Handed(msgspec.Struct, frozen=True, kw_only=True):
    """The sum of a member was taken in."""

    life: str
    cohort: str
    reported: int


class Spoiled(msgspec.Struct, frozen=True, kw_only=True):
    """The sum of a member cannot be used."""

    life: str
    cohort: str


class Aggregated(msgspec.Struct, frozen=True, kw_only=True):
    """The next weights were computed."""

    result: Result


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    """The next weights are in the object store."""

    checkpoint: Checkpoint


class Revoked(msgspec.Struct, frozen=True, kw_only=True):
    """These organizations, and no others, take part no more."""

    organizations: list[str]


class Trouble(msgspec.Struct, frozen=True, kw_only=True):
    """The checkpoint could not be stored yet."""

    reason: str


Event = Tick | Awoken | Told | Claim | Handed | Spoiled | Aggregated | Stored | Revoked | Trouble
Reports = list[RoundUpdated]
