"""The events' schemas as documents: `python -m fedota.events.schemas` writes them, with `--check` it compares them.

`docs/schemas/<type>/<version>.json` is the JSON Schema of one version of a type's data, `docs/schemas/CloudEvent.json`
that of the envelope, `docs/asyncapi.json` says which subject carries which event, who sends it and who acts on it.
"""

import inspect
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from fedota.events import CATALOGUE
from fedota.events.envelope import CloudEvent

Document = dict[str, Any]
SUBJECT: Final = "fedota.events.{type}.{problem_id}"
SENDER: Final = "relay"
EVERY: Final = tuple(CATALOGUE)
# Which process acts on which events. Each of them is handed all, because it keeps a position in the whole log.
RECEIVERS: Final[dict[str, tuple[str, ...]]] = {
    "gateway": EVERY,
    "problems": ("RoundUpdated", "InfraFailed"),
    "storage": ("FilesStored", "FilesDeleted"),
    "orchestrator": (
        *("ProblemStarted", "ProblemStopped", "ProblemCompleted"),
        *("InfraSpawned", "InfraFailed", "InfraDegraded", "InfraRecovered", "InfraStopped"),
    ),
    "rounds": (
        *("ProblemStarted", "ProblemStopped", "ProblemCompleted"),
        *("ParticipationApproved", "ParticipationRevoked"),
    ),
}
_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
_UUID: Final = {"type": "string", "format": "uuid"}
_WORDS: Final = frozenset({"title", "description"})  # what may be said better without another version


class ChangedSchemaError(Exception):
    """A type's data has another form than its version had when it was written down."""


def data_schema(type_: str) -> Document:
    """The JSON Schema of the newest version of a type's data."""
    kind = CATALOGUE[type_]
    _, parts = _components([kind.data], "#/$defs/{name}")
    whole = parts.pop(kind.data.__name__)
    document = {"$schema": _DIALECT, "$id": schema_id(type_, kind.schema), **whole}
    return {**document, "$defs": parts} if parts else document


def schema_id(type_: str, version: int) -> str:
    """The name by which schemas refer to that of a version of a type's data."""
    return f"urn:fedota:schema:{type_}:{version}"


def envelope_schema() -> Document:
    """The JSON Schema of a whole event on its way: the envelope, and in it the data of its type and version."""
    return {"$schema": _DIALECT, "$id": "urn:fedota:schema:CloudEvent", **_envelope(), "allOf": list(_data_rules())}


def asyncapi() -> Document:
    """The AsyncAPI 3.0 document of what goes through NATS."""
    _, schemas = _components([kind.data for kind in CATALOGUE.values()], "#/components/schemas/{name}")
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Fedota events",
            "version": "1.0.0",
            "description": "Every fact of the platform, as the relay copies it from the log into the JetStream stream "
            "FEDOTA. The stream's sequence is the event's position in the log.",
        },
        "defaultContentType": "application/json",
        "channels": {type_: _channel(type_) for type_ in CATALOGUE},
        "operations": dict(_operations()),
        "components": {
            "messages": {type_: _message(type_) for type_ in CATALOGUE},
            "parameters": {"problem_id": {"description": "The problem that the event is about: a UUID."}},
            "schemas": {"CloudEvent": _envelope(), **schemas},
        },
    }


def documents() -> dict[str, Document]:
    """Each document by its place below `docs`: all but the schemas of versions that are history."""
    data = {f"schemas/{type_}/{kind.schema}.json": data_schema(type_) for type_, kind in CATALOGUE.items()}
    return {**data, "schemas/CloudEvent.json": envelope_schema(), "asyncapi.json": asyncapi()}


def write(docs: Path) -> None:
    """Write the documents. Raises `ChangedSchemaError` rather than to give a version that is written down another form.

    Of such a version only words may change: events of that form are in logs already.
    """
    for name, document in documents().items():
        path = docs / name
        if name.startswith("schemas/") and path.parent != docs / "schemas" and path.exists():
            _require_same_form(path, document)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_text(document))


def differences(docs: Path) -> list[str]:
    """What of the documents in this directory is not as it would be written, each in a sentence."""
    return [*_outdated(docs), *_out_of_place(docs)]


def main(arguments: Sequence[str]) -> int:
    """Write the documents, or compare them; the exit status."""
    docs = Path("docs")
    if arguments not in ([], ["--check"]) or not docs.is_dir():
        return _say("Usage, in the project's directory: python -m fedota.events.schemas [--check]", 2)
    if arguments:
        found = differences(docs)
        return _say("\n".join(found), 1) if found else 0
    try:
        write(docs)
    except ChangedSchemaError as error:
        return _say(str(error), 1)
    return 0


def _say(words: str, status: int) -> int:
    sys.stderr.write(f"{words}\n")
    return status


