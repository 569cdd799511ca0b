"""What coordinators and selectors are told at launch, and what a coordinator asks the platform by NATS.

Each launched process reads one JSON file, `settings.json` in its own directory (mode 0600), and, once it answers,
writes `ready.json` beside it (`Ready`). It can be used when it answers `/readyz` with 200; until then it says there,
by 503, what it is doing or what it lacks. Its standard input is a pipe from the launcher: end of file means stop.
"""

from typing import Final, Literal

import msgspec

from fedota.events.problems import ModelFile, Plan
from fedota.events.rounds import Checkpoint, RoundUpdated


class Listening(msgspec.Struct, frozen=True, kw_only=True):
    """Where a process listens: at `host`, which others name by `address` where that is not empty.

    `port` 0 means any free one. With `certificate`, the path of a PEM file that holds its key and then its certificate,
    the process speaks TLS 1.3, and takes up what is renewed in that file. Without, it speaks plain HTTP: a coordinator
    or selector then refuses to start unless `host` is of the loopback.
    """

    host: str = "127.0.0.1"
    port: int = 0
    address: str = ""
    certificate: str = ""


class CoordinatorSettings(Listening, frozen=True, kw_only=True):
    """`key` is the secret that coordinator and selectors of one launch share.

    `nats_credentials` is the path of a `.creds` file for the problem's own NATS account.
    """

    problem_id: str
    run: int
    plan: Plan
    model: ModelFile
    nats_url: str
    nats_credentials: str
    key: str


class SelectorSettings(Listening, frozen=True, kw_only=True):
    """`token_key` is the public key (PEM, Ed25519) that participation tokens are signed with.

    `coordinator_authority` (PEM) is behind the coordinator's certificate; empty where that one speaks plain HTTP.
    """

    problem_id: str
    run: int
    name: str
    coordinator: str
    token_key: str
    key: str
    coordinator_authority: str = ""


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """A launched process answers at `url`."""

    url: str
    pid: int


# By NATS request-reply. A reply that carries the header `Fedota-Error` is a `fedota.errors.Problem` in JSON,
# any other is the struct named here.


class PresignRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A URL for one object of the problem: GET anything below its prefix, PUT a checkpoint.

    A PUT needs the exact `size` and `sha256` (hex) of what will be sent, and is good for nothing else. Its key is
    `problems/<problem>/checkpoints/<run>/<round>-<first 16 digits of the checkpoint's sha256>.safetensors`, or the same
    with `.json` for its manifest. The store answers it with 412 when the object is there already: a coordinator that
    repeats a PUT after a crash takes that for success.
    """

    method: Literal["GET", "PUT"]
    key: str
    size: int = 0
    sha256: str = ""


class Presigned(msgspec.Struct, frozen=True, kw_only=True):
    """The URL and the headers that were signed with it and must be sent."""

    url: str
    headers: dict[str, str]


REPORT_BYTES: Final = 512 * 1024  # of JSON; an event that NATS cannot carry would hold up all that come after it


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The coordinator's word on its round; recorded as it is when it follows from what was recorded before.

    Reporting the same `report` number with the same content again is harmless. More than `REPORT_BYTES` are refused.
    """

    update: RoundUpdated


class Reported(msgspec.Struct, frozen=True, kw_only=True):
    """The report was recorded at `position` of the log. Nothing more counts of organizations that are `revoked`."""

    position: int
    revoked: list[str] = []


class RevokedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Of whom does nothing count any more, and does the run go on? Asked every few seconds: a round may be silent."""

    run: int = 0


class RevokedOrganizations(msgspec.Struct, frozen=True, kw_only=True):
    """Nothing more counts of these. `stopped` is why the run was ended before its last round, where it was."""

    revoked: list[str]
    stopped: str | None = None


class ResumeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What was recorded of this run so far?"""

    run: int


class Resume(msgspec.Struct, frozen=True, kw_only=True):
    """Where a coordinator goes on: after report number `report`, with `attempt` of `round`, from `checkpoint`.

    `checkpoint` is None before the first completed round. `finished` when no round is left to run; where that is so
    because the run was `stopped`, that is why. Nothing counts of organizations that are `revoked`.
    """

    report: int = 0
    round: int = 1
    attempt: int = 1
    checkpoint: Checkpoint | None = None
    finished: bool = False
    stopped: str | None = None
    revoked: list[str] = []
