"""The command `fedota`."""

import shutil
import sys
import tempfile
from pathlib import Path

import click

from fedota.audit.cli import audit
from fedota.client.cli import client
from fedota.operate.deadletters import deadletters
from fedota.operate.events import events
from fedota.operate.people import people
from fedota.operate.projections import projections
from fedota.options import data_dir_option as _data_dir
from fedota.options import in_words as _in_words

# What the platform needs is imported where it is used: an organization's client comes without the embedded servers,
# and should start at once.


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fedota")
def main() -> None:
    """Train one model together on data that nobody hands over."""


main.add_command(client)
main.add_command(audit)
main.add_command(events)
main.add_command(projections)
main.add_command(deadletters)
main.add_command(people)


@main.command()
@_data_dir
@_in_words
def up(data_dir: Path) -> None:
    """Start the platform in the background.

    It brings its own PostgreSQL, NATS and S3 servers. Where it runs already, this only tells how to reach it.
    """
    from fedota.local import background
    from fedota.local.report import tell_access

    path = data_dir.resolve()
    progress = background.start(path, lambda name: click.echo(f"  {name} is up", err=True))
    tell_access(path, progress.gateway_url, moved_from=progress.moved_from)


@main.command()
@_data_dir
@_in_words
def down(data_dir: Path) -> None:
    """Stop the platform.

    What it keeps stays for the next `fedota up`.
    """
    from fedota.local import background

    path = data_dir.resolve()
    click.echo(f"The platform in {path} {'is stopped' if background.stop(path) else 'was not running'}.")


@main.command()
@_data_dir
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, all else on stderr.")
@_in_words
def status(data_dir: Path, as_json: bool) -> None:
    """Show what runs, and where.

    Exit status 1 unless all of it is ready.
    """
    from fedota.local.report import show_status

    sys.exit(0 if show_status(data_dir.resolve(), as_json=as_json) else 1)


@main.command()
@_data_dir
@click.option("--check", is_flag=True, help="Only say what would be applied; exit status 1 if that is something.")
@click.option(
    "--roles",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="With FEDOTA_DATABASE_URL: a JSON file (mode 0600) with the password of each process.",
)
@_in_words
def migrate(data_dir: Path, check: bool, roles: Path | None) -> None:
    """Bring the database to its newest shape.

    `fedota up` does so by itself. The database is that of --data-dir where you give it, else the one that
    FEDOTA_DATABASE_URL names, else your own.
    """
    from fedota.local.migrate_command import nothing_pending, run_migrate

    path = data_dir.resolve()
    if check:
        sys.exit(0 if nothing_pending(path) else 1)
    run_migrate(path, roles)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, all else on stderr.")
@click.option(
    "--keep", is_flag=True, help="Leave the platform running afterwards; what to do with it is said at the end."
)
@_in_words
def demo(as_json: bool, keep: bool) -> None:
    """Play the whole story on this machine.

    Three hospitals train one model together, with real parts, on a platform of its own in a temporary directory.
    Nothing of it stays unless it fails, or with --keep.
    """
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
