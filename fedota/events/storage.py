"""What `services/storage` records: a problem's files in the object store."""

from typing import Literal

import msgspec

from fedota.events.envelope import EventData

Role = Literal["model", "other"]


class StoredFile(msgspec.Struct, frozen=True, kw_only=True):
    """A verified, immutable file. `size` in bytes, `sha256` in hex; role `model` is where training starts."""

    name: str
    role: Role
    key: str
    sha256: str
    size: int


class RejectedFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file that was not what its setter had announced, and why."""

    name: str
    reason: str


class FilesStored(EventData, frozen=True, kw_only=True):
    """These files were uploaded and verified byte for byte; a name that was there before now means the new file."""

    files: list[StoredFile]


class FilesRejected(EventData, frozen=True, kw_only=True):
    """An upload failed its verification: none of its files was stored, and the wrong ones were removed."""

    files: list[RejectedFile]


class FilesDeleted(EventData, frozen=True, kw_only=True):
    """These files are gone from the problem."""

    names: list[str]
