"""The notary signs, on a schedule, where the log stands, and keeps that outside of PostgreSQL.

Before it signs it computes the chain itself, from its last checkpoint to the head. Where that does not fit, or where
the log or the store is behind what it has signed, it signs nothing more and says so: only a person can know what is
right.
Run it with `python -m fedota.audit.notary`. Two of them, or a crash between any two steps, do no harm: a checkpoint's
name is its number, and the store takes each name once.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

import structlog
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedota.audit.chain import GENESIS, Chain
from fedota.audit.checkpoints import NOTHING, Checkpoint, CheckpointError, file_digest, key_id, sign, verified
from fedota.audit.diagnosis import Finding, before_the_first, diagnose
from fedota.audit.reading import Head, StoredLog, utc_text
from fedota.audit.settings import NotarySettings, read_private_key
from fedota.audit.store import Bucket, Place
from fedota.audit.verification import at_the_end
from fedota.errors import FedotaError
from fedota.kernel.database import connect_pool
from fedota.kernel.event_log import is_outage
from fedota.kernel.files import write_private
from fedota.kernel.service import Service, main, scaffold

_PAUSE: Final = 1.0  # seconds before another try, when the database or the object store is away
_FEW: Final = 3  # failures in a row that are no hiccup any more
_MEMORY: Final = "newest.txt"  # the last checkpoint that this notary has seen
_log = structlog.get_logger(__name__)


class RefusedError(Exception):
    """The notary does not sign this; the message says which position does not fit, and why."""


class _Signed(NamedTuple):
    """A checkpoint and its file."""

    checkpoint: Checkpoint
    file: bytes


class Notary:
    """Signs checkpoints; `run` until cancelled.

    `memory` is a file in which it keeps the last checkpoint that it has seen: a store that was emptied or set back
    cannot make it begin anew.
    """

    def __init__(
        self, log: StoredLog, bucket: Bucket, key: Ed25519PrivateKey, *, every: float, memory: Path | None = None
    ) -> None:
        self._log = log
        self._bucket = bucket
        self._key = key
        self._every = every
        self._memory = memory
        self._newest: _Signed | None = None
        self.refused: str | None = None
        self.failures = 0  # tries in a row that did not come to an end
        self._failure = ""
        self._good = utc_text(datetime.now(UTC))  # when it began, or a try came to an end

    @property
    def newest(self) -> Checkpoint | None:
        """The last checkpoint that is known."""
        return self._newest.checkpoint if self._newest else None

    async def check(self) -> None:
        """Raise when it refuses to sign, or could not for more than a moment."""
        if self.refused:
            raise FedotaError("unavailable", self.refused)
        if self.failures >= _FEW:
            words = f"No checkpoint could be signed since {self._good} ({self.failures} tries): {self._failure}"
            raise FedotaError("unavailable", words)

    async def run(self) -> None:
        """Sign forever. Faults of the database and the object store are waited out."""
        prepared = False
        while True:
            pause = _PAUSE
            try:
                if not prepared:
                    await self._prepare()
                    prepared = True
                await self.sign()
                self.refused, pause = None, self._every
                self.failures, self._good = 0, utc_text(datetime.now(UTC))
            except RefusedError as error:
                if self.refused != str(error):  # said once: it is looked at again each time
                    _log.critical("no checkpoint is signed", reason=str(error))
                self.refused, pause, self.failures = str(error), self._every, 0
            except Exception as error:
                if not (isinstance(error, FedotaError) or is_outage(error)):
                    raise
                self.failures, self._failure = self.failures + 1, str(error) or type(error).__name__
                _log.warning("notary tries again", error=self._failure)
            await asyncio.sleep(pause)

    async def sign(self) -> None:
        """Sign a checkpoint if the log has grown. Raises `RefusedError` when the log or the store does not fit."""
        while True:
            await self._catch_up()
            head = await self._log.head()
            await self._require_known(head)
            if self.newest and head.position == self.newest.position:
                return
            if await self._add(await self._computed(head)):
                return
            # another notary was faster: go on behind its checkpoint

    async def _prepare(self) -> None:
        await self._bucket.create()
        if self._memory is None or not self._memory.exists():
            return
        if file := self._memory.read_bytes():
            self._newest = self._own(file, f"the file {self._memory}")
        else:  # it was being written when the machine lost power: the store tells what was signed
            _log.warning("what was signed last is not known here, the file is empty", file=str(self._memory))

    async def _catch_up(self) -> None:
        """Take the newest checkpoint in the store, after a look that the one known so far is still there."""
        known = self._newest
        if known and await self._bucket.read(known.checkpoint.number) != known.file:
            raise RefusedError(
                f"Checkpoint {known.checkpoint.number} at position {known.checkpoint.position} is not in the object "
                "store any more, or not as it was signed. Find out who changed the store, and restore its checkpoints."
            )
        number = known.checkpoint.number if known else 0
        if (newest := await self._bucket.newest(after=number)) == number:
            return
        file = await self._bucket.read(newest)
        signed = self._own(file or b"", f"checkpoint {newest} in the object store")
        if signed.checkpoint.number != newest or (known and signed.checkpoint.position < known.checkpoint.position):
            raise RefusedError(f"Checkpoint {newest} in the object store is out of sequence. Run fedota audit verify.")
        self._take(signed)

    def _own(self, file: bytes, what: str) -> _Signed:
        try:
            return _Signed(verified(file, self._key.public_key()), file)
        except CheckpointError as error:
            raise RefusedError(
                f"{what[0].upper()}{what[1:]} {error}. Find out who wrote it; nothing is signed behind it."
            ) from None

    async def _require_known(self, head: Head) -> None:
        """The log must still hold the event that was signed last, with the hash that it had."""
        known = self.newest
        if head.first < 1:
            raise _refused(before_the_first(head.first))
        if known is None:
            return
        if head.position < known.position:
            raise RefusedError(
                f"The log ends at position {head.position}, but checkpoint {known.number} saw {known.position} events: "
                f"from position {head.position + 1} on the tail was cut off, or an older copy was restored."
            )
        if known.position == 0:
            return
        record = await self._log.record(known.position)
        if record is None or record.hash != known.hash:
            raise RefusedError(
                f"The event at position {known.position} is not the one that checkpoint {known.number} saw: events up "
                f"to position {known.position} were changed. Find the first one with fedota audit verify."
            )

    async def _computed(self, head: Head) -> Chain:
        """The chain up to the head, computed from the last checkpoint on."""
        known = self.newest
        chain = Chain(known.position, known.hash) if known else Chain(0, GENESIS)
        async with aclosing(self._log.pages(chain.position, head.position)) as pages:
            async for page in pages:
                if broken := chain.follow(page):
                    raise _refused(await diagnose(chain, broken, lambda after: self._log.pages(after, head.position)))
        if finding := at_the_end(chain, head):
            raise _refused(finding)
        return chain

    async def _add(self, chain: Chain) -> bool:
        """Sign where the chain stands; False when another notary has taken the number meanwhile."""
        checkpoint = Checkpoint(
            number=self.newest.number + 1 if self.newest else 1,
            position=chain.position,
            hash=chain.hash,
            time=utc_text(datetime.now(UTC)),
            previous=file_digest(self._newest.file) if self._newest else NOTHING,
            key=key_id(self._key.public_key()),
        )
        file = sign(checkpoint, self._key)
        if not await self._bucket.add(checkpoint.number, file):
            return False
        self._take(_Signed(checkpoint, file))
        _log.info("checkpoint signed", number=checkpoint.number, position=checkpoint.position)
        return True

    def _take(self, signed: _Signed) -> None:
        self._newest = signed
        if self._memory:
            write_private(self._memory, signed.file)


def _refused(finding: Finding) -> RefusedError:
    return RefusedError(f"The log does not fit at position {finding.position}: {finding.words}.")


def create_app(settings: NotarySettings) -> web.Application:
    """The notary, ready to be served. Raises `SettingsError` when its key or its store is not fit for use."""
    key, place = read_private_key(settings.key_file), settings.place
    return scaffold("notary", settings, partial(_resources, key, place))


@asynccontextmanager
async def _resources(
    key: Ed25519PrivateKey, place: Place, service: Service, settings: NotarySettings
) -> AsyncIterator[None]:
    memory = settings.directory / _MEMORY if settings.directory else None
    async with connect_pool(settings.database_url, service.name, size=3) as pool:
        with Bucket.open(place) as bucket:
            log = StoredLog(pool)
            notary = Notary(log, bucket, key, every=settings.every_seconds, memory=memory)
            service.add_check("log", log.head)
            service.add_check("s3", bucket.check)
            service.add_check("chain", notary.check)
            service.add_gauge("notary_position", "Position of the last checkpoint", lambda: _newest(notary).position)
            service.add_gauge("notary_checkpoints", "Number of the last checkpoint", lambda: _newest(notary).number)
            service.add_gauge("notary_failures", "Tries in a row that failed", lambda: float(notary.failures))
            service.add_gauge("notary_refuses", "1 while nothing is signed", lambda: float(notary.refused is not None))
            async with service.running("notary", notary.run()):
                yield


def _newest(notary: Notary) -> Checkpoint:
    nothing = Checkpoint(number=0, position=0, hash=GENESIS, time="", previous=NOTHING, key=b"")
    return notary.newest or nothing


if __name__ == "__main__":
    main("notary", NotarySettings, create_app)
