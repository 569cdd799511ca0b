"""Whether a file can be the model that training starts from, told from its safetensors header.

The weights themselves are not looked at, and nothing is ever unpickled. What is refused here would stop a coordinator
much later, when organizations already wait for it.
"""

import os
import tempfile
from pathlib import Path
from typing import Final

from safetensors import SafetensorError, safe_open

HEADER_LIMIT: Final = 10 * 1024**2  # bytes: some 100,000 tensors
HEAD: Final = 8 + HEADER_LIMIT  # how much of a file has to be read to judge it
_DTYPES: Final = ("F64", "F32", "F16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8")  # what numpy can add up
_DIMENSIONS: Final = 64  # numpy's own limit


def model_fault(head: bytes, size: int) -> str | None:
    """What is wrong with a file of `size` bytes that begins with `head` (at least `HEAD` bytes, or all); else None."""
    length = int.from_bytes(head[:8], "little")
    if size < 8 or length > size - 8:
        return "It is not a safetensors file: its header is cut off"
    if length > HEADER_LIMIT:
        return f"Its header claims {length} bytes; {HEADER_LIMIT} are the most that is read"
    try:
        tensors = _tensors(head[: 8 + length], size)
    except SafetensorError as error:
        return f"It is not a safetensors file: {str(error)[:200]}"
    if not tensors:
        return "It holds no tensor"
    for name, (dtype, dimensions) in tensors.items():
        if dtype not in _DTYPES:
            return f"Its tensor {name[:100]!r} has the dtype {dtype}; one of {', '.join(_DTYPES)} is needed"
        if dimensions > _DIMENSIONS:
            return f"Its tensor {name[:100]!r} has {dimensions} dimensions; {_DIMENSIONS} are the most"
    return None


def _tensors(header: bytes, size: int) -> dict[str, tuple[str, int]]:
    """The dtype and number of dimensions of each tensor.

    The package reads files: it is given a sparse one of the right size.
    """
    with tempfile.TemporaryDirectory(prefix="fedota-") as directory:
        path = Path(directory) / "header"
        path.write_bytes(header)
        os.truncate(path, size)
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            return {name: (piece.get_dtype(), len(piece.get_shape())) for name, piece in slices.items()}
