"""Files for their owner alone, the end of a log, ports that are free."""

import errno
import os
import secrets
import socket
from collections.abc import Container
from pathlib import Path
from typing import Final

_LINES: Final = 20
_TAIL: Final = 32 * 1024  # bytes
_PORTS: Final = range(20_000, 32_000)  # Linux gives outgoing connections those from 32768 on, others higher ones
_ATTEMPTS: Final = 1000


def private_directory(path: Path) -> Path:
    """The directory, made for its owner alone."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.chmod(0o700)
    return path


def write_private(path: Path, content: bytes) -> None:
    """Write a file for its owner alone, whole or not at all, also when the machine loses power."""
    draft = path.with_name(f"{path.name}.new")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # else the name may be on disk before the content: an empty file
    draft.replace(path)
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    """Make sure that the names in it are on disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def last_lines(path: Path) -> list[str]:
    """The last lines of a log, however long it is."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            return file.read().decode(errors="replace").splitlines()[-_LINES:]
    except FileNotFoundError:
        return []


def free_port(host: str, wanted: int = 0, taken: Container[int] = ()) -> int:
    """The wanted port if nobody has it, else another one that is free now and not `taken`.

    It lies below the ports that outgoing connections get: none of those takes it while its server is down.
    """
    if wanted and wanted not in taken and is_free(host, wanted):
        return wanted
    for _ in range(_ATTEMPTS):
        port = secrets.choice(_PORTS)
        if port not in taken and is_free(host, port):
            return port
    raise OSError(errno.EADDRINUSE, f"no port of {host} between {_PORTS.start} and {_PORTS.stop} is free")


def is_free(host: str, port: int) -> bool:
    """Whether nobody has the port now. Raises `OSError` when the address is not one of this machine."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise
    return True
