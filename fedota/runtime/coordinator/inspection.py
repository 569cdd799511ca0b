"""Models looked through bit by bit: gigabytes hold up neither a stop nor whoever asks how far it is."""

import asyncio
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any, Final

from fedota.runtime import aggregation
from fedota.runtime.places import PIECE, opened
from fedota.runtime.tensors import Layout

Tell = Callable[[str], None]  # hears in words what is being done, with how far it is
_TURN: Final = 0.1  # seconds at a time in a thread, which cannot be stopped


def portion(done: int, size: int) -> str:
    """Bytes in words: `1.2 of 40.0 MB`."""
    return f"{done / 1e6:.1f} of {size / 1e6:.1f} MB"


async def digest(path: Path, tell: Tell) -> str:
    """The SHA-256 of a model's file, in hex."""
    size, sha256 = path.stat().st_size, hashlib.sha256()
    await _through(_hashed(path, sha256), lambda done: tell(f"the model: {portion(done, size)} hashed"))
    return sha256.hexdigest()


async def not_finite(path: Path, layout: Layout, tell: Tell) -> str | None:
    """The first tensor with NaN, an infinity or a number too large to be summed; None when there is none."""
    size, found = layout.size, list[str]()
    looked = _looked_at(path, layout, found)
    await _through(looked, lambda done: tell(f"the model: {portion(done, size)} searched for NaN and infinity"))
    return found[0] if found else None


def _hashed(path: Path, sha256: Any) -> Iterator[int]:
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            sha256.update(piece)
            yield len(piece)


def _looked_at(path: Path, layout: Layout, found: list[str]) -> Iterator[int]:
    with opened(path) as place:
        weights = aggregation.Weights(layout, place)
        for tensor in layout.tensors:
            for _, values in weights.pieces(tensor):
                if aggregation.not_finite({tensor.name: values}):
                    found.append(tensor.name)
                    return
                yield values.nbytes


async def _through(work: Iterator[int], told: Callable[[int], None]) -> None:
    """Do all of the work, which gives how many bytes each step was over."""
    done = 0
    while more := await asyncio.to_thread(_for_a_while, work):
        done += more
        told(done)


def _for_a_while(work: Iterator[int]) -> int:
    """How many bytes were done with; 0 at the end."""
    until, done = monotonic() + _TURN, 0
    for count in work:
        done += count
        if monotonic() > until:
            break
    return done
