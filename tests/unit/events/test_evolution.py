"""Whatever was ever recorded can be read: an example of each version of each type, and the way from there to now."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fedota import events
from fedota.events import CATALOGUE, Event, EventData, EventType, UnknownEventError, decode, decoder, encode, to_json
from fedota.events.problems import ProblemCreated
from fedota.events.rounds import RoundUpdated
from tests.unit.kernel.test_events import record

_EXAMPLES = Path(__file__).parents[2] / "examples" / "events"
_ALL = [(type_, version) for type_, kind in CATALOGUE.items() for version in range(1, kind.schema + 1)]
_OLD = [(type_, version) for type_, version in _ALL if version < CATALOGUE[type_].schema]


def example(type_: str, version: int) -> bytes:
    """Data as it was recorded when `version` was the newest."""
    path = _EXAMPLES / type_ / f"{version}.json"
    assert path.exists(), f"{path} is missing: add data of {type_} as version {version} has it"
    return path.read_bytes()


class Grown(EventData, frozen=True, kw_only=True):
    """A type that has seen two changes."""

    words: list[str]
    count: int


def split(data: dict[str, Any]) -> dict[str, Any]:
    """1 → 2."""
    return {**data, "text": data["text"].split()}


def count(data: dict[str, Any]) -> dict[str, Any]:
    """2 → 3."""
    return {"problem_id": data["problem_id"], "words": data["text"], "count": len(data["text"])}


@pytest.fixture
def grown(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a type of three versions."""
    monkeypatch.setitem(CATALOGUE, "Grown", EventType("problems", Grown, (split, count)))
    monkeypatch.setattr(events, "decoder", decoder.__wrapped__)  # what is remembered of this type must not outlive it
    return "Grown"


@pytest.mark.parametrize(("type_", "version"), _ALL)
def test_every_version_can_be_read(type_: str, version: int) -> None:
    """As data of the type's newest class; no example is of nothing."""
    data = decoder(type_, version)(example(type_, version))
    assert type(data) is CATALOGUE[type_].data
    assert json.loads(example(type_, version))["problem_id"] == data.problem_id


@pytest.mark.parametrize("type_", CATALOGUE)
def test_the_newest_version_encodes_back_to_itself(type_: str) -> None:
    """A field that was renamed, dropped or added shows here, because the example names every field there is."""
    newest = CATALOGUE[type_].schema
    assert json.loads(to_json(decoder(type_, newest)(example(type_, newest)))) == json.loads(example(type_, newest))


@pytest.mark.parametrize("type_", CATALOGUE)
def test_an_upcast_ends_at_data_of_the_newest_form(type_: str) -> None:
    """No old version comes out with fields that its newest form does not name: `convert` would pass them over."""
    kind = CATALOGUE[type_]
    for version in range(1, kind.schema):
        recorded = json.loads(example(type_, version))
        fields = recorded
        for step in kind.upcasts[version - 1 :]:
            fields = step(fields)
        assert set(fields) <= set(kind.data.__struct_fields__)
        assert recorded == json.loads(example(type_, version)), "an upcast changes what it is given"


def test_no_example_is_of_a_version_that_there_is_not() -> None:
    """What is left over would be taken for history."""
    there = {(path.parent.name, int(path.stem)) for path in _EXAMPLES.glob("*/*.json")}
    assert there == set(_ALL)


def test_there_is_history() -> None:
    """Of a type that has changed, the old version is not forgotten."""
    assert _OLD == [
        ("ProblemCreated", 1),
        ("ProblemCreated", 2),
        ("ProblemRevised", 1),
        ("ProblemStarted", 1),
        ("InfraSpawned", 1),
        ("RoundUpdated", 1),
    ]


def test_a_problem_created_before_its_setter_was_the_actor() -> None:
    """Version 1 said the actor twice; what stands in version 2 is all of the rest."""
    old, new = (decoder("ProblemCreated", version)(example("ProblemCreated", version)) for version in (1, 2))
    assert isinstance(old, ProblemCreated) and old == new
    assert "setter" in json.loads(example("ProblemCreated", 1))


@pytest.mark.parametrize(("type_", "version"), [("ProblemCreated", 2), ("ProblemRevised", 1), ("ProblemStarted", 1)])
def test_a_plan_from_before_the_caps_caps_nothing(type_: str, version: int) -> None:
    """A run that was started under it goes on as it was agreed on."""
    plan = decoder(type_, version)(example(type_, version)).plan  # type: ignore[attr-defined]
    assert (plan.clients_per_organization, plan.examples_per_update, plan.clip_norm) == (None, None, None)
    newest = decoder(type_, CATALOGUE[type_].schema)(example(type_, CATALOGUE[type_].schema)).plan  # type: ignore[attr-defined]
    assert None not in (newest.clients_per_organization, newest.examples_per_update, newest.clip_norm)


def test_a_round_from_before_contributions_tells_none() -> None:
    """Nobody's contribution is made up from what was recorded without it."""
    old, new = (decoder("RoundUpdated", version)(example("RoundUpdated", version)) for version in (1, 2))
    assert isinstance(old, RoundUpdated) and isinstance(new, RoundUpdated)
    assert old.contributions == [] and new.contributions
    assert msgspec.structs.replace(new, contributions=[]) == old


def test_steps_follow_on_each_other(grown: str) -> None:
    """Each version takes the steps that come after it, and none before."""
    expected = Grown(problem_id="p", words=["a", "b"], count=2)
    recorded = {
        1: {"problem_id": "p", "text": "a b"},
        2: {"problem_id": "p", "text": ["a", "b"]},
        3: {"problem_id": "p", "words": ["a", "b"], "count": 2},
    }
    assert CATALOGUE[grown].schema == 3
    for version, data in recorded.items():
        assert events.decode_data(grown, version, to_json(data)) == expected


def test_an_event_says_which_version_was_recorded() -> None:
    """The envelope travels as it was written; only the data behind it is brought to the newest form."""
    row = {**record(decoder("ProblemCreated", 2)(example("ProblemCreated", 2))), "schema": 1}
    row["data"] = example("ProblemCreated", 1)
    event = decode(encode(row))
    assert isinstance(event, Event) and event.schema == 1 and isinstance(event.data, ProblemCreated)
    assert msgspec.json.decode(encode(row))["data"]["setter"] == "setter"


@pytest.mark.parametrize(("type_", "version"), [("ProblemCreated", 0), ("ProblemCreated", 4), ("Unheard", 1)])
def test_the_unknown_is_refused(type_: str, version: int) -> None:
    """A type or version from the future, or from nowhere, stops a reader instead of being skipped."""
    with pytest.raises(UnknownEventError, match=f"{type_} schema version {version}"):
        decoder(type_, version)


@pytest.mark.parametrize("data", [b"[]", b"{}", b'{"problem_id": "p", "name": 1}', b"{"])
@pytest.mark.parametrize("version", [1, 2, 3])
def test_what_is_no_such_data_is_not_read(version: int, data: bytes) -> None:
    """Old data is checked as strictly as new data."""
    with pytest.raises((msgspec.ValidationError, msgspec.DecodeError)):
        decoder("ProblemCreated", version)(data)


def test_a_decoder_is_made_once() -> None:
    """Replay decodes a hundred thousand events a second: nothing is built for each."""
    assert decoder("RoundUpdated", 2) is decoder("RoundUpdated", 2)
    assert decoder("ProblemCreated", 1) is decoder("ProblemCreated", 1)
