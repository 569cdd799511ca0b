"""What the commands of `fedota` share: where a platform is, and errors in words."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click
import platformdirs

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
    show_default="a directory of yours",
    help="Where the platform keeps everything.",
)


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