def _text(document: Document) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _outdated(docs: Path) -> Iterator[str]:
    for name, document in documents().items():
        path = docs / name
        if not path.exists():
            yield f"{path} is missing. Run: python -m fedota.events.schemas"
        elif path.read_text() != _text(document):
            yield f"{path} is not what the events are. Run: python -m fedota.events.schemas"


def _out_of_place(docs: Path) -> Iterator[str]:
    versions = {f"{type_}/{n}.json" for type_, kind in CATALOGUE.items() for n in range(1, kind.schema + 1)}
    there = {str(path.relative_to(docs / "schemas")) for path in (docs / "schemas").glob("*/*")}
    for name in sorted(versions - there):
        yield f"{docs}/schemas/{name} is missing. A version stays written down for as long as logs may hold it."
    for name in sorted(there - versions):
        yield f"{docs}/schemas/{name} is of no type and version that there is. Remove it."


def _require_same_form(path: Path, document: Document) -> None:
    if _form(json.loads(path.read_text())) != _form(document):
        raise ChangedSchemaError(
            f"{path.parent.name} has another form than its version {path.stem} has in {path}. Logs hold events of that "
            "form: give the catalogue an upcast from it, which raises the version, and leave the file as it is. If the "
            "version has never left your machine, remove the file."
        )


def _form(schema: Any) -> Any:
    """The schema without its words. Those of `properties` are names, whatever they are."""
    match schema:
        case dict():
            return {
                name: {key: _form(value) for key, value in part.items()} if name == "properties" else _form(part)
                for name, part in schema.items()
                if name not in _WORDS
            }
        case list():
            return [_form(part) for part in schema]
        case _:
            return schema


def _components(kinds: Sequence[type], template: str) -> tuple[Any, dict[str, Document]]:
    """Schemas of structs, with the words of their docstrings."""
    references, parts = msgspec.json.schema_components(kinds, ref_template=template)
    for part in parts.values():
        part["description"] = inspect.cleandoc(part["description"])
    return references, parts


def _envelope() -> Document:
    _, parts = _components([CloudEvent], "#/$defs/{name}")
    envelope = parts["CloudEvent"]
    envelope["properties"] |= {
        "specversion": {"const": CloudEvent.SPEC},
        "source": {"type": "string", "pattern": "^/services/[a-z]+$"},
        "type": {"enum": list(CATALOGUE)},
        "subject": {"type": "string", "pattern": "^[a-z]+/[0-9a-f-]+$"},
        "time": {"type": "string", "format": "date-time"},
        "datacontenttype": {"const": "application/json"},
        "data": {"type": "object"},
        **{name: {"type": "integer", "minimum": 1} for name in ("position", "streamversion", "schemaversion")},
        # in this form they are left out rather than null, as CloudEvents has it
        "causationid": _UUID,
        "traceparent": {"type": "string"},
    }
    return envelope


def _data_rules() -> Iterator[Document]:
    """Events rest as they were written, so an old one has data of its own version."""
    for type_, kind in CATALOGUE.items():
        for version in range(1, kind.schema + 1):
            which = {"type": {"const": type_}, "schemaversion": {"const": version}}
            data = {"properties": {"data": {"$ref": schema_id(type_, version)}}}
            yield {"if": {"properties": which, "required": list(which)}, "then": data}


def _channel(type_: str) -> Document:
    return {
        "address": SUBJECT.replace("{type}", type_),
        "messages": {type_: {"$ref": f"#/components/messages/{type_}"}},
        "parameters": {"problem_id": {"$ref": "#/components/parameters/problem_id"}},
    }


def _message(type_: str) -> Document:
    kind = CATALOGUE[type_]
    own = {
        "type": {"const": type_},
        "schemaversion": {"const": kind.schema},
        "source": {"const": f"/services/{kind.owner}"},
        "data": {"$ref": f"#/components/schemas/{kind.data.__name__}"},
    }
    return {
        "name": type_,
        "title": f"{type_}, version {kind.schema}",
        "summary": inspect.cleandoc(kind.data.__doc__ or "").splitlines()[0],
        "contentType": "application/cloudevents+json",
        "payload": {"allOf": [{"$ref": "#/components/schemas/CloudEvent"}, {"properties": own}]},
    }


def _operations() -> Iterator[tuple[str, Document]]:
    for type_ in CATALOGUE:
        yield f"{SENDER}.send.{type_}", _operation("send", SENDER, type_)
    for process, types in RECEIVERS.items():
        for type_ in types:
            yield f"{process}.receive.{type_}", _operation("receive", process, type_)


def _operation(action: str, process: str, type_: str) -> Document:
    return {
        "action": action,
        "channel": {"$ref": f"#/channels/{type_}"},
        "messages": [{"$ref": f"#/channels/{type_}/messages/{type_}"}],
        "tags": [{"name": process}],
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
