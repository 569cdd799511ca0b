"""What the setter publishes, and how the demo cuts the bundled data set into hospitals and held-out patients."""

import csv
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors.numpy import save_file
from sklearn.datasets import load_breast_cancer

NAME: Final = "breast cancer diagnosis"
DESCRIPTION: Final = (
    "Tell benign from malignant breast tumours by 30 measurements of cell nuclei (the Wisconsin diagnostic data set). "
    "Each hospital keeps its patients; only model weights travel."
)
DATA_FORMAT: Final = "patients.csv: a header, then one row a patient: 30 measurements, then 1 (benign) or 0 (malignant)"
CLIENT_IMAGE: Final = "registry.example.org/fedota/breast-cancer:1.0"
CLIENT_CONFIG: Final[dict[str, Any]] = {"steps": 20, "learning_rate": 0.3, "decay": 0.005}
ROUNDS: Final = 12
# Each hospital's share of all benign and of all malignant cases: a screening centre, a small clinic, a tumour centre.
HOSPITALS: Final = {
    "Aare Screening Centre": (0.80, 0.03),
    "Birch Clinic": (0.17, 0.17),
    "Cedar Tumour Centre": (0.03, 0.80),
}
_HELD_OUT: Final = 0.3
_SEED: Final = 0


def write_initial_model(path: Path) -> None:
    """The model that training starts from: it has seen nobody and knows nothing."""
    empty = {name: np.zeros(30) for name in ("mean", "square", "weights")}
    save_file({**empty, "bias": np.zeros(1)}, path)


def write_data(directory: Path) -> None:
    """A folder for each hospital, `pooled` with all of theirs, and `held-out`, which nobody trains on."""
    bundle = load_breast_cancer()
    order = np.random.default_rng(_SEED).permutation(len(bundle.target))
    held_out, rest = np.split(order, [int(_HELD_OUT * len(order))])
    parts = dict(zip(HOSPITALS, _split(rest, bundle.target[rest]), strict=True))
    for name, rows in {**parts, "pooled": np.concatenate(list(parts.values())), "held-out": held_out}.items():
        _write(directory / name, bundle, rows)


def _split(rows: np.ndarray, diagnoses: np.ndarray) -> list[np.ndarray]:
    cuts = np.cumsum(list(HOSPITALS.values()), axis=0)[:-1]
    benign, malignant = rows[diagnoses == 1], rows[diagnoses == 0]
    of_benign = np.split(benign, (cuts[:, 0] * len(benign)).astype(int))
    of_malignant = np.split(malignant, (cuts[:, 1] * len(malignant)).astype(int))
    return [np.concatenate(pair) for pair in zip(of_benign, of_malignant, strict=True)]


def _write(directory: Path, bundle: Any, rows: np.ndarray) -> None:
    directory.mkdir(parents=True)
    with (directory / "patients.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*bundle.feature_names, "benign"])
        writer.writerows([*map(float, bundle.data[row]), int(bundle.target[row])] for row in rows)
