"""Keeps the bucket: makes it once S3 answers, and removes what nobody claims.

An upload that `StoreFiles` never names (the setter went away, or a file beside it was refused) stays for a day, so that
it need not be sent again. Then it goes. What an event ever named stays, whatever happened since.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Final

import structlog

from fedota.errors import FedotaError
from fedota.kernel.event_log import EventLog
from services.storage.blobs import Blobs
from services.storage.handlers import load
from services.storage.keys import ROOT, files_prefix, is_problem_id, manifest_key
from services.storage.turns import Turns

_PAUSE: Final = 1.0  # seconds before another try
_PATIENCE: Final = 10.0  # seconds for a problem's turn
_log = structlog.get_logger(__name__)


class Sweeper:
    """Removes objects of `files/` that are older than `unclaimed` seconds and stand in no event."""

    def __init__(self, log: EventLog, blobs: Blobs, turns: Turns, *, unclaimed: float, every: float) -> None:
        self._log = log
        self._blobs = blobs
        self._turns = turns
        self._unclaimed = timedelta(seconds=unclaimed)
        self._every = every

    async def run(self) -> None:
        """Make the bucket, then sweep forever; faults of S3 and the database are waited out."""
        await self._create_bucket()
        while True:
            try:
                await self.sweep(datetime.now(UTC) - self._unclaimed)
            except FedotaError as error:
                _log.warning("sweep left for later", error=str(error))
            await asyncio.sleep(self._every)

    async def sweep(self, before: datetime) -> None:
        """Remove what was uploaded before that and never claimed."""
        for folder in await self._blobs.folders(ROOT):
            problem_id = folder.removeprefix(ROOT).rstrip("/")
            if is_problem_id(problem_id):
                with _skipped_while_busy(problem_id):
                    await self._sweep_problem(problem_id, before)

    async def _create_bucket(self) -> None:
        while True:
            try:
                return await self._blobs.create_bucket()
            except FedotaError as error:
                _log.warning("waiting for the object store", error=str(error))
                await asyncio.sleep(_PAUSE)

    async def _sweep_problem(self, problem_id: str, before: datetime) -> None:
        # in its turn nothing is being verified; and no object is replaced, as a key that has one takes no PUT
        async with self._turns.turn(problem_id, _PATIENCE):
            old = {blob.key for blob in await self._blobs.below(files_prefix(problem_id)) if blob.modified < before}
            if not old:
                return
            state = await load(self._log, problem_id)
            unclaimed = old - state.keys - {manifest_key(problem_id)}
            for key in unclaimed:
                await self._blobs.remove(key)
        if unclaimed:
            _log.info("unclaimed uploads removed", problem_id=problem_id, count=len(unclaimed))


@contextmanager
def _skipped_while_busy(problem_id: str) -> Iterator[None]:
    """A problem whose turn does not come is swept the next time: it must not keep the others from being swept."""
    try:
        yield
    except FedotaError as error:
        if error.problem.code != "timeout":
            raise
        _log.info("problem is at work, not swept", problem_id=problem_id)
