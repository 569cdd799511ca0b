"""What organizations run beside their data.

A data holder writes one Python file with one function, `train` (see `Train`), and runs
`fedota client run --kit kit.json --data folder train.py`. Or, from a program: `await run(kit, train, data)`.
"""

from fedota.client.errors import ClientError, TrainError
from fedota.client.kits import read_kit
from fedota.client.running import run
from fedota.client.train import Model, Train, Trained, load_train

__all__ = ["ClientError", "Model", "Train", "TrainError", "Trained", "load_train", "read_kit", "run"]
