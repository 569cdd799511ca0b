"""Files for their owner alone, the end of a log, ports that are free."""

import errno
import os
import socket
from pathlib import Path
from typing import Final

_LINES: Final = 20
_TAIL: Final = 32 * 1024  # bytes


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


def free_port(host: str, wanted: int = 0) -> int:
    """The wanted port if nobody has it, else any that is free now."""
    if wanted and usable_port(host, wanted):
        return wanted
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port
