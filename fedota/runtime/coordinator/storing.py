"""Checkpoints on their way from the coordinator's own disk into the object store: in order, never in a round's way."""

import asyncio
import hashlib
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import msgspec
import structlog

from fedota.errors import FedotaError
from fedota.events.rounds import Checkpoint
from fedota.runtime.coordinator.objects import StoreError
from fedota.runtime.coordinator.platform import insist
from fedota.runtime.places import file_sha256
from fedota.runtime.sending import mapped

_RETRIED: Final = (StoreError, FedotaError, msgspec.DecodeError)
Store = Callable[[str, memoryview, str], Awaitable[None]]  # a key, what is to be there, its SHA-256
_log = structlog.get_logger(__name__)


class DamagedError(Exception):
    """A checkpoint's file is not what the journal says; only the log can be believed."""


class Storing:
    """`moved` is called when one has arrived, and when another reason is found why it does not: `trouble`.

    The weights of a checkpoint are read from `weights(sha256)`, its manifest lies in `directory`. Both are kept until
    it is `forget`ten: an earlier life may have stored it and not known.
    """

    def __init__(
        self,
        directory: Path,
        weights: Callable[[str], Path],
        store: Store,
        moved: Callable[[], None],
    ) -> None:
        self.trouble = ""  # why the first one is not stored yet
        self._directory = directory
        self._weights = weights
        self._store_object = store
        self._moved = moved
        self._waiting: deque[Checkpoint] = deque()
        self._kept: dict[str, Checkpoint] = {}
        self._restored: set[str] = set()
        self._pushed = asyncio.Event()

    def __contains__(self, key: str) -> bool:
        """Whether a checkpoint is not stored yet."""
        return any(one.key == key for one in self._waiting)

    @property
    def digests(self) -> set[str]:
        """The weights that are still needed here."""
        return {one.sha256 for one in self._kept.values()}

    def prepare(self, checkpoint: Checkpoint, manifest: bytes) -> None:
        """Have the manifest on disk, before anything says that the checkpoint is there."""
        self._directory.mkdir(mode=0o700, exist_ok=True)
        self._manifest(checkpoint).write_bytes(manifest)

    def add(self, checkpoint: Checkpoint) -> None:
        """Store it, after those that came before."""
        self._waiting.append(checkpoint)
        self._kept[checkpoint.key] = checkpoint
        self._pushed.set()

    def forget(self, checkpoint: Checkpoint) -> None:
        """It is stored, and that is recorded."""
        self._kept.pop(checkpoint.key, None)
        self._manifest(checkpoint).unlink(missing_ok=True)

    def restore(self, checkpoints: list[Checkpoint]) -> None:
        """An earlier life left these behind; what else lies in the directory is of no use."""
        self._restored = {one.key for one in checkpoints}
        for one in checkpoints:
            self.add(one)
        needed = {self._manifest(one) for one in checkpoints}
        for path in set(self._directory.glob("*.json")) - needed:
            path.unlink()

    def has_files(self, checkpoint: Checkpoint) -> bool:
        """Whether weights and manifest lie here, as far as their sizes tell."""
        weights = self._weights(checkpoint.sha256)
        return weights.is_file() and weights.stat().st_size == checkpoint.size and self._manifest(checkpoint).is_file()

    async def run(self) -> None:
        """Store, for ever. Raises `DamagedError` when a file that an earlier life left behind is not whole."""
        while True:
            self._pushed.clear()
            if not self._waiting:
                await self._pushed.wait()
                continue
            await self._store(self._waiting[0])
            self._waiting.popleft()
            self.trouble = ""
            self._moved()

    async def _store(self, one: Checkpoint) -> None:
        path, manifest = self._weights(one.sha256), self._manifest(one)
        if one.key in self._restored and await asyncio.to_thread(file_sha256, path) != one.sha256:
            raise DamagedError(f"{path} is not the checkpoint that the journal speaks of")
        told = manifest.read_bytes()
        await self._insist(one.key, mapped(path), one.sha256)
        await self._insist(f"{one.key.removesuffix('.safetensors')}.json", memoryview(told), _sha256(told))

    async def _insist(self, key: str, body: memoryview, sha256: str) -> None:
        def trouble(why: str) -> None:
            _log.warning("a checkpoint is not stored yet", key=key, error=why)
            self.trouble = why
            self._moved()

        await insist(lambda: self._store_object(key, body, sha256), retried=_RETRIED, trouble=trouble)

    def _manifest(self, checkpoint: Checkpoint) -> Path:
        return self._directory / Path(checkpoint.key).with_suffix(".json").name


def _sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
