"""What is published about the events is what they are."""

import hashlib
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, Mock

import msgspec
import pytest
from jsonschema import Draft202012Validator, ValidationError
from referencing import Registry, Resource

from fedota.contracts import subjects
from fedota.events import CATALOGUE, EventData, EventType, encode, schemas
from fedota.events.problems import ParticipationRequested
from fedota.kernel.migrations import PROJECTING
from fedota.kernel.projection import Projection
from gateway.projection import PROJECTION as GATEWAY
from services.orchestrator.projection import PROJECTION as ORCHESTRATOR
from services.problems import projection as problems
from services.rounds.projection import PROJECTION as ROUNDS
from services.storage import projection as storage
from tests.unit.events.test_evolution import _ALL, example
from tests.unit.kernel.test_events import record

_DOCS = Path(__file__).parents[3] / "docs"
# SHA-256 of the schemas that are history: nothing generates them any more, and nothing may change them.
_HISTORY = {
    "ProblemCreated/1.json": "03c02f968a090c5c8864aed1624b86cde1e4c9d72d014395635e9dced3490ead",
    "ProblemCreated/2.json": "4e3f4866f76da74169dace168b9aba9360d87ae68f6d359a2c183c3bf1339cf5",
    "ProblemRevised/1.json": "3e93b9509dcf5df02843f99f5be648a76b95371de718fb22396a9ee74e333613",
    "ProblemStarted/1.json": "635f9642360498cc13e4de34fdca6182ae1312cee97c8b52f00d0aacd3d1faf0",
    "InfraSpawned/1.json": "49fe9d567c11d3a8937bcd2e98ea977c4f19a95a2fda9387c2ba3e52e6e71b1f",
    "RoundUpdated/1.json": "8605298ffe01cacd46010347a7cca3b59cc6f0e5ea75d3ab1b67fa131bfd9a38",
}


@cache
def registry() -> Registry[Any]:
    """The published schemas, by their names."""
    found = [Resource.from_contents(read(path)) for path in (_DOCS / "schemas").rglob("*.json")]
    return Registry().with_resources([(resource.id() or "", resource) for resource in found])


def read(path: Path) -> Any:
    """A document."""
    return json.loads(path.read_text())


def validator(path: str) -> Draft202012Validator:
    """The published schema at a path below `docs/schemas`."""
    schema = read(_DOCS / "schemas" / path)
    return Draft202012Validator(schema, registry=registry())


def event(type_: str, version: int) -> dict[str, Any]:
    """The example of a version, on its way."""
    row: dict[str, Any] = record(ParticipationRequested(problem_id="p", organization="o"), type=type_, schema=version)
    owner = CATALOGUE[type_].owner
    row |= {"data": example(type_, version), "subject": f"{owner}/00000000-0000-0000-0000-000000000001"}
    sent: dict[str, Any] = msgspec.json.decode(encode(row))
    return sent


def test_the_published_documents_are_what_the_events_are() -> None:
    """Whoever changes an event changes them too: run `python -m fedota.events.schemas`."""
    assert schemas.differences(_DOCS) == []


@pytest.mark.parametrize("path", sorted((_DOCS / "schemas").rglob("*.json")), ids=lambda path: path.parent.name)
def test_each_is_a_json_schema(path: Path) -> None:
    """Of the dialect that it names, with words on everything that has a name."""
    schema = read(path)
    Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == Draft202012Validator.META_SCHEMA["$id"]
    assert schema["description"] and all(part["description"] for part in schema.get("$defs", {}).values())


@pytest.mark.parametrize(("type_", "version"), _ALL)
def test_examples_are_valid(type_: str, version: int) -> None:
    """By the schema of their version, alone and in the envelope; without a field that must be there they are not."""
    data, schema = json.loads(example(type_, version)), validator(f"{type_}/{version}.json")
    schema.validate(data)
    validator("CloudEvent.json").validate(event(type_, version))
    del data["problem_id"]
    with pytest.raises(ValidationError):
        schema.validate(data)
    with pytest.raises(ValidationError):
        validator("CloudEvent.json").validate({**event(type_, version), "data": data})


@pytest.mark.parametrize(
    "wrong",
    [
        {"specversion": "0.3"},
        {"position": 0},
        {"type": "Unheard"},
        {"time": 5},
        {"causationid": None},
        {"source": "elsewhere"},
        {"data": []},
    ],
    ids=str,
)
def test_an_envelope_that_is_none_is_not_valid(wrong: dict[str, Any]) -> None:
    """The schema says what CloudEvents and the log hold to."""
    with pytest.raises(ValidationError):
        validator("CloudEvent.json").validate({**event("FilesDeleted", 1), **wrong})


class ParticipationRequestedAnew(EventData, frozen=True, kw_only=True):
    """An organization asked to take part, said better."""

    organization: str


class ParticipationRequestedLouder(EventData, frozen=True, kw_only=True):
    """An organization asked to take part."""

    organization: str
    loudness: int = 11


