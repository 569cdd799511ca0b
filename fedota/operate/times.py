"""Times as people type them."""

import re
from datetime import UTC, datetime, time, timedelta
from typing import Final

import click

_AGO: Final = re.compile(r"(\d{1,6})\s*(s|m|h|d|w)(?:\s+ago)?")
_CLOCK: Final = re.compile(r"([01]?\d|2[0-3]):([0-5]\d)(?::([0-5]\d))?")
_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_FORMS: Final = "2026-11-24, 2026-11-24T10:30, 10:30 (the last time it was that) or 15m (ago; s, m, h, d, w)"


def parse(text: str, now: datetime) -> datetime:
    """The moment that `text` means, seen from `now`, in UTC; without a time zone, that of the clocks here is meant.

    Raises `ValueError`, which says what is understood.
    """
    try:
        return _meant(text.strip(), now).astimezone(UTC)  # where it may lie before the year 1, or after 9999
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is no time that is understood here. Give one like {_FORMS}.") from None


def _meant(words: str, now: datetime) -> datetime:
    if ago := _AGO.fullmatch(words):
        return now - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
    if clock := _CLOCK.fullmatch(words):
        hour, minute, second = (int(part or 0) for part in clock.groups())
        return _last(time(hour, minute, second), now)
    # without a zone it becomes one of here, as the clocks were or will be set on that day
    return datetime.fromisoformat(words)


def _last(clock: time, now: datetime) -> datetime:
    """The last time that the clocks here showed this."""
    today = now.astimezone().date()
    moment = datetime.combine(today, clock).astimezone()
    return moment if moment <= now else datetime.combine(today - timedelta(days=1), clock).astimezone()


def moment(_: click.Context, __: click.Parameter, text: str | None) -> datetime | None:
    """A time on the command line: what the option's callback makes of it."""
    if text is None:
        return None
    try:
        return parse(text, datetime.now(UTC))
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def rfc3339(moment: datetime) -> str:
    """As the gateway takes it."""
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")
