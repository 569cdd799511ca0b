"""`fedota audit …`: the proof that the log is what it was, for who doubts it."""

import sys
from pathlib import Path

import click

from fedota.options import data_dir_option, in_words

# what does the work is imported where it is used: `fedota --help` should be there at once


@click.group()
def audit() -> None:
    """Prove that the event log is what it was when it was written (docs/audit.md)."""


_public_key = click.option(
    "--public-key",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The notary's public key (PEM) as you got it. Default: the one that this platform shows.",
)
_checkpoints = click.option(
    "--checkpoints",
    type=click.Path(path_type=Path, file_okay=False),
    help="A directory with copies of the checkpoints, in place of the bucket.",
)


@audit.command()
@data_dir_option
@_public_key
@_checkpoints
@in_words
def verify(data_dir: Path, public_key: Path | None, checkpoints: Path | None) -> None:
    """Compute the whole log again and compare it with every checkpoint; exit status 1 unless all of it fits.

    The log is that of --data-dir where you give it, else the one that FEDOTA_DATABASE_URL names, else your own.
    """
    from fedota.audit.command import verify_log

    sys.exit(0 if verify_log(data_dir.resolve(), public_key, checkpoints) else 1)


@audit.command()
@data_dir_option
@_public_key
@_checkpoints
@click.option("--output", required=True, type=click.Path(path_type=Path, dir_okay=False), help="The file to write.")
@click.option("--until", type=click.IntRange(min=0), help="The last position; default: the end of the log.")
@click.option("--force", is_flag=True, help="Replace the file if there is one.")
@in_words
def export(
    data_dir: Path, public_key: Path | None, checkpoints: Path | None, output: Path, until: int | None, force: bool
) -> None:
    """Write log and checkpoints into one file, to be verified without Fedota: docs/verify_audit.py does it."""
    from fedota.audit.command import export_log
    from fedota.audit.output import Output

    export_log(data_dir.resolve(), public_key, checkpoints, Output(output, replace=force), until)