def test_a_version_that_is_written_down_keeps_its_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another form needs another version; better words do not."""
    shutil.copytree(_DOCS / "schemas", tmp_path / "schemas")
    schemas.write(tmp_path)
    path = tmp_path / "schemas" / "ParticipationRequested" / "1.json"
    monkeypatch.setitem(CATALOGUE, "ParticipationRequested", EventType("problems", ParticipationRequestedAnew))
    assert any(str(path) in line for line in schemas.differences(tmp_path))
    schemas.write(tmp_path)
    assert "said better" in path.read_text() and schemas.differences(tmp_path) == []

    louder = ParticipationRequestedLouder
    monkeypatch.setitem(CATALOGUE, "ParticipationRequested", EventType("problems", louder))
    written = path.read_text()
    with pytest.raises(schemas.ChangedSchemaError, match="which raises the version"):
        schemas.write(tmp_path)
    assert path.read_text() == written

    monkeypatch.setitem(CATALOGUE, "ParticipationRequested", EventType("problems", louder, (dict,)))
    schemas.write(tmp_path)
    assert schemas.differences(tmp_path) == [] and path.read_text() == written
    assert read(path.with_name("2.json"))["properties"]["loudness"]["default"] == 11


def test_history_is_neither_dropped_nor_made_up(tmp_path: Path) -> None:
    """The schema of an old version stays, and none is there of a version that was not."""
    shutil.copytree(_DOCS / "schemas", tmp_path / "schemas")
    schemas.write(tmp_path)
    (tmp_path / "schemas" / "ProblemCreated" / "1.json").rename(tmp_path / "schemas" / "ProblemCreated" / "4.json")
    missing, left_over = schemas.differences(tmp_path)
    assert "ProblemCreated/1.json is missing" in missing and "ProblemCreated/4.json is of no type" in left_over


def test_history_stays_as_it_was() -> None:
    """Whoever raises a version adds the schema that it leaves behind to the list above."""
    old = [f"{type_}/{version}.json" for type_, version in _ALL if version < CATALOGUE[type_].schema]
    digests = {name: hashlib.sha256((_DOCS / "schemas" / name).read_bytes()).hexdigest() for name in old}
    assert digests == _HISTORY


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It writes, compares, and says what is wrong, with the exit status that CI looks at."""
    monkeypatch.chdir(tmp_path)
    assert schemas.main([]) == 2
    (tmp_path / "docs").mkdir()
    assert schemas.main(["--check"]) == 1
    assert "docs/asyncapi.json is missing" in capsys.readouterr().err
    assert schemas.main([]) == 0
    assert schemas.main(["--check"]) == 1  # history cannot be made up from what there is now
    assert capsys.readouterr().err.count("\n") == len(_HISTORY)
    for name in _HISTORY:
        shutil.copy(_DOCS / "schemas" / name, tmp_path / "docs" / "schemas" / name)
    assert schemas.main(["--check"]) == 0
    (tmp_path / "docs" / "schemas" / "FilesDeleted" / "1.json").write_text("{}")
    assert schemas.main([]) == 1
    assert "FilesDeleted has another form" in capsys.readouterr().err


def asyncapi() -> Any:
    """The published AsyncAPI document."""
    return read(_DOCS / "asyncapi.json")


def test_channels_are_the_subjects_of_events() -> None:
    """One a type, where the relay publishes it."""
    addresses = {type_: channel["address"] for type_, channel in asyncapi()["channels"].items()}
    assert addresses == {type_: subjects.event(type_, "{problem_id}") for type_ in CATALOGUE}


def test_every_reference_leads_somewhere() -> None:
    """In the document itself."""
    document = asyncapi()

    def references(part: Any) -> list[str]:
        if isinstance(part, list):
            return [found for one in part for found in references(one)]
        if not isinstance(part, dict):
            return []
        own = [part["$ref"]] if isinstance(part.get("$ref"), str) else []
        return own + [found for one in part.values() for found in references(one)]

    found = references(document)
    assert found
    for reference in found:
        place = document
        for name in reference.removeprefix("#/").split("/"):
            place = place[name]


@pytest.mark.parametrize("type_", CATALOGUE)
def test_messages_are_what_is_sent(type_: str) -> None:
    """The newest example of each type is valid by the message's payload, and by that of no other type."""
    document = asyncapi()
    sent = event(type_, CATALOGUE[type_].schema)
    for name in CATALOGUE:
        payload = {**document["components"]["messages"][name]["payload"], "components": document["components"]}
        assert Draft202012Validator(payload).is_valid(sent) is (name == type_)


def acts_on(projection: Projection) -> set[str]:
    """The types that a process does anything about."""
    rows = projection.kinds or {kind.data for kind in CATALOGUE.values()} if projection.write else set()
    return {kind.__name__ for kind in {*rows, *projection.reactions}}


def test_operations_are_who_sends_and_who_acts() -> None:
    """The relay sends each type, and each process receives what its projection does something about."""
    handlers = Mock(react=AsyncMock(), write_manifest=AsyncMock())
    expected = {
        "gateway": acts_on(GATEWAY),
        "problems": acts_on(problems.projection(handlers)),
        "storage": acts_on(storage.projection(handlers)),
        "orchestrator": acts_on(ORCHESTRATOR),
        "rounds": acts_on(ROUNDS),
    }
    assert set(expected) == set(PROJECTING)
    assert {process: set(types) for process, types in schemas.RECEIVERS.items()} == expected
    found: dict[tuple[str, str], set[str]] = {}
    for name, operation in asyncapi()["operations"].items():
        process, action, type_ = name.split(".")
        assert operation["action"] == action and operation["channel"]["$ref"] == f"#/channels/{type_}"
        found.setdefault((action, process), set()).add(type_)
    receive = {("receive", process): types for process, types in expected.items()}
    assert found == {("send", "relay"): set(CATALOGUE), **receive}
