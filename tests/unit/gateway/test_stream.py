"""What a reader is shown of an event, and how long everybody else waits meanwhile."""

import asyncio
from datetime import UTC, datetime
from time import thread_time
from typing import Any
from uuid import UUID

import msgspec

from fedota.events import to_json
from fedota.events.rounds import Contribution, RoundUpdated
from gateway.stream import Eyes, Item, seen

_MANY = 2000
_ID = "018f0000-0000-7000-8000-000000000000"


def report(*contributions: Contribution) -> Item:
    """A round's report as it comes from the log."""
    which: dict[str, Any] = {"problem_id": _ID, "run": 1, "report": 1, "round": 1, "attempt": 1}
    data = RoundUpdated(**which, stage="completed", goal_count=1, minimum_count=1, contributions=[*contributions])
    row: dict[str, Any] = {
        "id": UUID(int=1),
        "position": 7,
        "type": "RoundUpdated",
        "subject": f"rounds/{_ID}",
        "version": 1,
        "schema": 2,
        "time": datetime(2026, 1, 2, tzinfo=UTC),
        "actor": "service:rounds",
        "correlation": UUID(int=2),
        "causation": None,
        "traceparent": None,
        "data": to_json(data),
    }
    return Item.of(row)  # type: ignore[arg-type]


def given(count: int) -> list[Contribution]:
    """A contribution of each of so many organizations."""
    refusals = {"update_not_finite": 2, "round_over": 1}
    return [Contribution(organization=f"org {n}", updates=n, examples=n, refusals=refusals) for n in range(count)]


def of(name: str) -> Eyes:
    """The eyes of an organization."""
    return Eyes(logs=False, organization=name)


def test_each_organization_sees_its_own() -> None:
    """All that the report tells besides is there, and what was given is there for those who may see all."""
    item = report(*given(3))
    whole = msgspec.json.decode(item.body(Eyes(logs=True)))
    assert [one["organization"] for one in whole["data"]["contributions"]] == ["org 0", "org 1", "org 2"]
    for number, name in ((1, "org 1"), (2, "org 2"), (None, "org 9")):
        own = [] if number is None else [whole["data"]["contributions"][number]]
        assert msgspec.json.decode(item.body(of(name))) == {**whole, "data": {**whole["data"], "contributions": own}}
    assert report().body(of("org 1")) == report().full


def test_a_large_report_is_taken_apart_once() -> None:
    """However many organizations watch: for each of them it would keep everybody waiting for seconds."""
    item = report(*given(_MANY))
    assert len(item.full) > 200_000
    began = thread_time()
    item.body(of("org 0"))
    first = thread_time() - began
    began = thread_time()
    for number in range(1, 401):
        item.body(of(f"org {number}"))
    assert thread_time() - began < 100 * first


async def test_others_have_their_turn_between_large_events() -> None:
    """A page holds a thousand of them, and is seen by one reader in one go."""
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    large, small = [report(*given(_MANY)) for _ in range(5)], [report() for _ in range(5)]
    task = asyncio.create_task(others())
    try:
        assert await seen(small, lambda item: item.full) == [item.full for item in small]
        assert turns == 0
        assert await seen(large, lambda item: item.full) == [item.full for item in large]
        assert turns >= len(large)
    finally:
        task.cancel()
