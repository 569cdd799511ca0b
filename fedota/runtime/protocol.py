"""What clients, selectors and the coordinator say to each other by HTTP; docs/protocol.md tells it at length.

JSON carries everything but tensors. Those travel as raw bodies: a model or an update as `safetensors`, a partial
aggregate as `Meta` followed by its numbers (see `aggregation.WeightedSum`).
"""

import re
from typing import Annotated, Any, Final, Literal

import msgspec

from fedota.events.rounds import Contribution, Refusal

# Headers of a client's requests.
CLIENT: Final = "Fedota-Client"  # a name that the client gives itself, unique within its organization
TICKET: Final = "Fedota-Ticket"
EXAMPLES: Final = "Fedota-Examples"
METRICS: Final = "Fedota-Metrics"  # a JSON object of numbers
OFFSET: Final = "Upload-Offset"  # bytes of an update, or of a sum, that are there (draft-ietf-httpbis-resumable-upload)
BYTES: Final = re.compile(r"[0-9]{1,15}", re.ASCII)  # how it, and `WHOLE`, are written
WHOLE: Final = "Upload-Length"  # bytes of an update in all

CHECK_IN: Final = "/v1/check-in"
UPDATES: Final = "/v1/updates"
MODELS: Final = "/v1/models/{sha256}"  # of a selector, and of the coordinator

# What selectors ask of the coordinator.
STATES: Final = "/v1/selectors/{name}"
ORDERS: Final = "/v1/selectors/{name}/orders"
PARTIALS: Final = "/v1/selectors/{name}/partial"
CLAIMS: Final = "/v1/claims"
SUM: Final = "Fedota-Sum"  # which sum: the SHA-256 of what comes before its numbers, in hex

MOST_EXAMPLES: Final = 10**9
MOST_METRICS: Final = 64
METRICS_LIMIT: Final = 4096  # bytes of the header
HEADER_SLACK: Final = 65_536  # bytes that an update's safetensors header may be longer than the model's

Fate = Literal["none", "pending", "counted", "over"]


class ModelRef(msgspec.Struct, frozen=True, kw_only=True):
    """Weights by their content: `GET /v1/models/<sha256>`."""

    sha256: str
    size: Annotated[int, msgspec.Meta(ge=1, le=10**15)]


# Selector to client, in answer to a check-in. `update` tells what became of the update that the check-in's ticket is
# of: `pending` (keep it), `counted`, or `over` (its attempt of the round ended without it). `known` is False beside an
# `over` of which only that is sure that the attempt has ended; else it is not said.


class Selected(msgspec.Struct, frozen=True, kw_only=True, tag_field="status", tag="selected"):
    """Take part in this round: fetch the model, train, send the update within `seconds`."""

    ticket: str
    round: int
    attempt: int
    model: ModelRef
    config: dict[str, Any]
    seconds: float
    update: Fate = "none"
    known: bool | msgspec.UnsetType = msgspec.UNSET


class ComeBack(msgspec.Struct, frozen=True, kw_only=True, tag_field="status", tag="come_back"):
    """Check in again after `seconds`."""

    seconds: float
    update: Fate = "none"
    known: bool | msgspec.UnsetType = msgspec.UNSET


class SendAgain(msgspec.Struct, frozen=True, kw_only=True, tag_field="status", tag="send_again"):
    """The selector that had the update lost it: send it again, here, with the same ticket."""


class Finished(msgspec.Struct, frozen=True, kw_only=True, tag_field="status", tag="finished"):
    """There is nothing left to train."""

    reason: str
    update: Fate = "none"
    known: bool | msgspec.UnsetType = msgspec.UNSET


CheckedIn = Selected | ComeBack | SendAgain | Finished


class Received(msgspec.Struct, frozen=True, kw_only=True):
    """The update is in the selector's sum. It counts for good once a check-in says so."""

    round: int
    attempt: int


# Selector and coordinator.


