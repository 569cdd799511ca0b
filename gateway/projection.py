"""The gateway's read model: what each event changes in it, said as values, and the one place that writes them.

Rows hold what events carry and nothing else, so a rebuild gives the same rows to the byte.
"""

from typing import Any, Final

import msgspec

from fedota.events import CATALOGUE, Event, EventData, to_json
from fedota.events.orchestrator import InfraDegraded, InfraFailed, InfraRecovered, InfraSpawned, InfraStopped
from fedota.events.problems import (
    ParticipationApproved,
    ParticipationRefused,
    ParticipationRequested,
    ParticipationRevoked,
    ProblemCompleted,
    ProblemCreated,
    ProblemRevised,
    ProblemStarted,
    ProblemStopped,
)
from fedota.events.rounds import RoundUpdated
from fedota.events.storage import FilesDeleted, FilesStored
from fedota.kernel.database import Connection
from fedota.kernel.projection import Projection
from gateway.words import sentence

_NOTHING: Final = {"backend": "", "coordinator": "", "selectors": "[]", "reason": "", "failure": "", "log": "[]"}
WHOLE: Final = ""  # the row of `infrastructure` that stands for all components together
_TABLES: Final = """
create table if not exists problems (
    problem_id text primary key, name text not null, description text not null, data_format text not null,
    client_image text not null, plan json not null, setter text not null, state text not null, run int not null,
    reason text not null, model json, created timestamptz not null, changed timestamptz not null,
    position bigint not null
);
create table if not exists files (
    problem_id text, name text, role text not null, key text not null, sha256 text not null, size bigint not null,
    stored timestamptz not null, primary key (problem_id, name)
);
create table if not exists participations (
    problem_id text, organization text, state text not null, reason text not null, changed timestamptz not null,
    primary key (problem_id, organization)
);
create table if not exists infrastructure (
    problem_id text, run int, component text, state text not null, namespace text not null, backend text not null,
    coordinator text not null, selectors json not null, reason text not null, failure text not null, log json not null,
    changed timestamptz not null, primary key (problem_id, run, component)
);
create table if not exists rounds (
    problem_id text, run int, round int, attempt int, stage text not null, goal_count int not null,
    minimum_count int not null, waiting int not null, selected int not null, reported int not null,
    participants json not null, refusals json not null, examples bigint not null, metrics json not null,
    seconds float8 not null, checkpoint json, final boolean not null, reason text not null,
    changed timestamptz not null, position bigint not null, primary key (problem_id, run, round, attempt)
);
create table if not exists feed (
    problem_id text, position bigint, type text not null, time timestamptz not null, actor text not null,
    said text not null, primary key (problem_id, position)
);
"""


class Put(msgspec.Struct, frozen=True):
    """A row with these values; where there was none with this key, `defaults` stand in its other columns."""

    table: str
    key: dict[str, Any]
    values: dict[str, Any]
    defaults: dict[str, Any] = {}


class Set(msgspec.Struct, frozen=True):
    """These columns of the row with this key, where there is one."""

    table: str
    key: dict[str, Any]
    values: dict[str, Any]


class Drop(msgspec.Struct, frozen=True):
    """No row with this key."""

    table: str
    key: dict[str, Any]


Change = Put | Set | Drop


def changes(event: Event) -> list[Change]:
    """What an event changes in the read model."""
    return [*_state(event), _said(event)]


def _said(event: Event) -> Change:
    key = {"problem_id": event.problem_id, "position": event.position}
    told = {"type": event.type, "time": event.time, "actor": event.actor, "said": sentence(event.data)}
    return Put("feed", key, told)


def _state(event: Event) -> list[Change]:
    match event.data:
        case ProblemCreated():
            return [_created(event, event.data)]
        case ProblemRevised() as data:
            return [_problem(event, **_description(data))]
        case ProblemStarted() as data:
            # a run has no result before its last round, whatever the run before it had
            return [_problem(event, state="running", run=data.run, plan=_json(data.plan), reason="", model=None)]
        case ProblemStopped() as data:
            return [_problem(event, state="stopped", reason=data.reason)]
        case ProblemCompleted() as data:
            return [_problem(event, state="completed", reason="", model=_json(data.model))]
        case ParticipationRequested() | ParticipationApproved() as data:
            return [_participation(event, data.organization)]
        case ParticipationRefused() | ParticipationRevoked() as data:
            return [_participation(event, data.organization, data.reason)]
        case FilesStored() as data:
            return [_file(event, msgspec.to_builtins(file)) for file in data.files]
        case FilesDeleted() as data:
            return [Drop("files", {"problem_id": data.problem_id, "name": name}) for name in data.names]
        case RoundUpdated() as data:
            return [_round(event, data)]
        case _:
            return _infrastructure(event)


