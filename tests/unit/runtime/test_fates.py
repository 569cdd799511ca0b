"""What a coordinator remembers of updates whose cohorts are over."""

import pytest

from fedota.runtime.coordinator import fates as module
from fedota.runtime.coordinator.fates import Fates


def test_each_cohort_has_its_own() -> None:
    """Of one that was abandoned no update counts; of one that is not known nothing is said."""
    fates = Fates()
    fates.ended("one", ["a", "b"])
    fates.ended("abandoned")
    assert [fates.of("one", ticket) for ticket in "abc"] == ["counted", "counted", "left_out"]
    assert fates.of("abandoned", "a") == "left_out"
    assert fates.of("another", "a") is None


def test_only_so_many_tickets_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest cohort's always, however many they are."""
    monkeypatch.setattr(module, "_MOST_TICKETS", 3)
    fates = Fates()
    for cohort, tickets in (("one", "ab"), ("two", "c"), ("three", "d")):
        fates.ended(cohort, tickets)
    assert [fates.of(cohort, "d") for cohort in ("one", "two", "three")] == [None, "left_out", "counted"]
    fates.ended("four", "abcdef")
    assert [fates.of(cohort, "a") for cohort in ("two", "three", "four")] == [None, None, "counted"]


def test_only_so_many_cohorts_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run may be abandoned for days, attempt after attempt."""
    monkeypatch.setattr(module, "_MOST_COHORTS", 2)
    fates = Fates()
    for cohort in ("one", "two", "three"):
        fates.ended(cohort)
    assert [fates.of(cohort, "a") for cohort in ("one", "two", "three")] == [None, "left_out", "left_out"]
