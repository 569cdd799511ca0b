"""The breast cancer example as the demo uses it: its files, loaded from where Fedota is installed or checked out."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Final, NamedTuple

import numpy as np
from safetensors.numpy import load_file

import fedota
from fedota.local.state import LocalError

_PLACES: Final = (Path(fedota.__file__).parent / "examples", Path(fedota.__file__).parents[1] / "examples")
Model = dict[str, Any]


class Scores(NamedTuple):
    """Accuracy on patients whom nobody trained on."""

    federated: float
    pooled: float
    alone: dict[str, float]

    @property
    def shortfall(self) -> str:
        """What federated training owes and did not give; nothing when it is better than everybody alone."""
        if self.federated <= max(self.alone.values()):
            return "The federated model is not better than every hospital alone."
        if self.federated < self.pooled - 0.01:
            return "The federated model is more than one point behind the pooled one."
        return ""


class Example:
    """The modules of `examples/breast_cancer`."""

    def __init__(self) -> None:
        self.directory = _directory()
        self.train_file = self.directory / "client.py"
        self.client = _load(self.train_file)
        try:
            self.problem = _load(self.directory / "problem.py")
        except ImportError as error:
            raise LocalError(f"The demo needs {error.name}. Run: pip install 'fedota[demo]'") from None

    @property
    def hospitals(self) -> list[str]:
        """The organizations that take part."""
        return list(self.problem.HOSPITALS)

    def counts(self, data: Path, name: str) -> tuple[int, int]:
        """A folder's number of benign and of malignant cases."""
        _, diagnoses = self.client.load(data / name)
        benign = int(diagnoses.sum())
        return benign, len(diagnoses) - benign

    def score(self, data: Path, initial: Path, final: Path, rounds: int) -> Scores:
        """The final model beside what each hospital gets alone, and all data in one place, with the same training."""
        start = load_file(initial)
        return Scores(
            federated=self._accuracy(load_file(final), data),
            pooled=self._accuracy(self._trained(start, data / "pooled", rounds), data),
            alone={name: self._accuracy(self._trained(start, data / name, rounds), data) for name in self.hospitals},
        )

    def _trained(self, model: Model, data: Path, rounds: int) -> Model:
        for _ in range(rounds):
            model, _, _ = self.client.train(model, data, self.problem.CLIENT_CONFIG)
        return model

    def _accuracy(self, model: Model, data: Path) -> float:
        features, diagnoses = self.client.load(data / "held-out")
        with np.errstate(all="raise"):
            accuracy: float = self.client.measure(model, features, diagnoses)["accuracy"]
        return accuracy


def _directory() -> Path:
    for place in _PLACES:
        if (place / "breast_cancer").is_dir():
            return place / "breast_cancer"
    raise LocalError("The demo's files (examples/breast_cancer) are missing. Install Fedota again.")


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"fedota_example_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
