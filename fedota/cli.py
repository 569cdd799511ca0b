"""The command `fedota`."""

import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click
import platformdirs

from fedota.client.cli import client

# What the platform needs is imported where it is used: an organization's client comes without the embedded servers,
# and should start at once.


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fedota")
def main() -> None:
    """Train one model together on data that nobody hands over."""


main.add_command(client)


def _default_data_dir() -> Path:
    path = Path(platformdirs.user_data_dir("fedota"))
    if not path.is_absolute():  # nobody's home is known, as in a container for a user without a name
        raise click.UsageError("You have no home directory here. Say with --data-dir where the platform is to be.")
    return path


_data_dir = click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=lambda: _default_data_dir(),
    show_default="a directory of yours",
    help="Where the platform keeps everything.",
)


def _in_words(command: Callable[..., None]) -> Callable[..., None]:
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


@main.command()
@_data_dir
@_in_words
def up(data_dir: Path) -> None:
    """Start the platform in the background, on embedded servers."""
    from fedota.local import background
    from fedota.local.report import tell_access

    path = data_dir.resolve()
    progress = background.start(path, lambda name: click.echo(f"  {name} is up", err=True))
    tell_access(path, progress.gateway_url)


@main.command()
@_data_dir
@_in_words
def down(data_dir: Path) -> None:
    """Stop the platform; what it keeps stays for the next `fedota up`."""
    from fedota.local import background

    path = data_dir.resolve()
    click.echo(f"The platform in {path} {'is stopped' if background.stop(path) else 'was not running'}.")


@main.command()
@_data_dir
@_in_words
def status(data_dir: Path) -> None:
    """Show what runs and whether it is ready; exit status 1 unless all of it is."""
    from fedota.local.report import show_status

    sys.exit(0 if show_status(data_dir.resolve()) else 1)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, all else on stderr.")
@click.option("--keep", is_flag=True, help="Leave the platform running afterwards.")
@_in_words
def demo(as_json: bool, keep: bool) -> None:
    """Play the whole story: three hospitals train one model together, with real parts, on this machine."""
    from fedota.local.demo.command import run_demo

    directory = Path(tempfile.mkdtemp(prefix="fedota-demo-"))
    try:
        run_demo(directory, as_json=as_json, keep=keep)
    except KeyboardInterrupt:
        shutil.rmtree(directory, ignore_errors=True)
        click.echo("Stopped; nothing is left running.", err=True)
        sys.exit(130)
    except Exception:
        click.echo(f"All logs are in {directory}; remove it when you have seen them.", err=True)
        raise
    if not keep:
        shutil.rmtree(directory, ignore_errors=True)