class Accepted(msgspec.Struct, frozen=True, kw_only=True):
    """One accepted update, without its weights. `examples` is what it weighs, `size` its bytes.

    `seconds` passed from its client's selection to its arrival. `clipped` when it was scaled down to `clip_norm`.
    """

    ticket: str
    organization: str
    examples: int
    metrics: dict[str, float]
    size: int = 0
    seconds: float = 0.0
    clipped: bool = False


class Meta(msgspec.Struct, frozen=True, kw_only=True):
    """What comes before the numbers of a partial aggregate: whose updates are in them.

    `collection` is the value of `Work.collect` that is answered: the sum for an earlier one is not wanted any more.
    """

    cohort: str
    life: str
    collection: str
    accepted: list[Accepted]


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """The cohort that a selector works on, so that a coordinator that was restarted can take it up.

    `selected` is None until the selector has picked its share. `begun` of them have the model, or have reported; None
    of a selector that does not say. `reported` updates were accepted; `contributions` say of which organizations, and
    what was refused. `closed` when it accepts no more updates. `claimed` are the tickets of accepted updates that other
    lives had given out, each with that life. `shares` are all selectors', by life, as the orders told them.
    """

    cohort: str
    round: int
    attempt: int
    base: str
    share: int
    shares: dict[str, int] = {}
    deadline: float
    selected: int | None = None
    begun: int | None = None
    reported: int = 0
    contributions: list[Contribution] = []
    refusals: list[Refusal] = []
    claimed: dict[str, str] = {}
    closed: bool = False


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """A selector's whole state, sent after each change. `life` is unique to each start of the process.

    `number` counts the messages of a life: one that comes after a newer one is not listened to. `organizations` counts
    those who wait by their organization.
    """

    name: str
    life: str
    number: int = 0
    waiting: int
    organizations: dict[str, int] = {}
    held: Held | None = None


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """May the selector `life` accept the update of a ticket that `issuer` (a life of the selector `name`) gave out?"""

    life: str
    cohort: str
    ticket: str
    name: str
    issuer: str


class Claimed(msgspec.Struct, frozen=True, kw_only=True):
    """`granted`; `wait`: the issuer may have the update; `over`: the cohort takes no more; `taken`: another one has it.

    Of a cohort that has ended, as far as that is remembered: `counted` (it is part of the checkpoint) or `left_out`.
    """

    answer: Literal["granted", "wait", "over", "taken", "counted", "left_out"]


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """A cohort and this selector's share of it; `shares` are all selectors', by life.

    Of a life that was lost `shares` say how many of its clients had begun: no others are waited for.
    With `collect`, accept no more and hand the sum over, once for each value: it changes when sums are collected anew.
    Where there are `quotas`, no more clients of an organization are selected than they say, and none of one that they
    do not name: a client that has only just come waits for the next selection, as another selector may have its like.
    `examples_per_update` and `clip_norm` are the plan's.
    """

    cohort: str
    round: int
    attempt: int
    base: ModelRef
    share: int
    shares: dict[str, int] = {}
    deadline: float
    collect: str = ""
    quotas: dict[str, int] = {}
    examples_per_update: int | None = None
    clip_norm: float | None = None


class Concluded(msgspec.Struct, frozen=True, kw_only=True):
    """A cohort that is over, and whether this selector's sum is part of a checkpoint."""

    cohort: str
    counted: bool


class Orders(msgspec.Struct, frozen=True, kw_only=True):
    """What a selector should be doing now; not what changed, so that any of them may be missed.

    Without `work` a selector drops what it holds, unless the coordinator is `settling`: it has been restarted and does
    not know yet. `model` is what the next work will need. A `life` that is `lost` was taken for dead: nothing that it
    holds counts any more, so its selector begins another one. Nothing more is taken of those that are `revoked`.
    """

    life: str
    model: ModelRef
    config: dict[str, Any]
    work: Work | None = None
    settling: bool = False
    lost: bool = False
    last: Concluded | None = None
    finished: str | None = None
    revoked: list[str] = []


Metrics = Annotated[
    dict[Annotated[str, msgspec.Meta(min_length=1, max_length=100)], float], msgspec.Meta(max_length=MOST_METRICS)
]
