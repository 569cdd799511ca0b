"""What `services/rounds` records: each change of a round, as its coordinator reported it."""

from typing import Literal

import msgspec

from fedota.events.envelope import EventData

Stage = Literal["selection", "configuration", "reporting", "completed", "abandoned"]


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """The global weights after a round, in the object store. `size` in bytes, `sha256` in hex."""

    key: str
    sha256: str
    size: int


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """An update that was not counted: whose, and the error code and sentence that say why."""

    organization: str
    code: str
    detail: str


class Contribution(msgspec.Struct, frozen=True, kw_only=True):
    """What one organization gave to one attempt of a round: kept for lineage, and for the organization to see.

    `updates` were accepted, `examples` is the weight that they count with, `size` their bytes, `seconds` the longest
    time from being selected to the update's arrival, `clipped` how many had to be scaled down to the plan's
    `clip_norm`. `refusals` counts what was not accepted, by error code.
    """

    organization: str
    updates: int = 0
    examples: int = 0
    size: int = 0
    seconds: float = 0.0
    clipped: int = 0
    refusals: dict[str, int] = {}


class RoundUpdated(EventData, frozen=True, kw_only=True):
    """The state of one attempt of a round after a change; `report` counts the reports of a run from 1.

    Counts are clients: `waiting` for selection, `selected`, `reported` (accepted updates) against `goal_count`
    and `minimum_count`. `participants` are the organizations whose updates were accepted. `examples` is the total
    behind the weighted mean, `metrics` are clients' metrics averaged by examples. `seconds` is the attempt's age.
    `contributions` are told where an attempt ends, one for each organization.
    `final` marks the report after which the run is over.
    `reason` explains the stage in plain words and numbers.
    """

    run: int
    report: int
    round: int
    attempt: int
    stage: Stage
    goal_count: int
    minimum_count: int
    waiting: int = 0
    selected: int = 0
    reported: int = 0
    participants: list[str] = []
    refusals: list[Refusal] = []
    contributions: list[Contribution] = []
    examples: int = 0
    metrics: dict[str, float] = {}
    seconds: float = 0.0
    checkpoint: Checkpoint | None = None
    final: bool = False
    reason: str = ""
