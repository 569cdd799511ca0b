"""What a data holder's code may return, and what is said when it is wrong."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from fedota.client import ClientError, Model, TrainError, load_train
from fedota.client.train import call_train, checked_update
from fedota.runtime.tensors import Layout, layout_of


def model() -> Model:
    """Two tensors and a scalar."""
    return {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(2), "n": np.array(3, np.int64)}


def layout() -> Layout:
    """Theirs."""
    return layout_of(memoryview(safetensors.numpy.save(model())))


def test_what_is_sent_is_what_was_returned() -> None:
    """In safetensors form, whatever the arrays look like in memory."""
    returned = {
        "n": np.array(4, ">i8"),
        "b": np.arange(4.0)[::2],
        "w": np.asfortranarray(model()["w"] + 1),
    }
    update = checked_update((returned, np.int64(12), {"loss": np.float32(0.5), "steps": 3}), layout())
    body = b"".join(bytes(part) for part in update.parts)
    assert len(body) == update.size
    sent = safetensors.numpy.load(body)
    assert (sent["w"] == model()["w"] + 1).all() and sent["b"].tolist() == [0, 2] and sent["n"] == 4
    assert (update.examples, update.metrics) == (12, '{"loss": 0.5, "steps": 3.0}')


def test_nothing_is_copied_without_need() -> None:
    """The update's parts are the arrays' own memory."""
    mine = model()
    update = checked_update((mine, 1, {}), layout())
    mine["b"][0] = 7.0
    assert safetensors.numpy.load(b"".join(bytes(part) for part in update.parts))["b"][0] == 7.0


class Tensor:
    """As other frameworks have it."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.zeros(2)


def test_what_turns_into_an_array_is_one() -> None:
    """Such as another framework's tensor."""
    assert checked_update(({**model(), "b": Tensor()}, 1, {}), layout()).tensors


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (None, r"must return \(model, examples, metrics\), but it returned None"),
        ((1, 2), "it returned a tuple of 2"),
        (([], 1, {}), "the model as a dict of arrays, but it is a list of 0"),
        (({}, 1, {}), "is missing"),
        (({**model(), "x": np.zeros(1)}, 1, {}), "the model has no tensor 'x'"),
        (({**model(), "b": np.zeros(3)}, 1, {}), r"'b' is float64\[3\], but the model's is float64\[2\]"),
        (({**model(), "b": np.zeros(2, np.float32)}, 1, {}), r"'b' is float32\[2\], but the model's is float64\[2\]"),
        (({**model(), "b": "text"}, 1, {}), "'b' is str"),
        (({**model(), "b": np.array([0, np.nan])}, 1, {}), "the tensor 'b' holds NaN or infinity, so nothing was sent"),
        ((model(), 0, {}), "whole number from 1 to 1000000000, but it is 0"),
        ((model(), 1.0, {}), "but it is 1.0"),
        ((model(), True, {}), "but it is True"),
        ((model(), 10**9 + 1, {}), "but it is 1000000001"),
        ((model(), 1, None), "metrics as a dict of numbers, but it is None"),
        ((model(), 1, {"loss": float("nan")}), "'loss' that train.. returned is not a finite number: nan"),
        ((model(), 1, {"loss": "low"}), "'loss' that train.. returned is not a finite number: 'low'"),
        ((model(), 1, {"": 1.0}), "1 to 100 characters"),
        ((model(), 1, {1: 1.0}), "1 to 100 characters"),
        ((model(), 1, {f"m{n}": 1.0 for n in range(65)}), "65 metrics; 64 are the most"),
        ((model(), 1, {f"{n:099}": 1 / 3 for n in range(64)}), "bytes; 4096 are the most"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_sent(returned: Any, said: str) -> None:
    """In one sentence, with the tensor or the number that it is about."""
    with pytest.raises(ClientError, match=said):
        checked_update(returned, layout())


def test_an_error_in_train_shows_the_authors_own_lines() -> None:
    """And none of ours."""

    def train(model: Model, data: Path, config: dict[str, Any]) -> Any:
        return model["no such tensor"], 1, {}

    with pytest.raises(TrainError, match="raised KeyError: 'no such tensor'") as raised:
        call_train(train, model(), Path(), {}, layout())
    assert 'model["no such tensor"]' in raised.value.traceback
    assert "call_train" not in raised.value.traceback


def test_a_file_with_train_is_loaded_with_what_lies_beside_it(tmp_path: Path) -> None:
    """As Python itself would."""
    (tmp_path / "fedota_test_helper.py").write_text("EXAMPLES = 5\n")
    (tmp_path / "train.py").write_text(
        "from fedota_test_helper import EXAMPLES\n\ndef train(model, data, config):\n    return model, EXAMPLES, {}\n"
    )
    train = load_train(tmp_path / "train.py")
    assert call_train(train, model(), tmp_path, {}, layout()).examples == 5


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("missing.py", None, "There is no file"),
        ("notes.txt", "", "is not a Python file"),
        ("train.py", "x = 1", r"defines no function train\(model, data, config\)"),
        ("train.py", "train = 1", "defines no function"),
        ("train.py", "def train(:", "cannot be loaded: SyntaxError"),
        ("train.py", "import fedota_no_such_module", "cannot be loaded: ModuleNotFoundError"),
    ],
)
def test_a_file_without_train_is_explained(tmp_path: Path, name: str, text: str | None, said: str) -> None:
    """Before anybody is connected to."""
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(ClientError, match=said):
        load_train(path)
