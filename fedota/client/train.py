"""The data holder's side: what `train` is, where it is loaded from, and whether what it returned can be sent."""

import importlib.util
import json
import math
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fedota.client.errors import ClientError, TrainError
from fedota.runtime.aggregation import not_finite
from fedota.runtime.protocol import METRICS_LIMIT, MOST_EXAMPLES, MOST_METRICS
from fedota.runtime.tensors import Layout, mismatch

Model = dict[str, NDArray[Any]]
Trained = tuple[Mapping[str, NDArray[Any]], int, Mapping[str, float]]
_MODULE: Final = "fedota_train"


class Train(Protocol):
    """What a data holder writes.

    `model` holds the round's weights by name; they may be changed in place. `data` is the folder given with `--data`.
    `config` is the plan's client config, with the round's number as `round` unless the plan says otherwise. Returned
    are the trained weights (same names, shapes and types), the number of examples trained on, and metrics, which are
    shown to everybody who takes part.
    """

    def __call__(self, model: Model, data: Path, config: dict[str, Any], /) -> Trained:
        """Train."""
        ...


class Update(NamedTuple):
    """What is sent: tensors in the layout's order, contiguous; `metrics` in JSON."""

    layout: Layout
    tensors: list[NDArray[Any]]
    examples: int
    metrics: str

    @property
    def size(self) -> int:
        """The bytes of its body."""
        return self.layout.size

    @property
    def parts(self) -> list[memoryview]:
        """The body, in parts that share the tensors' memory."""
        tensors = [tensor.reshape(-1).view(np.uint8).data for tensor in self.tensors if tensor.size]
        return [memoryview(self.layout.header), *tensors]


def load_train(path: Path) -> Train:
    """The function `train` of a Python file; modules beside the file can be imported by it."""
    if not path.is_file():
        raise ClientError(f"There is no file {path}. Give the Python file that defines train(model, data, config).")
    spec = importlib.util.spec_from_file_location(_MODULE, path)
    if spec is None or spec.loader is None:
        raise ClientError(f"{path} is not a Python file: its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE] = module
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file does wrong is its author's to read
        raise TrainError(f"{path} cannot be loaded: {_said(error)}.", _own_traceback(error)) from None
    train = getattr(module, "train", None)
    if not callable(train):
        raise ClientError(f"{path} defines no function train(model, data, config). Add it.")
    loaded: Train = train
    return loaded


def call_train(train: Train, model: Model, data: Path, config: dict[str, Any], layout: Layout) -> Update:
    """Train, and check what came of it before anything is sent. Raises `ClientError`."""
    try:
        returned = train(model, data, config)
    except Exception as error:  # whatever the function does wrong is its author's to read
        raise TrainError(f"train() raised {_said(error)}.", _own_traceback(error)) from error
    return checked_update(returned, layout)


def checked_update(returned: Any, layout: Layout) -> Update:
    """What `train` returned, ready to be sent. Raises `ClientError`, naming what is wrong."""
    if not isinstance(returned, tuple | list) or len(returned) != 3:
        raise ClientError(f"train() must return (model, examples, metrics), but it returned {_kind(returned)}.")
    model, examples, metrics = returned
    return Update(layout, _tensors(model, layout), _examples(examples), _metrics(metrics))


def _tensors(model: Any, layout: Layout) -> list[NDArray[Any]]:
    if not isinstance(model, Mapping):
        raise ClientError(f"train() must return the model as a dict of arrays, but it is {_kind(model)}.")
    arrays = {str(name): np.asarray(values) for name, values in model.items()}
    arrays = {name: values.astype(values.dtype.newbyteorder("<"), copy=False) for name, values in arrays.items()}
    found = {name: (values.dtype, values.shape) for name, values in arrays.items()}
    if fault := mismatch(layout, found):
        raise ClientError(
            f"In what train() returned {fault}. Return the tensors that it was given, in the same types and shapes."
        )
    if (name := not_finite(arrays)) is not None:
        raise ClientError(
            f"In what train() returned the tensor {name!r} holds NaN or infinity, so nothing was sent. "
            "A smaller learning rate often helps."
        )
    ordered = [arrays[tensor.name] for tensor in layout.tensors]
    return [values if values.flags.c_contiguous else values.copy(order="C") for values in ordered]


def _examples(examples: Any) -> int:
    whole = isinstance(examples, int | np.integer) and not isinstance(examples, bool)
    if not whole or not 1 <= examples <= MOST_EXAMPLES:
        raise ClientError(
            f"train() must return the number of examples as a whole number from 1 to {MOST_EXAMPLES}, "
            f"but it is {examples!r}."
        )
    return int(examples)


def _metrics(metrics: Any) -> str:
    if not isinstance(metrics, Mapping):
        raise ClientError(f"train() must return metrics as a dict of numbers, but it is {_kind(metrics)}.")
    if len(metrics) > MOST_METRICS:
        raise ClientError(f"train() returned {len(metrics)} metrics; {MOST_METRICS} are the most.")
    numbers = {}
    for name, value in metrics.items():
        if not isinstance(name, str) or not 1 <= len(name) <= 100:
            raise ClientError(
                f"The name of a metric has 1 to 100 characters, but one that train() returned is {name!r}."
            )
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ClientError(f"The metric {name!r} that train() returned is not a finite number: {value!r}.")
        numbers[name] = number
    text = json.dumps(numbers)
    if len(text) > METRICS_LIMIT:
        raise ClientError(f"The metrics that train() returned take {len(text)} bytes; {METRICS_LIMIT} are the most.")
    return text


def _kind(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}" if value is not None else "None"


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ").rstrip(".")


def _own_traceback(error: BaseException) -> str:
    """Where it happened in the data holder's code: without our own frames above it."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename in (__file__, "<frozen importlib._bootstrap>"):
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames or error.__traceback__)).rstrip()
