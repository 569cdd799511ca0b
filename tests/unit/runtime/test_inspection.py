"""Models that are looked through bit by bit."""

import asyncio
import hashlib
import os
from contextlib import suppress
from pathlib import Path
from time import monotonic

import numpy as np
import pytest
import safetensors.numpy

from fedota.runtime.coordinator import inspection
from fedota.runtime.coordinator.inspection import digest, not_finite
from fedota.runtime.tensors import Array, read_layout


async def test_a_digest_is_that_of_the_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many bits it is taken in; on the way it is told how far it is."""
    monkeypatch.setattr(inspection, "_TURN", 0.0)
    path, content, told = tmp_path / "model", bytes(range(256)) * 10_000, list[str]()
    path.write_bytes(content)
    assert await digest(path, told.append) == hashlib.sha256(content).hexdigest()
    assert told == [f"the model: {done} of 2.6 MB hashed" for done in ("1.0", "2.1", "2.6")]


def test_who_is_stopped_does_not_go_on_to_the_end(tmp_path: Path) -> None:
    """A process ends only when its threads do: many gigabytes would hold up a stop."""
    path = tmp_path / "model"
    path.touch()
    os.truncate(path, 8 * 10**9)

    async def stopped() -> None:
        begun = asyncio.Event()
        task = asyncio.create_task(digest(path, lambda _: begun.set()))
        await begun.wait()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    began = monotonic()
    asyncio.run(stopped())
    assert monotonic() - began < 3, "all of it takes longer"


def _spoiled(array: Array, value: float) -> Array:
    array[-1] = value
    return array


@pytest.mark.parametrize(
    ("spoiled", "found"),
    [
        ({}, None),
        ({"b": _spoiled(np.zeros(100_000, np.float32), np.nan), "c": np.full(2, np.inf, np.float32)}, "b"),
        ({"c": _spoiled(np.zeros(100_000, np.float16), -np.inf)}, "c"),
        ({"d": _spoiled(np.zeros(40_000), 1e300)}, "d"),
    ],
)
async def test_the_first_tensor_that_is_not_finite_is_found(
    tmp_path: Path, spoiled: dict[str, Array], found: str | None
) -> None:
    """Wherever in it that is; whole numbers always are."""
    path = tmp_path / "model"
    fine: dict[str, Array] = {
        "a": np.full(50_000, -1, np.int64),
        "b": np.ones(3, np.float32),
        "empty": np.zeros((0, 4)),
        "d": np.ones(9),
    }
    safetensors.numpy.save_file({**fine, **spoiled}, path)
    assert await not_finite(path, read_layout(path), lambda _: None) == found


async def test_how_far_the_search_is_is_told(tmp_path: Path) -> None:
    """Up to the end of the model."""
    path, told = tmp_path / "model", list[str]()
    safetensors.numpy.save_file({"a": np.zeros(1_000_000, np.float32)}, path)
    await not_finite(path, read_layout(path), told.append)
    assert told[-1] == "the model: 4.0 of 4.0 MB searched for NaN and infinity"
