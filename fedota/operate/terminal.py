"""What every command does at a terminal: run to the end, say errors in words, print lines that pipes can take."""

import asyncio
import errno
import os
import re
import sys
from collections.abc import Callable, Coroutine, Iterable
from datetime import datetime
from typing import Any, Final

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedota.errors import FedotaError

REFUSED: Final = 1
INTERRUPTED: Final = 130
_SPACES: Final = re.compile(r"\s+")
_CONTROLS: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
_SIGPIPE: Final = 141  # what a shell says of a program that a closed pipe ended


def to_the_end(work: Callable[[], Coroutine[Any, Any, int]]) -> None:
    """Run and exit with its status. Errors are a sentence; Ctrl-C and a reader that has gone away are no errors."""
    try:
        status = asyncio.run(work())
        sys.stdout.flush()
    except BrokenPipeError:
        _forget_stdout()
        status = _SIGPIPE
    except OSError as error:
        if error.errno not in _FULL:
            raise
        _forget_stdout()
        raise click.ClickException(f"What this says cannot be written: {error.strerror}.") from None
    except KeyboardInterrupt:
        status = INTERRUPTED
    except FedotaError as error:
        raise click.ClickException(plain(error.problem.detail or error.problem.title)) from None
    sys.exit(status)


def _forget_stdout() -> None:
    """What is still buffered must not be written again when Python ends: that would be told as an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def say(text: str = "") -> None:
    """A line on standard output; colours only where somebody looks at them."""
    click.echo(text, color=_colors())


def note(text: str) -> None:
    """A line for people, beside what is asked for."""
    click.echo(text, err=True, color=_colors())


def _colors() -> bool | None:
    return False if os.environ.get("NO_COLOR") else None


def plain(text: str) -> str:
    """What others wrote, on one line and without what would steer the terminal."""
    return printable(_SPACES.sub(" ", text)).strip()


def printable(text: str) -> str:
    """What others wrote, without what would steer the terminal."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)


def faint(text: str) -> str:
    """What is there for who looks for it."""
    return click.style(text, dim=True)


def local(time: datetime) -> str:
    """A time as clocks here show it."""
    return time.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def count(number: int, one: str, many: str = "") -> str:
    """`3 events`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Columns; in a pipe each row is one line, however long."""
    columns = Table(*headings, box=None, pad_edge=False, header_style="bold", show_edge=False)
    for row in rows:
        columns.add_row(*map(Text.from_ansi, row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=10_000)
    console.print(columns)
