"""Which files can be the model that training starts from."""

import json
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from services.storage.model_file import HEADER_LIMIT, model_fault


def file_of(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file with this header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def fault_of(body: bytes) -> str | None:
    """What is said of the file when all of it is read."""
    return model_fault(body, len(body))


def tensor(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    """A header's entry."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"])
def test_what_the_library_writes_is_a_model(dtype: str) -> None:
    """Every numeric dtype, with scalars, empty tensors and metadata."""
    tensors = {"w": np.zeros((3, 4), dtype), "b": np.zeros((), dtype), "none": np.zeros((0, 2), dtype)}
    assert fault_of(save(tensors, metadata={"framework": "test"})) is None


def test_the_header_is_enough() -> None:
    """What follows it need not be read."""
    body = save({"w": np.ones(1000, "f4")})
    header = 8 + int.from_bytes(body[:8], "little")
    assert model_fault(body[:header], len(body)) is None


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"", "cut off"),
        (b"\x80\x04\x95", "cut off"),
        (b"\x80\x04\x95 a pickle, not safetensors", "cut off"),
        (file_of({"w": tensor()}, b"\0" * 8)[:20], "cut off"),
        ((2**63).to_bytes(8, "little") + b"{}", "cut off"),
        (file_of(b"not json"), "not a safetensors file"),
        (file_of(b"[]"), "not a safetensors file"),
        (file_of(b'{"w": 1}'), "not a safetensors file"),
        (file_of({"w": {"dtype": "F32"}}), "not a safetensors file"),
        (file_of({"w": tensor(shape=(-1,))}), "not a safetensors file"),
        (file_of({"w": tensor(shape=(2**60, 2**60))}), "not a safetensors file"),
        (file_of(b'{"\xff": 1}'), "not a safetensors file"),
        (file_of(b'{"w":{"dtype":"F32","dtype":"F32","shape":[0],"data_offsets":[0,0]}}'), "not a safetensors file"),
        (file_of({"w": tensor(), "__metadata__": {"a": 1}}), "not a safetensors file"),
        (file_of({}), "no tensor"),
        (file_of({"__metadata__": {"a": "b"}}), "no tensor"),
        (file_of({"w": tensor(shape=(2, *(1,) * 64))}, b"\0" * 8), "65 dimensions"),
        (file_of({"w": tensor(dtype="BOOL", shape=(8,))}, b"\0" * 8), "BOOL"),
        (file_of({"w": tensor(dtype="BF16", shape=(4,))}, b"\0" * 8), "BF16"),
        (file_of({"w": tensor(dtype="OBJECT")}, b"\0" * 8), "not a safetensors file"),
        (file_of({"w": tensor(shape=(3,))}, b"\0" * 8), "not a safetensors file"),
        (file_of({"w": tensor(offsets=(8, 0))}, b"\0" * 8), "not a safetensors file"),
        (file_of({"w": tensor(offsets=(4, 12))}, b"\0" * 12), "not a safetensors file"),
        (file_of({"w": tensor(), "v": tensor(offsets=(4, 12))}, b"\0" * 12), "not a safetensors file"),
        (file_of({"w": tensor(), "v": tensor(offsets=(9, 17))}, b"\0" * 17), "not a safetensors file"),
        (file_of({"w": tensor()}, b"\0" * 7), "not a safetensors file"),
        (file_of({"w": tensor()}, b"\0" * 9), "not a safetensors file"),
    ],
)
def test_what_is_no_model_is_told(body: bytes, word: str) -> None:
    """Each reason in words that a setter can act on."""
    fault = fault_of(body)
    assert fault is not None
    assert word in fault


def test_a_huge_header_is_not_read() -> None:
    """A header of gigabytes would be as bad as a bomb."""
    length = HEADER_LIMIT + 1
    fault = model_fault(length.to_bytes(8, "little"), 8 + length)
    assert fault is not None
    assert str(HEADER_LIMIT) in fault


def test_the_largest_header_is_judged_quickly() -> None:
    """Tens of thousands of tensors of many dimensions, all in the limit."""
    entry = json.dumps(tensor(shape=(0,) * 64, offsets=(0, 0))).encode()
    parts = [b'"%d":%s' % (number, entry) for number in range(HEADER_LIMIT // (len(entry) + 12))]
    started = time.perf_counter()
    assert fault_of(file_of(b"{" + b",".join(parts) + b"}")) is None
    assert time.perf_counter() - started < 5


@given(st.binary(max_size=200), st.binary(max_size=50))
def test_no_file_breaks_the_check(header: bytes, data: bytes) -> None:
    """Whatever is uploaded, there is an answer in words."""
    assert fault_of(file_of(header, data)) is not None
    assert fault_of(header) is not None
