"""When clients that are sent away come back."""

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedota.runtime.selector.pace import LATEST, RATE, SOON, Pace


def pace() -> Pace:
    """The same chance each time."""
    return Pace(Random(1))


def most_in_a_second(moments: list[float]) -> int:
    """However the seconds are cut."""
    ordered = sorted(moments)
    last, most = 0, 0
    for first, moment in enumerate(ordered):
        while last < len(ordered) and ordered[last] < moment + 1:
            last += 1
        most = max(most, last - first)
    return most


@pytest.mark.parametrize("kind", ["soon", "later"])
def test_who_is_sent_away_at_once_comes_back_one_by_one(kind: str) -> None:
    """At a bounded rate, however many there are, and each at a moment of its own."""
    steering = pace()
    moments = [100.0 + getattr(steering, kind)(100.0, f"org {number % 40}") for number in range(10_000)]
    assert min(moments) == 100 + SOON
    assert most_in_a_second(moments) <= RATE / 2 + 1
    assert len(set(moments)) == len(moments)
    assert max(moments) == pytest.approx(100 + SOON + 10_000 / (RATE / 2), rel=0.2)


@pytest.mark.parametrize("kind", ["soon", "later"])
def test_one_organization_holds_nobody_else_up(kind: str) -> None:
    """However many clients it poses as: they wait one behind the other, and the others as if they were few."""
    steering = pace()
    crowd = [100.0 + getattr(steering, kind)(100.0, "crowd") for _ in range(30_000)]
    others = [100.0 + getattr(steering, kind)(100.0, f"org {number % 3}") for number in range(60)]
    assert max(crowd) == pytest.approx(100 + SOON + 30_000 / (RATE / 4), abs=1)
    assert max(others) < 100 + SOON + 4
    assert most_in_a_second(crowd + others) <= RATE / 2 + 1
    later = [100.0 + getattr(steering, kind)(100.0, "crowd") for _ in range(1000)]
    assert min(later) > 600.0, "its own queue has become no shorter"


def test_crowds_share_what_there_is() -> None:
    """Who came first has a longer queue, not a faster one, once there are others."""
    steering = pace()
    began = {"second": SOON, "third": SOON, "first": max(steering.later(0.0, "first") for _ in range(3000))}
    waits: dict[str, list[float]] = {name: [] for name in began}
    for name in [*began] * 3000:
        waits[name].append(steering.later(0.0, name))
    took = [max(waits[name]) - since for name, since in began.items()]
    assert max(took) < 1.3 * min(took)
    assert sum(3000 / seconds for seconds in took) > 0.7 * RATE / 2


def test_who_does_not_come_any_more_takes_nobody_s_part() -> None:
    """An organization counts only while its clients are to come; then the others may have all but one part again."""
    steering = pace()
    for number in range(1000):
        steering.later(0.0, f"org {number}")
    waits = [steering.later(100.0, "org") for _ in range(1000)]
    assert max(waits) == pytest.approx(SOON + 1000 / (RATE / 4), abs=1)
    assert len(steering._later._queues) == 1


def test_few_are_not_kept_waiting() -> None:
    """There is room for them at once."""
    steering = pace()
    assert [steering.soon(now, "org") for now in (0.0, 10.0, 20.0)] == [SOON, SOON, SOON]


def test_both_kinds_together_keep_the_rate() -> None:
    """And those who wait long do not hold up those who are waited for."""
    steering = pace()
    steering.round_began(0.0, 600.0)
    steering.round_began(60.0, 660.0)
    later = [70.0 + steering.later(70.0, "org") for _ in range(1000)]
    soon = [119.0 + steering.soon(119.0, "org") for _ in range(1000)]
    assert min(later) == 120.0 and min(soon) == 120.0
    assert most_in_a_second(later + soon) <= RATE + 2


def test_nobody_comes_back_before_there_can_be_work() -> None:
    """As soon as the shortest of the rounds before was over, and not after the deadline."""
    steering = pace()
    assert steering.work(5.0) == 5.0, "nothing is known yet"
    for began in (0.0, 50.0, 80.0, 120.0):
        steering.round_began(began, began + 100)
    assert steering.work(121.0) == 150.0
    assert steering.later(121.0, "org") == 29.0
    assert steering.work(200.0) == 200.0, "it takes longer than the others"
    steering.round_ended()
    assert steering.work(125.0) == 125.0, "the next one may begin at any moment"
    steering.round_began(200.0, 210.0)
    assert steering.work(201.0) == 210.0


def test_old_rounds_are_forgotten() -> None:
    """One that was short, once, does not bring everybody back early for ever."""
    steering = pace()
    now = 0.0
    for length in [1.0, *[60.0] * 9]:
        steering.round_began(now, now + 600)
        now += length
    steering.round_began(now, now + 600)
    assert steering.work(now) == now + 60


def test_nobody_is_sent_away_for_ever() -> None:
    """A crowd that would take hours is spread over the last half of one."""
    steering = Pace(Random(1), rate=0.1)
    waits = [steering.later(0.0, "org") for _ in range(2000)]
    assert max(waits) <= LATEST
    assert Counter(wait > LATEST / 2 for wait in waits[400:])[True] == 1600
    assert len(set(waits)) == len(waits)


def test_long_polls_that_begin_together_end_apart() -> None:
    """Between half of the time that one may take and all of it."""
    steering = pace()
    ends = [steering.hold() for _ in range(10_000)]
    assert min(ends) >= 12.5 and max(ends) <= 25.0
    assert most_in_a_second(ends) < 1000


@given(
    st.lists(
        st.tuples(
            st.floats(0, 5),
            st.sampled_from(["soon", "later", "round_began", "round_ended"]),
            st.sampled_from("abc"),
        ),
        max_size=300,
    )
)
def test_whatever_happens_the_rate_is_kept_and_nobody_comes_too_soon(events: list[tuple[float, str, str]]) -> None:
    """Rounds that begin and end at any time, and clients that are sent away between."""
    steering, now = Pace(Random(1), rate=4.0), 0.0
    moments: list[float] = []
    for passed, event, organization in events:
        now += passed
        match event:
            case "round_began":
                steering.round_began(now, now + 30)
            case "round_ended":
                steering.round_ended()
            case _:
                work = steering.work(now)
                moment = now + getattr(steering, event)(now, organization)
                assert moment >= now + SOON - 1e-9
                assert event == "soon" or moment >= work - 1e-9
                moments.append(moment)
    assert most_in_a_second(moments) <= 6


@given(
    st.lists(
        st.tuples(st.floats(0, 2), st.sampled_from("abcdef"), st.integers(1, 200), st.sampled_from(["soon", "later"])),
        max_size=40,
    )
)
def test_an_honest_organization_comes_back_soon_whatever_one_crowd_does(
    events: list[tuple[float, str, int, str]],
) -> None:
    """One of them sends as many as it likes, the others one client now and then; no moment is given twice."""
    steering, now = pace(), 0.0
    moments: dict[str, list[float]] = {"soon": [], "later": []}
    for passed, organization, many, kind in events:
        now += passed
        for _ in range(many if organization == "a" else 1):
            wait = getattr(steering, kind)(now, organization)
            assert organization == "a" or wait <= SOON + 2
            moments[kind].append(round(now + wait, 6))
    for given_ in moments.values():
        assert len(set(given_)) == len(given_) and most_in_a_second(given_) <= RATE / 2 + 1
