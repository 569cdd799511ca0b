"""The checker: once everything is quiet, four accounts of what happened are compared, id by id.

What clients were told is in the log; the log, the event stream and the gateway's read model hold the same events at
the same positions, each once; the chain of hashes is what this file computes from the stored rows by itself.
"""

import hashlib
import random
import secrets
from collections import Counter, defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import accumulate, pairwise
from typing import Any, Final, NamedTuple

import asyncpg

from fedota.contracts import subjects
from fedota.events import Event, decode, encode
from fedota.events.orchestrator import InfraStopped
from fedota.events.problems import ProblemCompleted, ProblemStarted, ProblemStopped
from fedota.events.rounds import RoundUpdated
from fedota.kernel.database import Connection
from fedota.kernel.projection import Projection
from gateway.projection import PROJECTION
from tests.contract.ground import Ground
from tests.faults.ledger import Ledger
from tests.faults.servers import PATIENCE
from tests.support.waiting import until

_GENESIS: Final = bytes(32)
_EVENTS: Final = """
select position, id, type, schema, subject, version, time, actor, correlation, causation, traceparent, data
from fedota.events order by position
"""
Rows = list[asyncpg.Record]


class Findings(NamedTuple):
    """How much was compared; a test that compared nothing has shown nothing."""

    events: int
    acks: int
    commands: int


async def check(
    ground: Ground, ledger: Ledger, chance: random.Random, *, projecting: Sequence[str] = ("problems", "gateway")
) -> Findings:
    """Raise `AssertionError` unless all accounts agree. Nobody may be writing any more."""
    head = await quiet(ground, projecting)
    async with ground.superuser() as connection:
        rows = await connection.fetch(_EVENTS)
        hashes = [row["hash"] for row in await connection.fetch("select hash from fedota.events order by position")]
        requests = await connection.fetch("select key, position, version from fedota.requests order by position, key")
        newest = await connection.fetchrow("select position, hash from fedota.head")
        assert newest is not None and newest["position"] == head == len(rows), (newest, head, len(rows))
        _check_log(rows)
        _check_chain(rows, [*hashes, newest["hash"]])
        _check_requests(rows, requests)
        _check_promises(rows, requests, ledger)
        _check_reactions(rows)
        await _check_stream(ground, rows)
        await _check_read_models(connection, rows, projecting, chance)
    return Findings(len(rows), len(ledger.acks), len(ledger.done))


async def quiet(ground: Ground, projecting: Sequence[str]) -> int:
    """Return the log's head once stream and read models stand where it does, and nothing moves any more."""
    last = -1

    async def still() -> int | None:
        nonlocal last
        before, last = last, -1
        try:
            async with ground.superuser() as connection:
                head: int = await connection.fetchval("select position from fedota.head")
                positions = {name: await _checkpoint(connection, name) for name in projecting}
            positions["stream"] = await ground.last_sequence()
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            return None
        seen.update(positions, head=head)
        last = head if set(positions.values()) == {head} else -1
        return head if before == last == head else None

    seen: dict[str, int] = {}
    try:
        return int(await until(still, "everything is quiet", PATIENCE))
    except AssertionError as error:
        raise AssertionError(f"{error}; positions: {seen}") from None


async def _checkpoint(connection: Connection, process: str) -> int:
    position: int = await connection.fetchval(f"select position from {process}.checkpoint")
    return position


def _check_log(rows: Rows) -> None:
    """Positions without gaps, each stream's versions too, ids that are there once."""
    assert [row["position"] for row in rows] == list(range(1, len(rows) + 1))
    versions: Counter[str] = Counter()
    for row in rows:
        versions[row["subject"]] += 1
        assert row["version"] == versions[row["subject"]], f"{row['subject']} at {row['position']}"
    _require_once(row["id"] for row in rows)


def _check_chain(rows: Rows, stored: list[bytes]) -> None:
    """Each hash, and at last the head's, follows from the row and the hash before."""
    hashes = list(accumulate(rows, _hashed, initial=_GENESIS))
    broken = [number for number, pair in enumerate(zip(hashes[1:], stored[:-1], strict=True), 1) if pair[0] != pair[1]]
    assert not broken, f"the chain breaks at {broken[:5]}"
    assert stored[-1] == hashes[-1]


def _hashed(before: bytes, row: asyncpg.Record) -> bytes:
    time: datetime = row["time"].astimezone(UTC)
    fields = (
        row["position"],
        row["id"],
        row["type"],
        row["schema"],
        row["subject"],
        row["version"],
        time.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        row["actor"],
        row["correlation"],
        row["causation"] or "",
        row["traceparent"] or "",
        "",
    )
    return hashlib.sha256(before + "\n".join(map(str, fields)).encode() + row["data"]).digest()


def _check_requests(rows: Rows, requests: Rows) -> None:
    """Each event came with exactly one request: the requests' ends cut the log into appends of one stream each."""
    _require_once(request["key"] for request in requests)
    ends = [request["position"] for request in requests]
    _require_once(ends)
    assert (ends[-1] if ends else 0) == len(rows), "events that no request accounts for"
    for start, end in pairwise([0, *ends]):
        made = rows[start:end]
        assert len({(row["subject"], row["actor"], row["correlation"]) for row in made}) == 1, f"{start + 1} to {end}"
    assert [rows[request["position"] - 1]["version"] for request in requests] == [one["version"] for one in requests]


