"""A client whose every update can be told from all others: `python -m tests.faults.rounds.client told.json`."""

import asyncio
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from fedota.client import Model, Trained, read_kit, run
from tests.faults.rounds.updates import Maker, update


class Told(NamedTuple):
    """What a client is told: who it is, and where it finds its kit, writes its ledger, and asks whether to go on.

    It trains for a round as soon as the number in the file `gate` is as high as that.
    """

    maker: Maker
    kit: Path
    ledger: Path
    gate: Path


class Client:
    """Trains, and writes down what it made and what it heard before anybody else can know of it."""

    def __init__(self, told: Told) -> None:
        self._told = told
        self._calls = 0
        self._ledger = os.open(told.ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def train(self, model: Model, _: Path, config: dict[str, Any]) -> Trained:
        """An update that says whose it is."""
        number = config["round"]
        while int(self._told.gate.read_text()) < number:
            time.sleep(0.005)
        time.sleep(config["seconds"])
        self._calls += 1
        made = update(model, self._told.maker, number, self._calls)
        self.write(trained=number, call=self._calls)
        return made, self._told.maker.examples, {"slot": float(self._told.maker.slot)}

    def write(self, **line: Any) -> None:
        """One line, whole or not at all."""
        os.write(self._ledger, json.dumps(line).encode() + b"\n")


def _end_with_the_test() -> None:
    sys.stdin.read()
    os._exit(1)


def main() -> None:
    """Take part until the training is finished."""
    threading.Thread(target=_end_with_the_test, daemon=True).start()
    told = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Told, dec_hook=lambda kind, value: kind(value))
    client = Client(told)
    asyncio.run(run(read_kit(told.kit), client.train, Path.cwd(), say=lambda line: client.write(said=line)))
    client.write(ended=True)


if __name__ == "__main__":
    main()
