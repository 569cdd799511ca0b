"""safetensors, read in place."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from fedota.errors import FedotaError
from fedota.runtime import tensors
from fedota.runtime.places import Memory
from fedota.runtime.protocol import HEADER_SLACK
from fedota.runtime.tensors import DTYPES, described, layout_in, layout_of, mismatch, read_layout

MODEL = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.array([1, 2], np.int32)}


def test_a_layout_from_a_file_and_from_memory() -> None:
    """Both tell the same, and views show what was stored."""
    body = safetensors.numpy.save(MODEL)
    layout = layout_of(memoryview(body))
    assert layout.size == len(body)
    views = layout.views(memoryview(body))
    assert {name: values.tolist() for name, values in views.items()} == {n: v.tolist() for n, v in MODEL.items()}


def test_a_file(tmp_path: Path) -> None:
    """As the coordinator reads it."""
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(MODEL, path)
    assert read_layout(path) == layout_of(memoryview(path.read_bytes()))


@pytest.mark.parametrize("dtype", list(DTYPES.values()))
def test_every_type_that_is_known(dtype: np.dtype[np.generic]) -> None:
    """Comes out as it went in."""
    body = safetensors.numpy.save({"x": np.array([[1], [2]]).astype(dtype)})
    layout = layout_of(memoryview(body))
    assert layout.tensors[0].dtype == dtype and layout.tensors[0].elements == 2
    assert layout.views(memoryview(body))["x"].tolist() == [[1], [2]]


def test_what_has_no_sum_is_refused() -> None:
    """Such as bfloat16, with the types that can be used."""
    header = b'{"x":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'
    body = len(header).to_bytes(8, "little") + header + bytes(4)
    with pytest.raises(FedotaError, match=r"'x' has the dtype BF16, which cannot be aggregated\. Use one of F64"):
        layout_of(memoryview(body))


@given(st.binary(max_size=200))
def test_no_bytes_break_it(body: bytes) -> None:
    """Whatever comes is a layout or `update_malformed`."""
    try:
        layout_of(memoryview(body))
    except FedotaError as error:
        assert error.problem.code in ("update_malformed", "update_mismatch")


@given(st.integers(0, 199), st.integers(0, 255))
def test_no_flipped_byte_breaks_it(place: int, value: int) -> None:
    """A header that was tampered with is read as what it says, or refused."""
    body = bytearray(safetensors.numpy.save(MODEL))
    body[place % len(body)] = value
    try:
        layout = layout_of(memoryview(body))
    except FedotaError as error:
        assert error.problem.code in ("update_malformed", "update_mismatch")
    else:
        assert layout.size == len(body)
        layout.views(memoryview(body))


def test_mismatches_are_told_in_words() -> None:
    """The first one, and which tensor it is."""
    layout = layout_of(memoryview(safetensors.numpy.save(MODEL)))
    found = {tensor.name: (tensor.dtype, tensor.shape) for tensor in layout.tensors}
    assert mismatch(layout, found) is None
    assert mismatch(layout, {**found, "w": (np.dtype("<f8"), (2, 3))}) == (
        "the tensor 'w' is float64[2, 3], but the model's is float32[2, 3]"
    )
    assert mismatch(layout, {"w": found["w"]}) == "the tensor 'n' is missing"
    assert mismatch(layout, {**found, "x": found["w"]}) == "the model has no tensor 'x'"
    assert described(np.dtype("<f2"), ()) == "float16[]"


def test_a_shape_of_very_many_dimensions_is_told_in_few_words() -> None:
    """A header of 64 KB may hold thousands of them."""
    said = described(np.dtype("<f4"), (1,) * 30_000)
    assert said == "float32[1, 1, 1, 1, 1, 1, 1, 1, … 30000 dimensions]"


class _Unread(Memory):
    """A body of which only so much may be looked at."""

    def read(self, start: int, stop: int) -> memoryview:
        """No more than a header."""
        assert stop - start <= 1000
        return super().read(start, stop)


def test_a_header_far_longer_than_the_models_is_not_read() -> None:
    """It would be in memory twice, and on the disk, before the package refuses it; slack is for other metadata."""
    body = safetensors.numpy.save(MODEL)
    like = layout_of(memoryview(body))
    claims = (len(like.header) + HEADER_SLACK + 1).to_bytes(8, "little") + bytes(200_000)
    with pytest.raises(FedotaError, match=r"its header has 6[0-9]+ bytes, far more than the model's"):
        layout_in(_Unread(memoryview(claims), len(claims)), like)
    spaced = json.loads(body[8 : len(like.header)]) | {"__metadata__": {"note": "x" * (HEADER_SLACK - 1000)}}
    header = json.dumps(spaced).encode()
    longer = len(header).to_bytes(8, "little") + header + body[len(like.header) :]
    assert mismatch(like, {t.name: (t.dtype, t.shape) for t in layout_of(memoryview(longer), like).tensors}) is None


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EMFILE])
def test_a_full_disk_is_no_fault_of_the_bodys(monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    """It is asked for again, in a sentence."""

    def full(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "mkdir", full)
    with pytest.raises(FedotaError, match="There is no room for the body's header") as raised:
        layout_of(memoryview(safetensors.numpy.save(MODEL)))
    assert (raised.value.problem.code, raised.value.problem.retry_after) == ("unavailable", 5)


def test_a_file_that_cannot_be_opened_is_not_called_malformed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client whose update is refused for good would stop."""

    def none_left(*_: object, **__: object) -> None:
        raise FileNotFoundError("No such file or directory")  # so the package says also when there are too many open

    monkeypatch.setattr(tensors, "safe_open", none_left)
    with pytest.raises(OSError, match="No such file"):
        layout_of(memoryview(safetensors.numpy.save(MODEL)))
