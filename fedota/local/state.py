"""The data directory of a local platform: who holds it, and the ports and secrets that it remembers."""

import fcntl
import secrets
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

import msgspec

from fedota.kernel.files import free_port, private_directory, write_private

HOST: Final = "127.0.0.1"
_OURS: Final = ("lock", "state.json", "platform.log")


class LocalError(Exception):
    """Something about the local platform that its user can mend; the message says how."""


class Remembered(msgspec.Struct):
    """What stays the same from one start to the next."""

    ports: dict[str, int] = {}
    secrets: dict[str, str] = {}
    made: set[str] = set()


class DataDirectory:
    """Everything that a local platform keeps, in one directory for its owner alone."""

    def __init__(self, path: Path) -> None:
        self.path = own_directory(path)
        self._file = path / "state.json"
        try:
            self._remembered = msgspec.json.decode(self._file.read_bytes(), type=Remembered)
        except FileNotFoundError:
            self._remembered = Remembered()
        except msgspec.DecodeError:
            raise LocalError(f"{self._file} is damaged. Restore it, or choose another place with --data-dir.") from None

    def sub(self, name: str) -> Path:
        """A directory in it."""
        return private_directory(self.path / name)

    def port(self, name: str) -> int:
        """The port that `name` had before, or another one if somebody else has that now."""
        others = {port for other, port in self._remembered.ports.items() if other != name}
        port = free_port(HOST, self.remembered_port(name), others)
        self._remembered.ports[name] = port
        self._save()
        return port

    def remembered_port(self, name: str) -> int:
        """The port that `name` was given last; 0 when it never got one."""
        return self._remembered.ports.get(name, 0)

    def secret(self, name: str) -> str:
        """A random text that nobody else knows, always the same one for a name."""
        if name not in self._remembered.secrets:
            self._remembered.secrets[name] = secrets.token_urlsafe(32)
            self._save()
        return self._remembered.secrets[name]

    def remembers(self, name: str) -> bool:
        """Whether there is a secret of that name."""
        return name in self._remembered.secrets

    def has_made(self, name: str) -> bool:
        """Whether what must not be made twice was made already."""
        return name in self._remembered.made

    def note_made(self, name: str) -> None:
        """Remember that it was made."""
        if name not in self._remembered.made:
            self._remembered.made.add(name)
            self._save()

    def _save(self) -> None:
        write_private(self._file, msgspec.json.encode(self._remembered))


def command(name: str, path: Path) -> str:
    """What a person types about the platform in a data directory, wherever it is."""
    return f"fedota {name} --data-dir {shlex.quote(str(path))}"


def is_ours(path: Path) -> bool:
    """Whether a platform was ever started in this directory. Raises `OSError` where one may not look."""
    return any((path / name).exists() for name in _OURS)


def own_directory(path: Path) -> Path:
    """The data directory. Raises `LocalError` rather than to shut a directory in which others keep things."""
    try:
        if path.exists() and any(path.iterdir()) and not is_ours(path):
            raise LocalError(f"{path} holds other things. Choose an empty directory, or a new one, with --data-dir.")
        return private_directory(path)
    except OSError as error:
        raise LocalError(
            f"{path} cannot be the data directory: {error.strerror}. Choose another with --data-dir."
        ) from None


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the data directory: two platforms in one would take each other's servers away."""
    with (own_directory(path) / "lock").open("a") as file:
        if not _locked_soon(file):
            raise LocalError(
                f"A platform is running in {path} already. Choose another place with --data-dir, or stop it with: "
                f"{command('down', path)}"
            )
        yield


def is_held(path: Path) -> bool:
    """Whether a platform runs in this data directory."""
    try:
        with (path / "lock").open("r") as file:
            return not _locked(file)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _locked_soon(file: IO[str]) -> bool:
    """Who only looks whether it is held holds it for a moment: that is no reason to give up."""
    for _ in range(10):
        if _locked(file):
            return True
        time.sleep(0.05)
    return False


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
