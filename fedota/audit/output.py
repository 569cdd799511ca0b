"""Where an export goes: a new file for its owner alone, whole or not at all, or straight into a device or a pipe."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from fedota.local.state import LocalError


class Output(NamedTuple):
    """A path to write to; a file that is there stays as it is unless `replace`. Every fault is a `LocalError`."""

    path: Path
    replace: bool = False

    def __str__(self) -> str:
        return str(self.path)

    @property
    def is_device(self) -> bool:
        """Whether something is there that is no file: it is written to, never replaced."""
        return self.path.exists() and not self.path.is_file()

    def require_free(self) -> None:
        """Raise where a file would be lost, before any work is done."""
        if self.path.is_file() and not self.replace:
            raise LocalError(f"{self.path} is there already. Choose another name, or replace it with --force.")

    @contextmanager
    def open(self) -> Iterator["Writer"]:
        """What to write to; the file has its name once all of it is written."""
        if self.is_device:
            with self._opened(self.path, os.O_WRONLY) as writer:
                yield writer
            return
        target = self.path.resolve()  # a link stays one
        draft = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
        try:
            with self._opened(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as writer:
                yield writer
            with self._in_words():
                draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)

    @contextmanager
    def _opened(self, path: Path, flags: int) -> Iterator["Writer"]:
        with self._in_words():
            file = os.fdopen(os.open(path, flags, 0o600), "wb")
        try:
            yield Writer(file, self)
            with self._in_words():
                file.flush()
        finally:
            with self._in_words():
                file.close()

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self.fault(error) from None

    def fault(self, error: OSError) -> LocalError:
        """In words: it is no fault of the database, which raises errors of that type as well."""
        return LocalError(f"The export cannot be written to {self.path}: {error.strerror or error}.")


class Writer(NamedTuple):
    """The opened file."""

    file: IO[bytes]
    output: Output

    def write(self, line: bytes) -> None:
        """Append it."""
        try:
            self.file.write(line)
        except OSError as error:
            raise self.output.fault(error) from None
