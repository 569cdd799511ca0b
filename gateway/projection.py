"""The gateway's read model: what each event changes in it, said as values.

Rows hold what events carry and nothing else, so a rebuild gives the same rows to the byte.
"""

from typing import Any, Final

import msgspec

from fedota.events import Event
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
from fedota.kernel.projection import Projection
from fedota.kernel.tables import Add, Change, Drop, Put, Set, writing
from fedota.words import sentence

_NOTHING: Final = {
    "backend": "",
    "coordinator": "",
    "selectors": [],
    "authority": "",
    "reason": "",
    "failure": "",
    "log": [],
}
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
    coordinator text not null, selectors json not null, authority text not null, reason text not null,
    failure text not null, log json not null, changed timestamptz not null, primary key (problem_id, run, component)
);
create table if not exists rounds (
    problem_id text, run int, round int, attempt int, stage text not null, goal_count int not null,
    minimum_count int not null, waiting int not null, selected int not null, reported int not null,
    participants json not null, refusals json not null, examples bigint not null, metrics json not null,
    seconds float8 not null, checkpoint json, final boolean not null, reason text not null,
    changed timestamptz not null, position bigint not null, primary key (problem_id, run, round, attempt)
);
create table if not exists contributions (
    problem_id text, run int, round int, attempt int, organization text, updates bigint not null,
    examples bigint not null, size bigint not null, seconds float8 not null, clipped bigint not null,
    refusals json not null, primary key (problem_id, run, round, attempt, organization)
);
create index if not exists contributions_of on contributions (problem_id, run, organization, round, attempt);
create table if not exists feed (
    problem_id text, position bigint, type text not null, time timestamptz not null, actor text not null,
    said text not null, primary key (problem_id, position)
);
"""


def changes(event: Event) -> list[Change]:
    """What an event changes in the read model."""
    found = _state(event)
    found.append(_said(event))
    return found


def _said(event: Event) -> Change:
    row = {
        "problem_id": event.data.problem_id,
        "position": event.position,
        "type": event.type,
        "time": event.time,
        "actor": event.actor,
        "said": sentence(event.data),
    }
    return Add("feed", row)


def _state(event: Event) -> list[Change]:
    match event.data:
        case RoundUpdated() as data:  # first: most events are reports, and a rebuild goes through millions of them
            return [_round(event, data), *_contributions(data)]
        case ProblemCreated():
            return [_created(event, event.data)]
        case ProblemRevised() as data:
            return [_problem(event, **_description(data))]
        case ProblemStarted() as data:
            # a run has no result before its last round, whatever the run before it had
            return [_problem(event, state="running", run=data.run, plan=data.plan, reason="", model=None)]
        case ProblemStopped() as data:
            return [_problem(event, state="stopped", reason=data.reason)]
        case ProblemCompleted() as data:
            return [_problem(event, state="completed", reason="", model=data.model)]
        case ParticipationRequested() | ParticipationApproved() as data:
            return [_participation(event, data.organization)]
        case ParticipationRefused() | ParticipationRevoked() as data:
            return [_participation(event, data.organization, data.reason)]
        case FilesStored() as data:
            return [_file(event, msgspec.to_builtins(file)) for file in data.files]
        case FilesDeleted() as data:
            return [Drop("files", {"problem_id": data.problem_id, "name": name}) for name in data.names]
        case _:
            return _infrastructure(event)


def _description(data: ProblemCreated | ProblemRevised) -> dict[str, Any]:
    return {
        "name": data.name,
        "description": data.description,
        "data_format": data.data_format,
        "client_image": data.client_image,
        "plan": data.plan,
    }


def _created(event: Event, data: ProblemCreated) -> Change:
    start = {"setter": event.actor, "state": "draft", "run": 0, "reason": "", "model": None}
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
    del values["report"], values["contributions"]  # these have rows of their own
    del values["problem_id"], values["run"], values["round"], values["attempt"]
    values["changed"], values["position"] = event.time, event.position
    return Put("rounds", _attempt(data), values)


def _attempt(data: RoundUpdated) -> dict[str, Any]:
    return {"problem_id": data.problem_id, "run": data.run, "round": data.round, "attempt": data.attempt}


def _contributions(data: RoundUpdated) -> list[Change]:
    # an attempt ends once, and only then they are told
    return [Add("contributions", {**_attempt(data), **msgspec.structs.asdict(one)}) for one in data.contributions]


def _infrastructure(event: Event) -> list[Change]:
    match event.data:
        case InfraSpawned() as data:
            # what was down before is not, now that everything was launched again
            return [Drop("infrastructure", {"problem_id": data.problem_id, "run": data.run}), _spawned(event, data)]
        case InfraDegraded() as data:
            return [_component(event, data, data.component, "degraded", reason=data.reason, log=data.log)]
        case InfraRecovered() as data:
            return [_component(event, data, data.component, "running", reason="", log=[])]
        case InfraFailed() as data:
            said = {"reason": data.reason, "failure": data.reason, "log": data.log}
            return [_component(event, data, WHOLE, "failed", **said)]
        case InfraStopped() as data:
            # what failed before, and its log, stay: removing the remains must not hide why
            return [_component(event, data, WHOLE, "stopped", reason=data.reason)]
        case _:
            return []


def _spawned(event: Event, data: InfraSpawned) -> Change:
    addresses = {"backend": data.backend, "coordinator": data.coordinator, "selectors": data.selectors}
    return _component(event, data, WHOLE, "running", **addresses, authority=data.authority)


def _component(event: Event, data: Any, component: str, state: str, **values: Any) -> Change:
    key = {"problem_id": data.problem_id, "run": data.run, "component": component}
    values = {"state": state, "namespace": data.namespace, "changed": event.time, **values}
    return Put("infrastructure", key, values, {name: text for name, text in _NOTHING.items() if name not in values})


NAMES: Final = ("problems", "files", "participations", "infrastructure", "rounds", "contributions", "feed")
PROJECTION: Final = Projection(tables=_TABLES, names=NAMES, write=writing(changes, *NAMES))