def _json(value: Any) -> str | None:
    return None if value is None else to_json(value).decode()


def _description(data: ProblemCreated | ProblemRevised) -> dict[str, Any]:
    return {
        "name": data.name,
        "description": data.description,
        "data_format": data.data_format,
        "client_image": data.client_image,
        "plan": _json(data.plan),
    }


def _created(event: Event, data: ProblemCreated) -> Change:
    start = {"setter": data.setter, "state": "draft", "run": 0, "reason": "", "model": None}
    when = {"created": event.time, "changed": event.time, "position": event.position}
    return Put("problems", {"problem_id": data.problem_id}, {**_description(data), **start, **when})


def _problem(event: Event, **values: Any) -> Change:
    return Set("problems", {"problem_id": event.problem_id}, {**values, "changed": event.time})


def _participation(event: Event, organization: str, reason: str = "") -> Change:
    state = event.type.removeprefix("Participation").lower()
    key = {"problem_id": event.problem_id, "organization": organization}
    return Put("participations", key, {"state": state, "reason": reason, "changed": event.time})


def _file(event: Event, file: dict[str, Any]) -> Change:
    key = {"problem_id": event.problem_id, "name": file.pop("name")}
    return Put("files", key, {**file, "stored": event.time})


def _round(event: Event, data: RoundUpdated) -> Change:
    values = msgspec.structs.asdict(data)
    key = {name: values.pop(name) for name in ("problem_id", "run", "round", "attempt")}
    del values["report"]
    for name in ("participants", "refusals", "metrics", "checkpoint"):
        values[name] = _json(values[name])
    return Put("rounds", key, {**values, "changed": event.time, "position": event.position})


def _infrastructure(event: Event) -> list[Change]:
    match event.data:
        case InfraSpawned() as data:
            # what was down before is not, now that everything was launched again
            return [Drop("infrastructure", {"problem_id": data.problem_id, "run": data.run}), _spawned(event, data)]
        case InfraDegraded() as data:
            return [_component(event, data, data.component, "degraded", reason=data.reason, log=_json(data.log))]
        case InfraRecovered() as data:
            return [_component(event, data, data.component, "running", reason="", log="[]")]
        case InfraFailed() as data:
            said = {"reason": data.reason, "failure": data.reason, "log": _json(data.log)}
            return [_component(event, data, WHOLE, "failed", **said)]
        case InfraStopped() as data:
            # what failed before, and its log, stay: removing the remains must not hide why
            return [_component(event, data, WHOLE, "stopped", reason=data.reason)]
        case _:
            return []


def _spawned(event: Event, data: InfraSpawned) -> Change:
    addresses = {"backend": data.backend, "coordinator": data.coordinator, "selectors": _json(data.selectors)}
    return _component(event, data, WHOLE, "running", **addresses)


def _component(event: Event, data: Any, component: str, state: str, **values: Any) -> Change:
    key = {"problem_id": data.problem_id, "run": data.run, "component": component}
    values = {"state": state, "namespace": data.namespace, "changed": event.time, **values}
    return Put("infrastructure", key, values, {name: text for name, text in _NOTHING.items() if name not in values})


async def _write(connection: Connection, event: Event, _: EventData) -> None:
    for change in changes(event):
        await _apply(connection, change)


def _storable(row: dict[str, Any]) -> list[Any]:
    """The row's values, without the one character that PostgreSQL's text cannot hold: a process may log anything."""
    return [value.replace("\0", "\ufffd") if isinstance(value, str) else value for value in row.values()]


async def _apply(connection: Connection, change: Change) -> None:
    match change:
        case Put(table, key, values, defaults):
            row = {**key, **defaults, **values}
            holders = ", ".join(f"${number}" for number in range(1, len(row) + 1))
            updates = ", ".join(f"{name} = excluded.{name}" for name in values)
            await connection.execute(
                f"insert into {table} ({', '.join(row)}) values ({holders})"  # noqa: S608 - names are ours
                f" on conflict ({', '.join(key)}) do update set {updates}",
                *_storable(row),
            )
        case Set(table, key, values):
            updates = ", ".join(f"{name} = ${number}" for number, name in enumerate(values, len(key) + 1))
            await connection.execute(
                f"update {table} set {updates} where {_where(key)}",  # noqa: S608 - names are ours
                *_storable({**key, **values}),
            )
        case Drop(table, key):
            await connection.execute(f"delete from {table} where {_where(key)}", *_storable(key))  # noqa: S608


def _where(key: dict[str, Any]) -> str:
    return " and ".join(f"{name} = ${number}" for number, name in enumerate(key, 1))


PROJECTION: Final = Projection(
    tables=_TABLES,
    names=("problems", "files", "participations", "infrastructure", "rounds", "feed"),
    rows={kind.data: _write for kind in CATALOGUE.values()},
)
