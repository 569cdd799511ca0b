"""The clients that wait."""

import asyncio

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


async def test_quotas_bound_what_is_selected_of_an_organization() -> None:
    """Whoever comes first, and however many are wanted; without a quota nobody of it is."""
    pool = Pool(lambda: None)
    people = [Waiting(name, str(number)) for name, count in (("x", 5), ("y", 2), ("z", 1)) for number in range(count)]
    tasks = {who: waiting(pool, who) for who in people}
    await pool.gathered(8, 5)
    assert pool.organizations == {"x": 5, "y": 2, "z": 1}
    await pool.gathered(3, 5, {"x": 2, "y": 9})
    assert pool.select(8, ticket, {"x": 2, "y": 9, "elsewhere": 3}) == 4
    chosen = [who.organization for who, task in tasks.items() if who not in pool._waiters and await task]
    assert sorted(chosen) == ["x", "x", "y", "y"]
    assert pool.organizations == {"x": 3, "z": 1}
    assert pool.select(1, ticket, {"x": 3}) == 1
    assert pool.select(5, ticket) == 3
    assert pool.organizations == {}
    await asyncio.gather(*tasks.values())


async def test_those_beyond_their_quota_are_not_waited_for() -> None:
    """A selection that needs others gives them their time to come."""
    pool = Pool(lambda: None)
    tasks = [waiting(pool, A), waiting(pool, B)]
    await pool.gathered(2, 5)
    gathering = asyncio.create_task(pool.gathered(2, 5, {"org": 1, "other": 1}))
    await asyncio.sleep(0)
    assert not gathering.done()
    tasks.append(waiting(pool, Waiting("other", "c")))
    await gathering
    pool.dismiss({"org"})
    assert pool.organizations == {"other": 1}
    pool.dismiss()
    assert pool.organizations == {}
    await asyncio.gather(*tasks)


async def test_nobody_waits_longer_than_asked() -> None:
    """The client comes again."""
    pool = Pool(lambda: None)
    assert await pool.wait(A, 0.01) is None
    assert len(pool) == 0 and pool.organizations == {}
    await pool.gathered(1, 0.01)


async def test_who_comes_twice_waits_once() -> None:
    """Only the newer connection is answered with a ticket."""
    pool = Pool(lambda: None)
    first = waiting(pool, A)
    await pool.gathered(1, 5)
    second = waiting(pool, A)
    assert await first is None
    assert len(pool) == 1 and pool.organizations == {"org": 1}
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


async def test_who_keeps_an_update_for_a_cohort_is_not_selected_for_it_again() -> None:
    """Another selector has that update in its sum, or may be sent it: two of one client would both count."""
    pool = Pool(lambda: None)
    tasks = [asyncio.create_task(pool.wait(who, 5, kept)) for who, kept in ((A, "this"), (B, "the one before"))]
    await pool.gathered(2, 5)
    assert pool.select(2, ticket, cohort="this") == 1
    assert await tasks[1] == "ticket of b" and len(pool) == 1
    assert pool.select(2, ticket, cohort="the next") == 1
    assert await tasks[0] == "ticket of a"
