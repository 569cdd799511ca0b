"""What an operator asks of a process about the projection that it keeps, by NATS request-reply.

Each process with a projection answers on `subjects.operation(process, …)`: `status`, `rebuild`, `verify`,
`dead_letters`, `retry` and `drop`. Work that may take long is begun by its request and then told by `status`.
"""

from datetime import datetime
from typing import Annotated, Literal

import msgspec

WorkKind = Literal["rebuild", "verify"]
DeadLetterState = Literal["parked", "dropped"]


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """Rows of one table that a fresh rebuild and the live read model do not agree on.

    `live` and `rebuilt` count the rows that only the one has; `examples` are a few of them, marked `live` or `rebuilt`.
    """

    table: str
    live: int
    rebuilt: int
    examples: list[str] = []


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """A rebuild or verification, running (`finished` is None) or the last one that was.

    `position` of `target` events are done. `error` says in a sentence why it failed; nothing was changed then.
    `differences` is what a verification found: none means that every row is the same to the byte.
    """

    kind: WorkKind
    started: datetime
    position: int = 0
    target: int = 0
    finished: datetime | None = None
    rows: int = 0
    error: str = ""
    differences: list[Difference] = []


class ProjectionStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How far a projection is: `position` of the log's `head`.

    `parked` counts dead letters, `stopped` says why it is stopped.
    """

    process: str
    position: int
    head: int
    parked: int
    stopped: str = ""
    work: Work | None = None


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """An event that has no effect in a projection, and why.

    Its handler failed, or an earlier event of its stream is parked. A dropped one never will have an effect, not even
    after a rebuild.
    """

    position: int
    subject: str
    type: str
    error: str
    parked: datetime
    state: DeadLetterState = "parked"
    dropped_by: str = ""


class DeadLetters(msgspec.Struct, frozen=True, kw_only=True):
    """Those of one process, oldest first."""

    dead_letters: list[DeadLetter]


class DeadLetterRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`retry` handles the parked events of that one's stream in order, from the first; `drop` gives this one up."""

    position: Annotated[int, msgspec.Meta(ge=1)]
    actor: str


class Retried(msgspec.Struct, frozen=True, kw_only=True):
    """How many parked events of the stream took effect, and how many stay parked because of `error`."""

    handled: int
    left: int
    error: str = ""
