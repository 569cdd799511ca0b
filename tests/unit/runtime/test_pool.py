"""The clients that wait, and the buffers for what they send."""

import asyncio

from fedota.runtime.selector.buffers import Buffers
from fedota.runtime.selector.pool import Pool, Waiting

A, B = Waiting("org", "a"), Waiting("org", "b")


def ticket(who: Waiting) -> str:
    """A ticket that tells whose it is."""
    return f"ticket of {who.client}"


def waiting(pool: Pool, who: Waiting, seconds: float = 5) -> "asyncio.Task[str | None]":
    """Somebody who waits."""
    return asyncio.create_task(pool.wait(who, seconds))


async def test_those_who_wait_are_selected() -> None:
    """As many as are wanted, or as are there."""
    changes: list[int] = []
    pool = Pool(lambda: changes.append(len(pool)))
    tasks = [waiting(pool, A), waiting(pool, B)]
    await pool.gathered(2, 5)
    assert len(pool) == 2
    assert pool.select(5, ticket) == 2
    assert [await task for task in tasks] == ["ticket of a", "ticket of b"]
    assert len(pool) == 0 and changes[-1] == 0
    assert pool.select(1, ticket) == 0


async def test_nobody_waits_longer_than_asked() -> None:
    """The client comes again."""
    pool = Pool(lambda: None)
    assert await pool.wait(A, 0.01) is None
    assert len(pool) == 0
    await pool.gathered(1, 0.01)


async def test_who_comes_twice_waits_once() -> None:
    """Only the newer connection is answered with a ticket."""
    pool = Pool(lambda: None)
    first = waiting(pool, A)
    await pool.gathered(1, 5)
    second = waiting(pool, A)
    assert await first is None
    assert len(pool) == 1
    assert pool.select(2, ticket) == 1
    assert await second == "ticket of a"


async def test_who_goes_away_is_not_selected() -> None:
    """A closed connection ends the waiting."""
    pool = Pool(lambda: None)
    gone = waiting(pool, A)
    await pool.gathered(1, 5)
    gone.cancel()
    await asyncio.wait({gone})
    assert len(pool) == 0 and pool.select(1, ticket) == 0


async def test_all_are_dismissed() -> None:
    """When there is nothing left to wait for."""
    pool = Pool(lambda: None)
    tasks = [waiting(pool, A), waiting(pool, B)]
    await pool.gathered(2, 5)
    pool.dismiss()
    assert await asyncio.gather(*tasks) == [None, None]


async def test_buffers_are_bounded_and_used_again() -> None:
    """Whoever comes when all are in use waits."""
    buffers = Buffers(200 * 1024**2)
    assert buffers.count == 2
    assert (Buffers(10).count, Buffers(10**12).count) == (32, 2)
    small = Buffers(10)
    small._turns = asyncio.Semaphore(1)
    async with small.one() as first:
        other = asyncio.create_task(_use(small))
        await asyncio.sleep(0)
        assert not other.done()
        first[0] = 42
    assert await other == 42


async def _use(buffers: Buffers) -> int:
    async with buffers.one() as buffer:
        return buffer[0]
