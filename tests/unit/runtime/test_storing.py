"""Checkpoints on their way into the object store."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from fedota.events.rounds import Checkpoint
from fedota.runtime.coordinator import platform
from fedota.runtime.coordinator.objects import StoreError
from fedota.runtime.coordinator.storing import DamagedError, Storing


class Store:
    """Where they go; while it is `down` nothing does."""

    def __init__(self) -> None:
        self.down = False
        self.objects: dict[str, bytes] = {}
        self.moved = asyncio.Event()

    async def store(self, key: str, body: memoryview, sha256: str) -> None:
        """Take one."""
        if self.down:
            raise StoreError("the store is down")
        assert hashlib.sha256(body).hexdigest() == sha256
        self.objects[key] = bytes(body)

    async def until_moved(self) -> None:
        """Wait for a word."""
        await asyncio.wait_for(self.moved.wait(), 5)
        self.moved.clear()


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits for its turn."""
    monkeypatch.setattr(platform, "_FIRST_DELAY", 0.001)


def storing(store: Store, tmp_path: Path) -> Storing:
    """Weights and manifests lie in the test's directory."""
    return Storing(tmp_path / "manifests", lambda sha256: tmp_path / sha256, store.store, store.moved.set)


def checkpoint(one: Storing, tmp_path: Path, round_: int) -> Checkpoint:
    """A checkpoint whose weights and manifest are there."""
    body = f"weights {round_}".encode()
    sha256 = hashlib.sha256(body).hexdigest()
    (tmp_path / sha256).write_bytes(body)
    made = Checkpoint(key=f"p/1/{round_}-{sha256[:16]}.safetensors", sha256=sha256, size=len(body))
    one.prepare(made, f"manifest {round_}".encode())
    return made


@asynccontextmanager
async def running(one: Storing) -> AsyncIterator["asyncio.Task[None]"]:
    """At work within this."""
    task = asyncio.create_task(one.run())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait({task})


async def test_checkpoints_are_stored_in_order_with_their_manifests(tmp_path: Path) -> None:
    """Each is waited for until it is there."""
    store = Store()
    one = storing(store, tmp_path)
    store.down = True
    first, second = checkpoint(one, tmp_path, 1), checkpoint(one, tmp_path, 2)
    one.add(first)
    one.add(second)
    async with running(one):
        await store.until_moved()
        assert one.trouble == "the store is down"
        assert first.key in one and second.key in one
        store.down = False
        while second.key in one:
            await store.until_moved()
    assert one.trouble == ""
    assert list(store.objects.values()) == [b"weights 1", b"manifest 1", b"weights 2", b"manifest 2"]
    assert list(store.objects)[1] == first.key.removesuffix(".safetensors") + ".json"


async def test_files_are_kept_until_it_is_known_that_they_are_stored(tmp_path: Path) -> None:
    """A coordinator that is killed in between begins with them again."""
    store = Store()
    one = storing(store, tmp_path)
    made = checkpoint(one, tmp_path, 1)
    one.add(made)
    async with running(one):
        await store.until_moved()
    assert one.digests == {made.sha256}
    other = storing(store, tmp_path)
    assert other.has_files(made)
    other.restore([made])
    assert made.key in other
    async with running(other):
        await store.until_moved()
    other.forget(made)
    assert other.digests == set() and list((tmp_path / "manifests").iterdir()) == []
    assert not other.has_files(made)


async def test_what_an_earlier_life_left_behind_is_looked_at_first(tmp_path: Path) -> None:
    """Of the right size but other bytes: it is not stored under a name that promises more."""
    store = Store()
    one = storing(store, tmp_path)
    made, gone = checkpoint(one, tmp_path, 1), checkpoint(one, tmp_path, 2)
    (tmp_path / made.sha256).write_bytes(b"w" * made.size)
    other = storing(store, tmp_path)
    assert other.has_files(made)
    other.restore([made])
    assert [path.name for path in (tmp_path / "manifests").iterdir()] == [f"1-{made.sha256[:16]}.json"]
    async with running(other) as task:
        with pytest.raises(DamagedError, match="is not the checkpoint that the journal speaks of"):
            await asyncio.wait_for(task, 5)
    assert store.objects == {}
    (tmp_path / gone.sha256).write_bytes(b"shorter")
    assert not other.has_files(gone)
