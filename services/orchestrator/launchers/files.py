"""The directory of a launched process: private files, what they remember, the end of its log."""

import errno
import os
import socket
from pathlib import Path
from typing import Final

import msgspec

SETTINGS: Final = "settings.json"
READY: Final = "ready.json"
LOG: Final = "log"
_LINES: Final = 20
_TAIL: Final = 32 * 1024  # bytes


class Memory(msgspec.Struct, frozen=True):
    """What is kept of a component's settings from one life of the launcher to the next."""

    run: int
    key: str
    port: int


def private_directory(path: Path) -> Path:
    """The directory, made for its owner alone."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.chmod(0o700)
    return path


def write_private(path: Path, content: bytes) -> None:
    """Write a file for its owner alone, whole or not at all."""
    draft = path.with_name(f"{path.name}.new")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
    draft.replace(path)


def recall(directory: Path) -> Memory | None:
    """What the settings there remember; None when there are none, or none that can be read."""
    try:
        return msgspec.json.decode((directory / SETTINGS).read_bytes(), type=Memory)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def last_lines(path: Path) -> list[str]:
    """The last lines of a log, however long it is."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            return file.read().decode(errors="replace").splitlines()[-_LINES:]
    except FileNotFoundError:
        return []


def usable_port(host: str, port: int) -> int:
    """The port, or 0 (any) when somebody else has it now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return 0
            raise
    return port
