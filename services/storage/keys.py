"""Where a problem's objects lie in the bucket, and which of those places may be asked for: pure functions.

Everything of a problem is below `problems/<problem>/`; who asks for one problem never gets a key of another.
"""

import re
from typing import Final
from uuid import UUID

from fedota.contracts.commands import AnnouncedFile
from fedota.contracts.runtime import PresignRequest
from fedota.errors import FedotaError

ROOT: Final = "problems/"
_LARGEST: Final = 5 * 1024**3  # bytes: what S3 takes in one PUT
_SEGMENT: Final = r"[A-Za-z0-9_-][A-Za-z0-9._-]*"  # no empty one, none that begins with a dot
_BELOW: Final = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT})*")
_CHECKPOINT: Final = re.compile(r"checkpoints/[1-9]\d{0,9}/[1-9]\d{0,9}-([0-9a-f]{16})\.(safetensors|json)", re.ASCII)
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


def is_problem_id(problem_id: str) -> bool:
    """Whether this is a UUID as we write it: lower case, with dashes."""
    try:
        return str(UUID(problem_id)) == problem_id
    except ValueError:
        return False


def require_problem_id(problem_id: str) -> None:
    """Raise `invalid_field` unless this is a problem's id: anything else could lead to another's keys."""
    if not is_problem_id(problem_id):
        what = "not a UUID in lower case with dashes"
        raise FedotaError("invalid_field", f"problem_id: {what}. Send the problem's id.", fields={"problem_id": what})


def problem_prefix(problem_id: str) -> str:
    """What every key of a problem begins with."""
    return f"{ROOT}{problem_id}/"


def files_prefix(problem_id: str) -> str:
    """What every key of a problem's files begins with."""
    return f"{problem_prefix(problem_id)}files/"


def file_key(problem_id: str, file: AnnouncedFile) -> str:
    """A file's place, by its content: what was verified there never changes."""
    return f"{files_prefix(problem_id)}{file.sha256}/{file.name}"


def manifest_key(problem_id: str) -> str:
    """Where the list of a problem's files lies."""
    return f"{files_prefix(problem_id)}manifest.json"


def require_readable(problem_id: str, key: str) -> None:
    """Raise `key_forbidden` unless the key is one below the problem's own prefix."""
    _below(problem_id, key)


def require_writable(problem_id: str, wanted: PresignRequest) -> None:
    """Raise unless this is a checkpoint of the problem, or a checkpoint's manifest, with its exact size and digest.

    A checkpoint's key holds the first 16 digits of its own SHA-256, so whatever lies there already is the same.
    """
    match = _CHECKPOINT.fullmatch(_below(problem_id, wanted.key))
    if match is None:
        raise FedotaError(
            "key_forbidden",
            "A coordinator writes checkpoints/<run>/<round>-<16 hex>.safetensors, and .json beside it, nothing else.",
        )
    if not 0 < wanted.size <= _LARGEST:
        raise _invalid("size", f"not between 1 and {_LARGEST} bytes")
    if not _DIGEST.fullmatch(wanted.sha256):
        raise _invalid("sha256", "not a SHA-256 in lower-case hex")
    digest, kind = match.groups()
    if kind == "safetensors" and not wanted.sha256.startswith(digest):
        raise FedotaError("key_forbidden", "The key does not hold the first 16 digits of the checkpoint's SHA-256.")


def _below(problem_id: str, key: str) -> str:
    prefix = problem_prefix(problem_id)
    rest = key.removeprefix(prefix)
    if rest == key or not _BELOW.fullmatch(rest):
        raise FedotaError("key_forbidden", f"Only plain keys below {prefix} may be asked for.")
    return rest


def _invalid(field: str, what: str) -> FedotaError:
    return FedotaError("invalid_field", f"{field}: {what}. Correct it and ask again.", fields={field: what})
