"""What happened to a log where its chain breaks: an edit, a deletion, an insertion, a change of places.

The log may be read again from there to its end, to find where an event went; the hashes that were stored say what
belonged where.
"""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Final

import msgspec

from fedota.audit.chain import Chain, Record, digest, fits, is_whole

Read = Callable[[int], AsyncGenerator[list[Record], None]]  # pages of the events past a position
_LONGEST: Final = 1000  # deleted or inserted events in a row that are recognized as such


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """Something that does not fit: its kind (docs/audit.md has the list), where, and what happened in words.

    `position` is the first position that does not fit, None where it is about a checkpoint; then `checkpoint` is its
    number.
    """

    kind: str
    words: str
    position: int | None = None
    checkpoint: int | None = None


async def diagnose(chain: Chain, record: Record, read: Read) -> Finding:
    """What happened at the first record that does not fit behind `chain`."""
    position = chain.position + 1
    if record.position > position:
        return _missing(position, record.position - 1)
    if record.position < 1:
        return before_the_first(record.position)
    if record.position < position:
        return Finding(kind="inserted", position=record.position, words=f"position {record.position} is there twice")
    following = await _next(read, position)
    return (
        _not_whole(record)
        or await _moved(chain, record, read)
        or _closed_up(record, following)
        or _pushed_in(chain, record)
        or _edited(chain, record, following)
    )


def before_the_first(position: int) -> Finding:
    """An event is at a position where none can be."""
    words = f"there is an event at position {position}, but the first one is at position 1"
    return Finding(kind="inserted", position=position, words=words)


def _missing(first: int, last: int) -> Finding:
    which = f"event {first} is" if first == last else f"events {first} to {last} are"
    return Finding(kind="deleted", position=first, words=f"{which} missing: a deletion")


async def _next(read: Read, position: int) -> Record | None:
    async with aclosing(_each(read, position)) as records:
        async for record in records:
            return record
    return None


async def _each(read: Read, after: int) -> AsyncGenerator[Record, None]:
    async with aclosing(read(after)) as pages:
        async for page in pages:
            for record in page:
                yield record


def _not_whole(record: Record) -> Finding | None:
    if is_whole(record):
        return None
    return Finding(
        kind="edited", position=record.position, words=f"event {record.position} was edited: a field has a line break"
    )


async def _moved(chain: Chain, record: Record, read: Read) -> Finding | None:
    """The event that belongs here is found further on: it changed places with this one, or this one was put in."""
    position, before = record.position, chain.hash
    last = record  # the one before, in the search
    async with aclosing(_each(read, position)) as records:
        async for found in records:
            own = digest(found, before, position)
            if own not in (found.hash, record.hash):
                last = found
                continue
            ahead = await _next(read, found.position)
            return _changed_places(record, found, last, own) or _put_in(record, found, ahead, own)
    return None


def _changed_places(record: Record, found: Record, last: Record, own: bytes) -> Finding | None:
    """Whether this event is the one that belongs where its own was found; `last` is the one before that place."""
    before = own if found.position == record.position + 1 else last.hash
    if digest(record, before, found.position) not in (record.hash, found.hash):
        return None
    words = f"events {record.position} and {found.position} have changed places"
    return Finding(kind="reordered", position=record.position, words=words)


def _put_in(record: Record, found: Record, ahead: Record | None, own: bytes) -> Finding:
    """Whether all that follows was pushed back as well."""
    first, last = record.position, found.position - 1
    if ahead is not None and digest(ahead, own, first + 1) != ahead.hash:
        words = f"the event that belongs at position {first} is at position {found.position}"
        return Finding(kind="reordered", position=first, words=words)
    which = f"event {first} was" if first == last else f"events {first} to {last} were"
    return Finding(kind="inserted", position=first, words=f"{which} put in, later ones pushed back: an insertion")


def _closed_up(record: Record, following: Record | None) -> Finding | None:
    """Events were deleted and the later ones numbered anew to hide it: they fit at the positions that they had."""
    if following is None or following.position != record.position + 1:
        return None
    for count in range(1, _LONGEST + 1):
        if digest(following, record.hash, following.position + count) == following.hash:
            words = f"at position {record.position} {count} deleted, and later ones numbered anew to hide it"
            return Finding(kind="deleted", position=record.position, words=words)
    return None


def _pushed_in(chain: Chain, record: Record) -> Finding | None:
    """The event before was put in, with a hash that fits: this one fits in its place."""
    if chain.before is None or digest(record, chain.before, chain.position) != record.hash:
        return None
    words = f"event {chain.position} was put in, later ones pushed back: an insertion"
    return Finding(kind="inserted", position=chain.position, words=words)


def _edited(chain: Chain, record: Record, following: Record | None) -> Finding:
    position = record.position
    if following is not None and fits(following, digest(record, chain.hash)):
        words = f"the hash of event {position} was edited"
    elif following is not None and not fits(following, record.hash):
        words = f"event {position} was edited, and what follows it too"
    elif chain.before is None:
        words = f"event {position} was edited"
    else:
        words = f"event {position} was edited (or the one before it, with a new hash that fits)"
    return Finding(kind="edited", position=position, words=words)
