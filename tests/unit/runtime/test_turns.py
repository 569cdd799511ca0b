"""Who comes next, and how much one may hold of what is scarce."""

import asyncio

import pytest

from fedota.runtime.portions import Portions
from fedota.runtime.selector.turns import Turns


def taken(portions: Portions, *names: str) -> dict[str, int]:
    """What each has when all take as much as they get."""
    while takers := [name for name in names if portions.admits(name)]:
        portions.take(min(takers, key=portions.held))
    return {name: portions.held(name) for name in names}


@pytest.mark.parametrize(("count", "each"), [(1, {48}), (2, {27, 28}), (64, {1})])
def test_something_is_left_for_who_has_nothing(count: int, each: set[int]) -> None:
    """However greedy the others are; many organizations use all of it."""
    portions = Portions(64)
    assert set(taken(portions, *map(str, range(count))).values()) == each
    assert portions.admits("new") == (count < 64)


def waiting(turns: Turns, order: list[str], *names: str) -> list[asyncio.Task[None]]:
    """Each writes its name when its turn has come."""

    async def take(name: str) -> None:
        await turns.take(name[0])
        order.append(name)

    return [asyncio.create_task(take(name)) for name in names]


async def settled() -> None:
    """Whoever can go on has."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_turn_goes_to_who_has_fewest_and_in_order() -> None:
    """One organization's crowd that came first is not the whole queue."""
    turns, order = Turns(3), list[str]()
    for name in "xyz":
        await turns.take(name)
    waiting(turns, order, "a1", "a2", "a3", "b1", "c1", "b2")
    await settled()
    for name in "xyzabc":
        turns.give_back(name)
        await settled()
    assert order == ["a1", "b1", "c1", "a2", "b2", "a3"]


async def test_who_goes_away_takes_no_turn() -> None:
    """Neither before its turn nor in the moment in which it comes."""
    turns, order = Turns(1), list[str]()
    await turns.take("x")
    first, second, *_ = waiting(turns, order, "a1", "b1", "c1")
    await settled()
    first.cancel()
    await settled()
    turns.give_back("x")
    second.cancel()
    await settled()
    assert order == ["c1"] and second.cancelled()
    turns.give_back("c")
    await asyncio.wait_for(turns.take("d"), 1)
