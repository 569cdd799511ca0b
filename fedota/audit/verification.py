"""The audit of a log: its chain, its head and its streams from the first event on, against every checkpoint.

Events and checkpoints are read side by side, once, a page at a time.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Protocol

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedota.audit.chain import Chain, Record
from fedota.audit.checkpoints import Checkpoint, Sequence
from fedota.audit.diagnosis import Finding, diagnose
from fedota.audit.reading import BEFORE_ALL, Gap, Head
from fedota.audit.store import Checkpoints


class Log(Protocol):
    """What is audited."""

    async def head(self) -> Head:
        """What it says of its end."""

    def pages(self, after: int, until: int) -> AsyncGenerator[list[Record], None]:
        """Its events past `after` up to and including `until`, in order."""

    async def count(self, until: int) -> int:
        """How many rows there are up to `until`."""

    async def unguarded(self) -> list[str]:
        """What of its tables is not as it was made."""

    async def gap(self, until: int) -> Gap | None:
        """Where the versions of a stream do not count 1, 2, 3, …."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What an audit found; `findings` is empty when everything fits.

    Everything up to `verified` fits. Up to `covered` a checkpoint says so too: the one of number `checkpoint`.
    """

    findings: list[Finding]
    head: int
    verified: int
    covered: int
    checkpoint: int
    checkpoints: int


async def verify(
    log: Log, checkpoints: Checkpoints, key: Ed25519PublicKey, progress: Callable[[int, int], None]
) -> Report:
    """Audit the log; `progress` hears how far it is, and of how many."""
    newest = await checkpoints.newest()  # before the head: a checkpoint that is made meanwhile may be past that
    head = await log.head()
    sequence = Sequence(key)
    async with aclosing(_signed(checkpoints, newest, sequence)) as signed:
        audit = _Audit(log, head, signed)
        finding = await audit.run(progress)
        async for _ in signed:
            pass  # what is past the first break is still looked at: is it all signed, and in sequence?
    findings = [finding] if finding else []
    if sequence.wrong:
        kind, number, words = sequence.wrong
        findings.append(Finding(kind=kind, checkpoint=number, words=words))
    elif not sequence.count:
        words = "there is no checkpoint at all: they were deleted, or the notary has never run"
        findings.append(Finding(kind="checkpoint_missing", checkpoint=1, words=words))
    if changed := await log.unguarded():
        findings.append(Finding(kind="guards", words=f"of the tables in the schema fedota, {'; '.join(changed)}"))
    good = audit.good
    return Report(
        findings=findings,
        head=head.position,
        verified=audit.chain.position,
        covered=good.position if good else 0,
        checkpoint=good.number if good else 0,
        checkpoints=sequence.count,
    )


async def _signed(checkpoints: Checkpoints, until: int, sequence: Sequence) -> AsyncGenerator[Checkpoint, None]:
    async for file in checkpoints.files(until):
        if checkpoint := sequence.take(file.number, file.content):
            yield checkpoint


class _Audit:
    """Walks along the log, from one checkpoint to the next."""

    def __init__(self, log: Log, head: Head, signed: AsyncIterator[Checkpoint]) -> None:
        self._log = log
        self._head = head
        self._end = max(head.position, head.last)
        self._signed = signed
        self._next: Checkpoint | None = None
        self.chain = Chain()
        self.good: Checkpoint | None = None  # the last checkpoint that the log agrees with

    async def run(self, progress: Callable[[int, int], None]) -> Finding | None:
        """The first thing that does not fit."""
        self._next = await anext(self._signed, None)
        if finding := await self._meet():
            return finding
        async with aclosing(self._log.pages(BEFORE_ALL, self._end)) as pages:
            async for page in pages:
                if finding := await self._page(page):
                    return finding
                progress(self.chain.position, self._end)
        return self._at_the_end() or await self._rows() or await self._streams()

    async def _page(self, page: list[Record]) -> Finding | None:
        first = page[0].position
        while page:
            count = self._next.position - first + 1 if self._next else len(page)
            if broken := self.chain.follow(page[:count]):
                return await diagnose(self.chain, broken, lambda after: self._log.pages(after, self._end))
            if finding := await self._meet():
                return finding
            page, first = page[count:], first + count
        return None

    async def _meet(self) -> Finding | None:
        """Compare with the checkpoints of this position."""
        while self._next and self._next.position == self.chain.position:
            if self._next.hash != self.chain.hash:
                return self._rewritten(self._next)
            self.good = self._next
            self._next = await anext(self._signed, None)
        return None

    def _rewritten(self, checkpoint: Checkpoint) -> Finding:
        first = self.good.position + 1 if self.good else 1
        return Finding(
            kind="rewritten",
            position=first,
            checkpoint=checkpoint.number,
            words=f"the chain fits in itself, but not checkpoint {checkpoint.number} of {checkpoint.time}: "
            f"events were changed between position {first} and position {checkpoint.position}, and all hashes after "
            "them made anew",
        )

    def _at_the_end(self) -> Finding | None:
        if self._next is None:
            return at_the_end(self.chain, self._head)
        position, checkpoint = self.chain.position, self._next
        return Finding(
            kind="truncated",
            position=position + 1,
            checkpoint=checkpoint.number,
            words=f"the log ends at position {position}, but checkpoint {checkpoint.number} of {checkpoint.time} saw "
            f"{checkpoint.position} events: the tail was cut off, or an older copy restored",
        )

    async def _rows(self) -> Finding | None:
        extra = await self._log.count(self._end) - self._end
        if not extra:
            return None
        words = f"behind event {self._end} there are rows without a place of their own in the log: {extra}"
        return Finding(kind="inserted", position=self._end + 1, words=words)

    async def _streams(self) -> Finding | None:
        gap = await self._log.gap(self._end)
        if gap is None:
            return None
        words = f"version {gap.version} of the stream {gap.subject} does not follow the version before it"
        return Finding(kind="versions", position=gap.position, words=words)


def at_the_end(chain: Chain, head: Head) -> Finding | None:
    """Whether the head row says what the chain says, at the end of the log."""
    position = chain.position
    if head.position > position:
        words = f"the log ends at position {position}, but its head row counts {head.position}: the tail was cut off"
        return Finding(kind="truncated", position=position + 1, words=words)
    if max(head.last, position) > head.position:
        words = f"the head row is at position {head.position}, but there are events up to {max(head.last, position)}"
        return Finding(kind="head", position=head.position + 1, words=words)
    if head.hash != chain.hash:
        words = f"the head row does not hold the hash of event {position}, which is the last one"
        return Finding(kind="head", position=position, words=words)
    return None
