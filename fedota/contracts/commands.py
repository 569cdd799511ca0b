"""The commands that the gateway sends to services by NATS request-reply, one table from name to owner."""

from typing import Annotated, Any, Final
from uuid import UUID

import msgspec

from fedota.events.problems import Plan
from fedota.events.storage import Role

# In these patterns `$(?!\n)` is the end in every dialect: Python's `$` alone lets a line feed follow.
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
Text = Annotated[str, msgspec.Meta(max_length=20_000)]
Organization = Annotated[
    str, msgspec.Meta(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9](?:[A-Za-z0-9 ._-]*[A-Za-z0-9])?$(?!\n)")
]
FileName = Annotated[str, msgspec.Meta(max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$(?!\n)")]
Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$(?!\n)")]
Reason = Annotated[str, msgspec.Meta(min_length=1, max_length=1000)]


class Command(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An imperative; its name is its class's name."""

    problem_id: str


class CreateProblem(Command, frozen=True, kw_only=True):
    """→ `ProblemCreated`."""

    name: Name
    description: Text
    data_format: Text
    client_image: Annotated[str, msgspec.Meta(min_length=1, max_length=500)]
    plan: Plan


class ReviseProblem(Command, frozen=True, kw_only=True):
    """→ `ProblemRevised`, before the start. Fields left out stay as they are."""

    name: Name | None = None
    description: Text | None = None
    data_format: Text | None = None
    client_image: Annotated[str, msgspec.Meta(min_length=1, max_length=500)] | None = None
    plan: Plan | None = None


class StartProblem(Command, frozen=True, kw_only=True):
    """→ `ProblemStarted`."""


class StopProblem(Command, frozen=True, kw_only=True):
    """→ `ProblemStopped`."""

    reason: Reason = "stopped by the setter"


class RequestParticipation(Command, frozen=True, kw_only=True):
    """→ `ParticipationRequested`."""

    organization: Organization


class ApproveParticipation(Command, frozen=True, kw_only=True):
    """→ `ParticipationApproved`."""

    organization: Organization


class RefuseParticipation(Command, frozen=True, kw_only=True):
    """→ `ParticipationRefused`."""

    organization: Organization
    reason: Reason


class RevokeParticipation(Command, frozen=True, kw_only=True):
    """→ `ParticipationRevoked`."""

    organization: Organization
    reason: Reason


class IssueToken(Command, frozen=True, kw_only=True):
    """→ `IssuedToken` for an organization whose participation is approved. Records nothing."""

    organization: Organization


class IssuedToken(msgspec.Struct, frozen=True, kw_only=True):
    """A participation token (JWT, EdDSA), bound to problem and organization; `expires` in Unix seconds."""

    token: str
    expires: int


class AnnouncedFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the setter says a file is, before and after its upload."""

    name: FileName
    size: Annotated[int, msgspec.Meta(ge=0, le=5 * 1024**3)]
    sha256: Digest
    role: Role = "other"


Announced = Annotated[list[AnnouncedFile], msgspec.Meta(min_length=1, max_length=100)]


class PrepareUpload(Command, frozen=True, kw_only=True):
    """→ `UploadSlots`. Records nothing."""

    files: Announced


class UploadSlot(msgspec.Struct, frozen=True, kw_only=True):
    """PUT the file's bytes to `url` with exactly these `headers`."""

    name: str
    url: str
    headers: dict[str, str]


class UploadSlots(msgspec.Struct, frozen=True, kw_only=True):
    """One slot for each announced file whose bytes are not there yet; they expire after `seconds`."""

    slots: list[UploadSlot]
    seconds: int


class StoreFiles(Command, frozen=True, kw_only=True):
    """Verify what was uploaded → `FilesStored`, or `FilesRejected` and the error `file_rejected`."""

    files: Announced


class PresignDownload(Command, frozen=True, kw_only=True):
    """→ `Download` of an object below the problem's prefix. Records nothing."""

    key: str


class Download(msgspec.Struct, frozen=True, kw_only=True):
    """GET this before `seconds` have passed."""

    url: str
    seconds: int


OWNERS: Final[dict[str, tuple[str, type[Command]]]] = {
    "CreateProblem": ("problems", CreateProblem),
    "ReviseProblem": ("problems", ReviseProblem),
    "StartProblem": ("problems", StartProblem),
    "StopProblem": ("problems", StopProblem),
    "RequestParticipation": ("problems", RequestParticipation),
    "ApproveParticipation": ("problems", ApproveParticipation),
    "RefuseParticipation": ("problems", RefuseParticipation),
    "RevokeParticipation": ("problems", RevokeParticipation),
    "IssueToken": ("problems", IssueToken),
    "PrepareUpload": ("storage", PrepareUpload),
    "StoreFiles": ("storage", StoreFiles),
    "PresignDownload": ("storage", PresignDownload),
}


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A command on its way.

    `key` makes it idempotent together with `actor`; `deadline` (Unix seconds) is when nobody waits any more:
    a service does not begin after it.
    """

    actor: str
    key: str
    correlation: UUID
    deadline: float
    command: msgspec.Raw
    traceparent: str | None = None


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """The answer: the log's position that the command reached (0 when it recorded nothing) and its result, if any."""

    position: int = 0
    result: Any = None
