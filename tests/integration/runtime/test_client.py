"""`fedota client run`, as a data holder runs it."""

import asyncio
import os
import re
import sys
from pathlib import Path

import numpy as np

from fedota.events import to_json
from fedota.events.problems import Plan
from tests.integration.runtime.conftest import World, assert_same, until, weighted_mean

MODEL = {"w": np.arange(4, dtype=np.float32)}
TRAIN = """
import numpy as np

def train(model, data, config):
    rows = np.loadtxt(data / "rows.csv")
    model["w"] += config["step"] * config["round"]
    return model, len(rows), {"rows": len(rows)}
"""


async def run(world: World, directory: Path, train: str, *options: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a client."""
    directory.mkdir()
    (directory / "rows.csv").write_text("1\n2\n3\n")
    (directory / "train.py").write_text(train)
    (directory / "kit.json").write_bytes(to_json(world.kit("org 1")))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "from fedota.client.cli import client; client()", "run"),
        *("--kit", "kit.json", "--data", ".", *options, "train.py"),
        cwd=directory,
        env={"PATH": os.environ["PATH"], "PYTHONWARNINGS": "error"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), 60)
    finally:
        if process.returncode is None:  # nobody is left behind by a test that fails
            process.kill()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_a_client_says_what_it_does(world: World, tmp_path: Path) -> None:
    """One line for each step, on standard error; it ends with 0 when the training is finished."""
    await world.launch(Plan(rounds=2, goal_count=1, client_config={"step": 2}), MODEL)
    code, out, err = await run(world, tmp_path / "clinic", TRAIN)
    assert (code, out) == (0, "")
    lines = [line for line in err.splitlines() if not line.startswith("waiting")]
    assert lines[0] == "taking part in 'A problem' as org 1"
    assert lines[1] == "round 1: selected, fetching the model (0.1 kB)"
    assert lines[2] == "round 1: training on your data ..."
    assert re.fullmatch(r"round 1: trained on 3 examples in \d+\.\d s, sending the update", lines[3])
    assert lines[4] == "round 1: the update has arrived, waiting for the round to complete ..."
    assert lines[5:7] == ["round 1: your update counts", "round 2: selected, fetching the model (0.1 kB)"]
    assert lines[-2:] == ["round 2: your update counts", "The training is finished."]
    final = await until(lambda: world.platform.final)
    assert_same(world.platform.weights(final), weighted_mean([({"w": MODEL["w"] + 6}, 3)]))
    assert final.metrics == {"rows": 3.0}


async def test_a_quiet_client(world: World, tmp_path: Path) -> None:
    """Says nothing when nothing is wrong."""
    await world.launch(Plan(rounds=1, goal_count=1, client_config={"step": 1}), MODEL)
    assert await run(world, tmp_path / "clinic", TRAIN, "--quiet") == (0, "", "")


async def test_a_train_that_fails_in_the_middle(world: World, tmp_path: Path) -> None:
    """Its author sees the traceback; the exit code is not 0."""
    await world.launch(Plan(rounds=1, goal_count=1), MODEL)
    code, out, err = await run(world, tmp_path / "clinic", TRAIN, "--quiet")
    assert (code, out) == (1, "")
    assert 'model["w"] += config["step"]' in err and "Traceback" in err
    assert err.splitlines()[-1] == "Error: train() raised KeyError: 'step'."


async def test_a_train_that_returns_what_cannot_be_sent(world: World, tmp_path: Path) -> None:
    """Nothing is sent."""
    await world.launch(Plan(rounds=1, goal_count=1), MODEL)
    train = "def train(model, data, config):\n    model['w'][2] = float('nan')\n    return model, 1, {}\n"
    code, _, err = await run(world, tmp_path / "clinic", train)
    assert code == 1
    assert "In what train() returned the tensor 'w' holds NaN or infinity, so nothing was sent." in err
    metrics = await world.metrics(world.selectors[0])
    assert metrics["fedota_updates_accepted_total"] == 0
