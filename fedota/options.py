"""What the commands of `fedota` share: where a platform is, and errors in words."""

import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import platformdirs
from click.core import ParameterSource

# What the platform needs is imported where it is used: an organization's client comes without the embedded servers,
# and should start at once.


def _default_data_dir() -> Path:
    path = Path(platformdirs.user_data_dir("fedota"))
    if not path.is_absolute():  # nobody's home is known, as in a container for a user without a name
        raise click.UsageError("You have no home directory here. Say with --data-dir where the platform is to be.")
    return path


data_dir_option = click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=lambda: _default_data_dir(),
    show_default=platformdirs.user_data_dir("fedota"),
    help="Where the platform keeps everything.",
)


def database_elsewhere() -> str | None:
    """The database that FEDOTA_DATABASE_URL names; None where --data-dir is on the command line: that is nearer."""
    context = click.get_current_context(silent=True)
    if context and context.get_parameter_source("data_dir") is ParameterSource.COMMANDLINE:
        return None
    url = os.environ.get("FEDOTA_DATABASE_URL")
    if url:
        _require_address(url)
    return url or None


def _require_address(url: str) -> None:
    """Raise in words for what asyncpg would raise `OverflowError` and the like; it may name several servers."""
    try:
        for place in urlsplit(url).netloc.rpartition("@")[2].split(","):
            _ = urlsplit(f"//{place}").port
    except ValueError as error:
        raise click.ClickException(f"FEDOTA_DATABASE_URL is not a valid address: {error}.") from None


def in_words(command: Callable[..., None]) -> Callable[..., None]:
    """Errors that a user can mend are one plain sentence and exit status 1."""

    @wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        from fedota.errors import FedotaError
        from fedota.kernel.settings import SettingsError
        from fedota.local.state import LocalError

        try:
            command(*arguments, **options)
        except (LocalError, SettingsError, OSError) as error:
            raise click.ClickException(str(error)) from None
        except FedotaError as error:
            raise click.ClickException(error.problem.detail or error.problem.title) from None

    return run
