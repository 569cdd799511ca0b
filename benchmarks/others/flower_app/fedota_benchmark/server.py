"""Federated averaging over every client; a line for the time at which each round was over."""

import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

_TENSORS = 10
app = ServerApp()


def main(grid: Grid, context: Context) -> None:
    """All rounds; the first line stands for the time before them."""
    told = context.run_config
    random = np.random.default_rng(7)
    values = random.standard_normal((_TENSORS, int(told["floats"]) // _TENSORS), dtype=np.float32)
    clients = int(told["clients"])

    def note(_: int, __: ArrayRecord) -> None:
        with Path(str(told["told"])).open("a") as file:
            file.write(f"{time.time()}\n")

    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
    strategy.start(grid, ArrayRecord(list(values)), num_rounds=int(told["rounds"]), evaluate_fn=note)


app.main()(main)
