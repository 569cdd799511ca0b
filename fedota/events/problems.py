"""What `services/problems` records: problems and the organizations that take part in them."""

import math
from typing import Annotated, Any

import msgspec

from fedota.events.envelope import EventData

Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]


def _ceil(count: float) -> int:
    # 0.1 × 30 is 3.0000000000000004 in floats: without the rounding a round would wait for one client too many
    return math.ceil(round(count, 9))


class Strategy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How updates become the next checkpoint. `fedavg` (McMahan et al. 2017) is the weighted mean."""

    name: str = "fedavg"
    parameters: dict[str, float] = {}


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a problem is trained; the terms are those of Bonawitz et al. 2019.

    A round selects `goal_count` × `over_selection` clients (rounded up), waits at most `selection_timeout`
    seconds for them, then at most `report_timeout` seconds for their updates. It completes with `goal_count`
    updates, or at the timeout with at least `minimum_fraction` of that; else that attempt is abandoned, and after
    `attempts` abandoned attempts of one round the training stops. `client_config` is handed to `train` as it is.

    Trust is bounded by three caps, each off where it is None: of one organization at most `clients_per_organization`
    are selected for a round, no update weighs more than `examples_per_update`, and an update that is further than
    `clip_norm` from the weights that the round began with (L2 norm over all float tensors) is scaled down to that.
    """

    rounds: Annotated[int, msgspec.Meta(ge=1, le=100_000)]
    goal_count: Annotated[int, msgspec.Meta(ge=1, le=100_000)]
    minimum_fraction: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.8
    over_selection: Annotated[float, msgspec.Meta(ge=1, le=10)] = 1.0
    selection_timeout: Seconds = 600.0
    report_timeout: Seconds = 600.0
    attempts: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 5
    selectors: Annotated[int, msgspec.Meta(ge=1, le=64)] = 2
    strategy: Strategy = Strategy()
    client_config: dict[str, Any] = {}
    clients_per_organization: Annotated[int, msgspec.Meta(ge=1, le=100_000)] | None = None
    examples_per_update: Annotated[int, msgspec.Meta(ge=1, le=10**9)] | None = None
    clip_norm: Annotated[float, msgspec.Meta(gt=0, le=1e30)] | None = None

    @property
    def minimum_count(self) -> int:
        """The smallest number of updates with which a round may complete."""
        return max(1, _ceil(self.goal_count * self.minimum_fraction))

    @property
    def selected_count(self) -> int:
        """The number of clients that a round selects."""
        return _ceil(self.goal_count * self.over_selection)


class ProblemCreated(EventData, frozen=True, kw_only=True):
    """Somebody published a problem: its setter is the event's actor.

    `client_image` is an OCI reference, never fetched by Fedota.
    """

    name: str
    description: str
    data_format: str
    client_image: str
    plan: Plan


def without_setter(data: dict[str, Any]) -> dict[str, Any]:
    """`ProblemCreated`, version 1 → 2. `setter` said the event's actor again; who acts stands in that one place now."""
    return {name: value for name, value in data.items() if name != "setter"}


class ProblemRevised(EventData, frozen=True, kw_only=True):
    """The setter changed the problem before its start; what stands here replaces what stood before."""

    name: str
    description: str
    data_format: str
    client_image: str
    plan: Plan


class ModelFile(msgspec.Struct, frozen=True, kw_only=True):
    """The initial weights (`safetensors`) in the object store. `size` in bytes, `sha256` in hex."""

    key: str
    sha256: str
    size: int


class ProblemStarted(EventData, frozen=True, kw_only=True):
    """Training was asked for, with all that its infrastructure needs. `run` counts the starts from 1."""

    run: int
    plan: Plan
    model: ModelFile


class ProblemStopped(EventData, frozen=True, kw_only=True):
    """The training was ended before its last round, by a person or because it could not go on."""

    run: int
    reason: str


class ProblemCompleted(EventData, frozen=True, kw_only=True):
    """The last round's checkpoint is stored: `model` is the result."""

    run: int
    rounds: int
    model: ModelFile


class ParticipationRequested(EventData, frozen=True, kw_only=True):
    """An organization asked to take part."""

    organization: str


class ParticipationApproved(EventData, frozen=True, kw_only=True):
    """The setter let the organization in: it may now fetch its join kit."""

    organization: str


class ParticipationRefused(EventData, frozen=True, kw_only=True):
    """The setter turned the request down."""

    organization: str
    reason: str


class ParticipationRevoked(EventData, frozen=True, kw_only=True):
    """The setter ended a participation that was approved."""

    organization: str
    reason: str
