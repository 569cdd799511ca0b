"""What each hospital runs beside its own data: logistic regression on the Wisconsin diagnostic measurements.

The data folder holds `patients.csv`: 30 measurements a row, then the diagnosis (1 is benign, 0 malignant).

The first round trains nothing. Each hospital sends the means of its measurements and of their squares; the weighted
mean over hospitals is exactly that of all patients together, so from the second round on everybody scales alike.
"""

from pathlib import Path
from typing import Any

import numpy as np

Model = dict[str, np.ndarray]


def train(model: Model, data: Path, config: dict[str, Any]) -> tuple[Model, int, dict[str, float]]:
    """Gradient steps from the global model: the local model, the number of patients, loss and accuracy before them.

    `model` has `mean` and `square` (30), `weights` (30) and `bias` (1), all float64; `config` has `steps`,
    `learning_rate` and `decay` (of the weights). The metrics are those of the model that came in.
    """
    features, diagnoses = load(data)
    if not model["square"].any():
        seen = {**model, "mean": features.mean(axis=0), "square": (features**2).mean(axis=0)}
        return seen, len(features), measure(model, features, diagnoses)
    scaled = scale(model, features)
    weights, bias = model["weights"].copy(), model["bias"].copy()
    for _ in range(int(config["steps"])):
        error = _sigmoid(scaled @ weights + bias) - diagnoses
        weights -= config["learning_rate"] * (scaled.T @ error / len(error) + config["decay"] * weights)
        bias -= config["learning_rate"] * error.mean()
    return {**model, "weights": weights, "bias": bias}, len(features), measure(model, features, diagnoses)


def load(data: Path) -> tuple[np.ndarray, np.ndarray]:
    """Measurements (n × 30) and diagnoses (n) of a data folder."""
    table = np.loadtxt(data / "patients.csv", delimiter=",", skiprows=1, ndmin=2)
    return table[:, :-1], table[:, -1]


def scale(model: Model, features: np.ndarray) -> np.ndarray:
    """Measurements with the mean 0 and the variance 1 over all patients that the model has heard of."""
    deviation = np.sqrt(np.maximum(model["square"] - model["mean"] ** 2, 1e-12))
    scaled: np.ndarray = (features - model["mean"]) / deviation
    return scaled


def measure(model: Model, features: np.ndarray, diagnoses: np.ndarray) -> dict[str, float]:
    """Mean cross-entropy and accuracy of a model."""
    scores = scale(model, features) @ model["weights"] + model["bias"] if model["square"].any() else 0 * diagnoses
    loss = np.logaddexp(0, scores) - diagnoses * scores
    return {"loss": float(loss.mean()), "accuracy": float(((scores > 0) == diagnoses).mean())}


def _sigmoid(scores: np.ndarray) -> np.ndarray:
    activated: np.ndarray = 1 / (1 + np.exp(-np.clip(scores, -500, 500)))
    return activated
