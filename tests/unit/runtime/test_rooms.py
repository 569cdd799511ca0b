"""A room is used again only when nobody can see what is written there."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedota.runtime import rooms as rooms_module
from fedota.runtime.rooms import Rooms

_SIZE = 4096
_HOLDERS: list[Callable[[memoryview], Any]] = [
    lambda view: view,
    lambda view: view[8:16],
    lambda view: np.frombuffer(view, np.float32),
    lambda view: np.frombuffer(view[8:], np.float64).reshape(-1, 1)[2:],
    lambda view: {"deep": [memoryview(view)]},
]


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0])


def test_a_room_that_nobody_holds_is_used_again() -> None:
    """What its last holder left is in it."""
    rooms = Rooms()
    first = _address(rooms.room(_SIZE))
    assert [_address(rooms.room(_SIZE)) for _ in range(3)] == [first] * 3


@pytest.mark.parametrize("hold", _HOLDERS)
def test_a_room_of_which_somebody_holds_a_part_is_not(hold: Callable[[memoryview], Any]) -> None:
    """Whatever it is that they hold; and it is used again once they let go."""
    rooms = Rooms()
    first = _address(view := rooms.room(_SIZE))
    held = hold(view)
    del view
    other = rooms.room(_SIZE)
    assert _address(other) != first
    del held
    assert _address(rooms.room(_SIZE)) == first


def test_no_more_are_held_than_was_said() -> None:
    """Who asks for more gets what is given back afterwards."""
    rooms = Rooms(2)
    views = [rooms.room(_SIZE) for _ in range(4)]
    held = {_address(view) for view in views[:2]}
    del views
    again = [rooms.room(_SIZE) for _ in range(2)]
    assert {_address(view) for view in again} == held
    assert _address(rooms.room(_SIZE)) not in held


def test_rooms_of_another_size_are_given_back() -> None:
    """Nothing is held for a model that is not trained any more."""
    rooms = Rooms(2)
    small = [rooms.room(_SIZE), rooms.room(_SIZE)]
    del small
    large = _address(rooms.room(2 * _SIZE))
    assert len(rooms.room(2 * _SIZE)) == 2 * _SIZE
    assert _address(rooms.room(2 * _SIZE)) == large


def test_very_large_ones_are_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are worth their making."""
    monkeypatch.setattr(rooms_module, "_LARGEST", _SIZE - 1)
    rooms = Rooms()
    view = rooms.room(_SIZE)
    view[0] = 1
    assert not rooms._held
