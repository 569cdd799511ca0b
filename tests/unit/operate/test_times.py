"""Times as people type them."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime

import click
import pytest

from fedota.operate.times import moment, parse, rfc3339

NOW = datetime(2026, 11, 24, 9, 30, tzinfo=UTC)  # 10:30 in Zurich


@pytest.fixture(autouse=True)
def _zurich(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The clocks here are an hour ahead in winter, two in summer."""
    monkeypatch.setenv("TZ", "Europe/Zurich")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("2026-11-24", "2026-11-23T23:00:00Z"),
        ("2026-07-01", "2026-06-30T22:00:00Z"),  # as the clocks were on that day, not as they are now
        ("2026-11-24 10:15", "2026-11-24T09:15:00Z"),
        ("2026-11-24T10:15:30.5", "2026-11-24T09:15:30.500000Z"),
        ("2026-11-24T10:15:00Z", "2026-11-24T10:15:00Z"),
        ("2026-11-24T10:15:00+05:00", "2026-11-24T05:15:00Z"),
        ("10:30", "2026-11-24T09:30:00Z"),
        ("10:31", "2026-11-23T09:31:00Z"),  # the last time it was that
        ("7:05:10", "2026-11-24T06:05:10Z"),
        ("15m", "2026-11-24T09:15:00Z"),
        ("90 s ago", "2026-11-24T09:28:30Z"),
        ("2h", "2026-11-24T07:30:00Z"),
        ("1d", "2026-11-23T09:30:00Z"),
        (" 1w ", "2026-11-17T09:30:00Z"),
    ],
)
def test_what_is_understood(text: str, meant: str) -> None:
    """A day, a clock, a time with or without a zone, a time ago: in the zone of the clocks here."""
    assert rfc3339(parse(text, NOW)) == meant


@pytest.mark.parametrize("text", ["", "now", "25:00", "10:61", "2026-13-01", "15", "15 years", "-5m", "0001-01-01"])
def test_what_is_not(text: str) -> None:
    """It is said with examples of what is."""
    with pytest.raises(ValueError, match="15m"):
        parse(text, NOW)


@pytest.mark.parametrize("text", ["9999-12-31T23:59:59.999999-23:00", "0001-01-01T00:00:00+23:00", "999999w"])
def test_what_no_clock_shows_is_no_time_either(text: str) -> None:
    """In UTC it would lie before the first year, or after the last one that there are numbers for."""
    with pytest.raises(click.BadParameter, match="15m"):
        moment(click.Context(click.Command("list")), click.Option(["--since"]), text)
