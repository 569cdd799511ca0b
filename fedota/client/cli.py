"""`fedota client …`: for organizations that hold data."""

import asyncio
import sys
from pathlib import Path

import click

from fedota.client.errors import ClientError, TrainError
from fedota.client.kits import read_kit
from fedota.client.running import run as run_client
from fedota.client.train import load_train


@click.group()
def client() -> None:
    """Take part in a problem with your own data."""


@client.command()
@click.option("--kit", required=True, type=click.Path(path_type=Path), help="The join kit (a JSON file).")
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="The folder with your data; train() gets its path.",
)
@click.option(
    "--patience", default=600.0, show_default=True, help="Give up when no selector answers for so many seconds."
)
@click.option("--quiet", is_flag=True, help="Say nothing unless something goes wrong.")
@click.argument("train_file", metavar="TRAIN.PY", type=click.Path(path_type=Path))
def run(kit: Path, data: Path, patience: float, quiet: bool, train_file: Path) -> None:
    """Train with TRAIN.PY on your data, round after round, until the training is finished.

    TRAIN.PY defines train(model, data, config) and returns (model, examples, metrics).
    """
    try:
        joined = read_kit(kit)
        train = load_train(train_file)
        asyncio.run(run_client(joined, train, data.resolve(), patience=patience, say=_ignore if quiet else _say))
    except TrainError as error:
        click.echo(error.traceback, err=True)
        _fail(error)
    except ClientError as error:
        _fail(error)
    except KeyboardInterrupt:
        click.echo("stopped", err=True)
        sys.exit(130)


def _say(line: str) -> None:
    click.echo(line, err=True)


def _ignore(_: str) -> None:
    return


def _fail(error: ClientError) -> None:
    click.echo(f"Error: {error}", err=True)
    sys.exit(1)