def _check_promises(rows: Rows, requests: Rows, ledger: Ledger) -> None:
    """What was accepted is there, whole and where it was said to be; what nobody sent is not."""
    by_key = {request["key"]: request["position"] for request in requests}
    for ack in ledger.acks.values():
        made = rows[ack.position - len(ack.ids) : ack.position]
        assert tuple(row["id"] for row in made) == ack.ids, f"lost or elsewhere: {ack}"
        assert {row["subject"] for row in made} == {ack.subject}
        assert made[-1]["version"] == ack.version
        assert by_key[ack.key] == ack.position
    for done in ledger.done.values():
        assert by_key.get(done.key) == done.position, f"lost or elsewhere: {done}"
        assert rows[done.position - 1]["actor"] == done.actor
    tried = {event.id for append in ledger.tried.values() for event in append.events}
    invented = [row["position"] for row in rows if row["actor"] == "load" and row["id"] not in tried]
    assert not invented, f"nobody sent {invented}"


def _check_reactions(rows: Rows) -> None:
    """Runs follow on each other, end once, are removed once; reports are numbered; no cause has its effect twice."""
    runs: dict[str, int] = defaultdict(int)
    ended: set[tuple[str, int]] = set()
    stopped: set[tuple[str, int]] = set()
    reports: Counter[tuple[str, int]] = Counter()
    reacted: list[Any] = []
    for row in rows:
        event = _event(row)
        if event.actor == "service:problems":
            reacted.append(event.causation)
        match event.data:
            case ProblemStarted(problem_id=problem, run=run):
                runs[problem] += 1
                assert run == runs[problem] and (run == 1 or (problem, run - 1) in ended), row["position"]
            case ProblemStopped(problem_id=problem, run=run) | ProblemCompleted(problem_id=problem, run=run):
                assert run == runs[problem] and (problem, run) not in ended, row["position"]
                ended.add((problem, run))
            case InfraStopped(problem_id=problem, run=run):
                assert (problem, run) in ended and (problem, run) not in stopped, row["position"]
                stopped.add((problem, run))
            case RoundUpdated(problem_id=problem, run=run, report=report):
                reports[problem, run] += 1
                assert report == reports[problem, run], row["position"]
    _require_once(reacted)


async def _check_stream(ground: Ground, rows: Rows) -> None:
    """Sequence, subject and bytes of each message are what the log's row says."""
    stream = await ground.stream()
    assert len(stream) == len(rows)
    for message, row in zip(stream, rows, strict=True):
        subject = subjects.event(row["type"], row["subject"].partition("/")[2])
        assert (message.sequence, message.subject) == (row["position"], subject)
        assert message.body == encode(dict(row)), f"other bytes at {row['position']}"


async def _check_read_models(
    connection: Connection, rows: Rows, projecting: Sequence[str], chance: random.Random
) -> None:
    """Nothing is parked, every event is in the feed once, and a rebuild elsewhere gives the same rows."""
    for name in projecting:
        assert await _checkpoint(connection, name) == len(rows)
        assert await connection.fetch(f"select * from {name}.dead_letters") == []
    if "gateway" in projecting:
        feed = await connection.fetch("select position, type, time, actor from gateway.feed order by position")
        _require_same(
            [tuple(row) for row in feed], [(row["position"], row["type"], row["time"], row["actor"]) for row in rows]
        )
        await check_rebuild(connection, rows, PROJECTION, "gateway", chance)


async def check_rebuild(
    connection: Connection, rows: Rows, projection: Projection, live: str, chance: random.Random
) -> None:
    """Project the log into a schema that nobody else knows, in batches of other sizes, and compare table by table."""
    made = f"check_{secrets.token_hex(4)}"
    transaction = connection.transaction()
    await transaction.start()
    try:
        await connection.execute(f"create schema {made}; set local search_path = {made}; {projection.tables}")
        events = [_event(row) for row in rows]
        while events:
            size = chance.randint(1, 100)
            await projection.write_rows(connection, events[:size])
            events = events[size:]
        for name in projection.names:
            differing = await connection.fetch(_difference(made, live, name))
            assert not differing, f"{live}.{name} is not what the log gives: {differing[:3]}"
    finally:
        await transaction.rollback()


def _difference(made: str, live: str, name: str) -> str:
    """Rows as text, to the byte: values of type json know no equality."""
    one, other = (f"select t::text from {schema}.{name} t" for schema in (made, live))
    return f"({one} except all {other}) union all ({other} except all {one})"


def _require_once(values: Any) -> None:
    twice = [value for value, times in Counter(values).items() if times > 1]
    assert not twice, f"there twice: {twice[:5]}"


def _require_same(found: list[Any], expected: list[Any]) -> None:
    """Comparing thousands of rows says nothing: say what is too much and what is missing."""
    more, less = Counter(found) - Counter(expected), Counter(expected) - Counter(found)
    assert not more and not less, f"{len(more)} too many, {len(less)} missing: {[*more][:5]}, {[*less][:5]}"
    assert found == expected, "the order differs"


def _event(row: asyncpg.Record) -> Event:
    return decode(encode(dict(row)))
