"""Over how long those are spread that found no place."""

import pytest

from fedota.runtime.selector.crowding import Crowding


def taken(every: float, *, begun: float = 100.0, count: int = 20) -> Crowding:
    """So many updates, one behind the other."""
    crowding = Crowding()
    crowding.begins(begun)
    for number in range(count):
        crowding.taken(begun + every * (number + 1))
    return crowding


def test_before_anything_is_known_they_are_spread_over_some_seconds() -> None:
    """The first updates of all."""
    assert Crowding().seconds(1000) == 5


@pytest.mark.parametrize(("every", "left", "seconds"), [(0.004, 436, 2), (0.5, 20, 10), (0.001, 3, 1), (0.1, 0, 1)])
def test_they_come_back_as_fast_as_they_are_taken(every: float, left: int, seconds: int) -> None:
    """Small updates of many soon, large ones later."""
    assert taken(every).seconds(left) == seconds


def test_nobody_is_sent_away_for_long() -> None:
    """However slow the others are."""
    assert taken(30.0).seconds(1000) == 60


def test_the_time_between_two_rounds_tells_nothing() -> None:
    """Training took an hour; updates are as fast as before."""
    crowding = taken(0.01)
    crowding.begins(4000.0)
    crowding.taken(4000.01)
    assert crowding.seconds(90) == 1


def test_the_latest_updates_count() -> None:
    """A model that grew, or a network that became slow."""
    crowding = taken(0.01, count=100)
    for number in range(64):
        crowding.taken(101.0 + number + 1)
    assert crowding.seconds(10) == 10
