"""Named tensors in `safetensors` form, read in place: a header that the `safetensors` package checked, and views.

Nothing here copies tensor data. A body of 40 MB is checked against a model's layout in microseconds.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from fedota.errors import FedotaError
from fedota.runtime.places import Place, on_disk, whole
from fedota.runtime.protocol import HEADER_SLACK

Array = NDArray[Any]
_PREFIX: Final = 8  # bytes: the header's length, little endian
_SAID: Final = 8  # dimensions of a shape that are told; there may be thousands

# `bfloat16` and 8-bit floats have no numpy type: their sum could not be checked here.
DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("<i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("<u1"),
}


class Tensor(NamedTuple):
    """One tensor of a layout: `start` and `size` in bytes, within the data after the header."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def averaged(self) -> bool:
        """Whether it is averaged (floats) or counts something (integers)."""
        return self.dtype.kind == "f"

    @property
    def elements(self) -> int:
        """The number of its elements."""
        return self.size // self.dtype.itemsize


class Layout(NamedTuple):
    """Where each tensor lies in a safetensors body; `header` is the body's beginning up to the data."""

    header: bytes
    tensors: tuple[Tensor, ...]

    @property
    def size(self) -> int:
        """The whole body's bytes."""
        return len(self.header) + sum(tensor.size for tensor in self.tensors)

    def views(self, body: memoryview) -> dict[str, Array]:
        """The body's tensors as arrays that share its memory."""
        data = body[len(self.header) :]
        return {
            tensor.name: np.frombuffer(data[tensor.start : tensor.start + tensor.size], tensor.dtype).reshape(
                tensor.shape
            )
            for tensor in self.tensors
        }


def read_layout(path: Path) -> Layout:
    """The layout of a safetensors file. Raises `update_malformed`, saying what is wrong with it."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_PREFIX), "little")
        header = length.to_bytes(_PREFIX, "little") + file.read(min(length, path.stat().st_size))
    return Layout(header, _tensors(path))


def layout_of(body: memoryview, like: Layout | None = None) -> Layout:
    """The layout of a safetensors body in memory; see `layout_in`."""
    return layout_in(whole(body), like)


def layout_in(body: Place, like: Layout | None = None) -> Layout:
    """The layout of a safetensors body, which should hold the tensors of `like`. Raises `update_malformed`.

    Mostly its header is the very same, which is checked already. Another one is written to a sparse file of the body's
    size for the package to check it: the data is not copied. Raises `unavailable` when there is no room for that file.
    """
    size = body.received
    if like is not None and size == like.size and body.read(0, len(like.header)) == like.header:
        return like
    length = int.from_bytes(body.read(0, min(size, _PREFIX)), "little")
    if size < _PREFIX or length > size - _PREFIX:
        raise malformed("its header is cut off")
    if like is not None and length > len(like.header) + HEADER_SLACK:  # it would be read, and copied, as a whole
        raise malformed(f"its header has {length} bytes, far more than the model's")
    header = bytes(body.read(0, _PREFIX + length))
    with on_disk("the body's header"), tempfile.TemporaryDirectory(prefix="fedota-") as directory:
        path = Path(directory) / "header"
        with path.open("wb") as file:
            file.write(header)
            file.truncate(size)
        return Layout(header, _tensors(path))


def malformed(why: str) -> FedotaError:
    """The error that says why a body is not a safetensors body."""
    return FedotaError("update_malformed", f"The body is not in safetensors form: {why}. Send it as safetensors.")


def _tensors(path: Path) -> tuple[Tensor, ...]:
    try:
        with safe_open(path, framework="np") as file:
            slices = [(name, file.get_slice(name)) for name in file.offset_keys()]
            found = [(name, piece.get_dtype(), tuple(piece.get_shape())) for name, piece in slices]
    except SafetensorError as error:  # not OSError: that no file can be opened is no fault of the body's
        raise malformed(str(error)[:200]) from None
    tensors, start = [], 0
    for name, code, shape in found:
        if (dtype := DTYPES.get(code)) is None:
            raise FedotaError(
                "update_mismatch",
                f"The tensor {name[:100]!r} has the dtype {code}, which cannot be aggregated. "
                f"Use one of {', '.join(DTYPES)}.",
            )
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        tensors.append(Tensor(name, dtype, shape, start, size))
        start += size
    return tuple(tensors)


def described(dtype: np.dtype[Any], shape: tuple[int, ...]) -> str:
    """A tensor's type in words, such as `float32[3, 4]`; of many dimensions only the first ones."""
    more = f", … {len(shape)} dimensions" if len(shape) > _SAID else ""
    return f"{dtype.name}[{', '.join(map(str, shape[:_SAID]))}{more}]"


def mismatch(layout: Layout, found: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]) -> str | None:
    """The first tensor that differs from the layout, in words; None when all are as they should be."""
    for tensor in layout.tensors:
        if tensor.name not in found:
            return f"the tensor {tensor.name[:100]!r} is missing"
        if found[tensor.name] != (tensor.dtype, tensor.shape):
            is_, should = described(*found[tensor.name]), described(tensor.dtype, tensor.shape)
            return f"the tensor {tensor.name[:100]!r} is {is_}, but the model's is {should}"
    known = {tensor.name for tensor in layout.tensors}
    for name in found:
        if name not in known:
            return f"the model has no tensor {name[:100]!r}"
    return None
