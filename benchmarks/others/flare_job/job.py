"""Deploys FLARE for the proof of concept, runs one job of federated averaging, and stops it: see `main`."""

import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
from nvflare.app_common.np.recipes import NumpyFedAvgRecipe
from nvflare.recipe import PocEnv

_TENSORS = 10
_PATIENCE = 600.0  # seconds


def main(workspace: str, told: str, port: str, clients: str, floats: str, rounds: str) -> None:
    """The workspace's server listens at the port; the time of each round is noted in the file `told`."""
    project = (files("nvflare.lighter") / "dummy_project.yml").read_text()
    Path(workspace).mkdir()
    (Path(workspace) / "project.yml").write_text(project.replace("fed_learn_port: 8002", f"fed_learn_port: {port}"))
    model = Path.cwd() / "model.npy"
    random = np.random.default_rng(7)
    np.save(model, random.standard_normal((_TENSORS, int(floats) // _TENSORS), dtype=np.float32))
    recipe = NumpyFedAvgRecipe(
        name="benchmark",
        initial_ckpt=str(model),
        min_clients=int(clients),
        num_rounds=int(rounds),
        train_script="client.py",
        train_args=told,
    )
    deployed = PocEnv(num_clients=int(clients))
    try:
        recipe.execute(deployed).get_result(timeout=_PATIENCE)
    finally:
        deployed.stop(clean_up=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
