"""Questions to the read model: as it is now, or as it was at a position of the log."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final
from uuid import UUID

import asyncpg
import msgspec

from fedota.errors import FedotaError
from fedota.kernel.database import Connection, Pool
from fedota.kernel.event_log import EventLog
from fedota.kernel.projection import Projector
from fedota.kernel.rebuilding import as_of
from gateway.projection import PROJECTION, WHOLE
from gateway.stream import streams_of

Row = dict[str, Any]
_PAST_AT_ONCE: Final = 2  # each replays events and holds a connection meanwhile: what is live must not wait for them
_PAST_WAIT: Final = 10.0  # seconds
_JSON: Final = frozenset({"plan", "model", "selectors", "log", "participants", "refusals", "metrics", "checkpoint"})
_PROBLEMS: Final = """
select p.*,
    exists (select from files f where f.problem_id = p.problem_id and f.role = 'model') as has_model,
    (select count(*) from participations a where a.problem_id = p.problem_id and a.state = 'approved') as approved,
    (select count(*) from participations a where a.problem_id = p.problem_id and a.state = 'requested') as requested,
    (select i.state from infrastructure i where i.problem_id = p.problem_id and i.run = p.run and i.component = '')
        as whole,
    exists (select from infrastructure i where i.problem_id = p.problem_id and i.run = p.run and i.component <> ''
        and i.state = 'degraded') as down
from problems p
"""
_ROUND: Final = """
select run, round, attempt, stage, goal_count, minimum_count, waiting, selected, reported, participants, refusals,
    examples, metrics, seconds, checkpoint, final, reason, changed, position from rounds
"""
_CONTRIBUTION: Final = """
select c.run, c.round, c.attempt, r.stage, c.organization, c.updates, c.examples,
    case when r.stage = 'completed' and r.examples > 0 then c.examples::float8 / r.examples else 0 end as share,
    c.size, c.seconds, c.clipped, c.refusals, r.changed
from contributions c join rounds r using (problem_id, run, round, attempt)
where c.problem_id = $1 and c.run = $2
"""


def _row(record: asyncpg.Record) -> Row:
    return {
        name: msgspec.json.decode(value) if name in _JSON and value is not None else value
        for name, value in record.items()
        if name != "problem_id"
    }


class Questions:
    """What can be asked of one state of the read model; `source` has its tables under their plain names."""

    def __init__(self, source: Pool | Connection, position: int) -> None:
        self._source = source
        self._position = position

    @property
    def position(self) -> int:
        """The log position that the answers stand for, or an earlier one: they show all that happened up to it."""
        return self._position

    async def problems(self, before: int, limit: int) -> list[Row]:
        """The problems published before log position `before`, newest first, each with its latest round."""
        records = await self._source.fetch(
            f"{_PROBLEMS} where position < $1 order by position desc limit $2", before, limit
        )
        latest = await self._latest_rounds([record["problem_id"] for record in records])
        return [{**_problem(record), "latest_round": latest.get(record["problem_id"])} for record in records]

    async def problem(self, problem_id: str) -> Row:
        """One problem. Raises `problem_not_found`."""
        record = await self._find(problem_id)
        if record is None:
            raise self._unknown(problem_id)
        latest = await self._latest_rounds([problem_id])
        return {**_problem(record), "latest_round": latest.get(problem_id)}

    async def files(self, problem_id: str) -> list[Row]:
        """A problem's files by name."""
        return await self._rows("select * from files where problem_id = $1 order by name", problem_id)

    async def file(self, problem_id: str, name: str) -> Row:
        """One file. Raises `not_found`."""
        rows = await self._rows("select * from files where problem_id = $1 and name = $2", problem_id, name)
        if not rows:
            raise FedotaError("not_found", f"The problem has no file {name[:200]!r}. Look at its list of files.")
        return rows[0]

    async def participations(self, problem_id: str) -> list[Row]:
        """Who takes part, or asked to."""
        return await self._rows("select * from participations where problem_id = $1 order by organization", problem_id)

    async def participation(self, problem_id: str, organization: str) -> Row:
        """One organization's participation. Raises `participation_not_found`."""
        query = "select * from participations where problem_id = $1 and organization = $2"
        rows = await self._rows(query, problem_id, organization)
        if not rows:
            raise FedotaError(
                "participation_not_found",
                f"{organization[:100]} has not asked to take part. Request participation first.",
            )
        return rows[0]

    async def infrastructure(self, problem_id: str, run: int) -> Row:
        """Coordinator and selectors of a run: state, addresses, what is down and why."""
        query = "select * from infrastructure where problem_id = $1 and run = $2 order by component"
        rows = await self._rows(query, problem_id, run)
        whole = next((row for row in rows if row["component"] == WHOLE), None)
        components = [_component(row) for row in rows if row["component"] != WHOLE]
        return _infrastructure(run, whole, components)

    async def rounds(self, problem_id: str, run: int, *, after: int = 0, limit: int = 1000) -> list[Row]:
        """The attempts of a run's rounds past number `after`, in order; of at most `limit` rounds, none cut in two."""
        return await self._rows(
            f"{_ROUND} where problem_id = $1 and run = $2 and round > $3::bigint and round <= $3::bigint + $4"
            " order by round, attempt",
            problem_id,
            run,
            after,
            limit,
        )

    async def last_rounds(self, problem_id: str, run: int, limit: int) -> list[Row]:
        """The newest attempts of a run, newest first."""
        query = f"{_ROUND} where problem_id = $1 and run = $2 order by round desc, attempt desc limit $3"
        return await self._rows(query, problem_id, run, limit)

    async def contributions(
        self, problem_id: str, run: int, organization: str | None, *, after: int, limit: int
    ) -> list[Row]:
        """What organizations, or one of them, gave to a run's rounds past number `after`; pages are as of `rounds`.

        `share` is the part of the checkpoint's weight.
        """
        rest = "and c.round > $3::bigint and c.round <= $3::bigint + $4 order by c.round, c.attempt, c.organization"
        return await self._given(organization, rest, problem_id, run, after, limit)

    async def last_contributions(self, problem_id: str, run: int, organization: str | None, limit: int) -> list[Row]:
        """The newest of them, newest first."""
        rest = "order by c.round desc, c.attempt desc, c.organization limit $3"
        return await self._given(organization, rest, problem_id, run, limit)

    async def newest_round(self, problem_id: str, run: int) -> int:
        """The number of a run's newest round; 0 before the first."""
        query = "select coalesce(max(round), 0) from rounds where problem_id = $1 and run = $2"
        newest: int = await self._source.fetchval(query, problem_id, run)
        return newest

    async def curves(self, problem_id: str, run: int, most: int = 400) -> dict[str, list[tuple[int, float]]]:
        """Each metric over the completed rounds of a run, thinned to about `most` points."""
        records = await self._source.fetch(
            "select round, metrics from (select *, row_number() over (order by round) as n, count(*) over () as total"
            " from rounds where problem_id = $1 and run = $2 and stage = 'completed') c"
            " where n = total or n % greatest(1, total / $3) = 0 order by round",
            problem_id,
            run,
            most,
        )
        curves: dict[str, list[tuple[int, float]]] = {}
        for record in records:
            for name, value in msgspec.json.decode(record["metrics"]).items():
                if value is not None:
                    curves.setdefault(name, []).append((record["round"], value))
        return dict(sorted(curves.items()))

    async def feed(self, problem_id: str, limit: int) -> list[Row]:
        """What happened last, newest first."""
        query = "select * from feed where problem_id = $1 order by position desc limit $2"
        return await self._rows(query, problem_id, limit)

    async def newest_checkpoint(self, problem_id: str) -> Row | None:
        """The completed round whose checkpoint was stored last."""
        rows = await self._rows(
            f"{_ROUND} where problem_id = $1 and stage = 'completed' and checkpoint is not null"
            " order by run desc, round desc limit 1",
            problem_id,
        )
        return rows[0] if rows else None

    async def checkpoint(self, problem_id: str, run: int, number: int) -> Row:
        """The checkpoint of a completed round. Raises `not_found`."""
        rows = await self._rows(
            f"{_ROUND} where problem_id = $1 and run = $2 and round = $3 and checkpoint is not null",
            problem_id,
            run,
            number,
        )
        if not rows:
            raise FedotaError("not_found", f"Run {run} has no checkpoint of round {number}. Look at its rounds.")
        checkpoint: Row = rows[0]["checkpoint"]
        return checkpoint

    async def _given(self, organization: str | None, rest: str, *arguments: object) -> list[Row]:
        if organization is None:
            return await self._rows(f"{_CONTRIBUTION} {rest}", *arguments)
        # a query of its own: in one for both cases PostgreSQL may pass over the index of organizations
        own = f"{_CONTRIBUTION} and c.organization = ${len(arguments) + 1} {rest}"
        return await self._rows(own, *arguments, organization)

    async def _rows(self, query: str, *arguments: object) -> list[Row]:
        return [_row(record) for record in await self._source.fetch(query, *arguments)]

    async def _find(self, problem_id: str) -> asyncpg.Record | None:
        return await self._source.fetchrow(f"{_PROBLEMS} where problem_id = $1", problem_id)

    def _unknown(self, problem_id: str) -> FedotaError:
        when = f"There was no problem {problem_id[:40]} at position {self.position}."
        return FedotaError("problem_not_found", f"{when} Leave `at` out to read what is there now.")

    async def _latest_rounds(self, problem_ids: list[str]) -> dict[str, Row]:
        records = await self._source.fetch(
            # one step in the primary key a problem, however many rounds it has had
            "select latest.* from unnest($1::text[]) as asked (id) cross join lateral (select * from rounds"
            " where problem_id = asked.id order by run desc, round desc, attempt desc limit 1) latest",
            problem_ids,
        )
        return {record["problem_id"]: _row(record) for record in records}


class Reads(Questions):
    """The read model of one gateway: as it is now, and the way to what it was."""

    def __init__(self, pool: Pool, projector: Projector, log: EventLog) -> None:
        super().__init__(pool, 0)
        self._pool = pool
        self._projector = projector
        self._log = log
        self._past = asyncio.Semaphore(_PAST_AT_ONCE)

    @property
    def position(self) -> int:
        """The log position that the read model stands for."""
        return self._projector.position

    async def at_least(self, position: int) -> None:
        """Return when the read model stands for `position`: so people read what they wrote."""
        if position > self._projector.position:
            await self._projector.wait_for(position)

    async def require_reached(self, position: int) -> None:
        """Raise `position_not_reached` when the log has no such position yet."""
        if position > (head := await self._log.head()):
            raise FedotaError(
                "position_not_reached",
                f"The log has reached position {head}, not {position}. Ask for one from 0 to {head}.",
            )

    @asynccontextmanager
    async def as_of(self, position: int, problem_ids: Sequence[str]) -> AsyncIterator[Questions]:
        """These problems as they were at a position: what is shown follows from their events up to it, and no others.

        Raises `unavailable` when others look into the past already and do not come back soon.
        """
        try:
            async with asyncio.timeout(_PAST_WAIT):
                await self._past.acquire()
        except TimeoutError:
            busy = "Others are looking into the past, which takes its time. Try again in a moment."
            raise FedotaError("unavailable", busy, retry_after=5) from None
        try:
            subjects = [subject for problem_id in problem_ids for subject in streams_of(problem_id)]
            async with as_of(PROJECTION, self._pool, self._log, position, subjects) as connection:
                yield Questions(connection, position)
        finally:
            self._past.release()

    async def published(self, before: int, limit: int) -> list[str]:
        """The problems published before a log position, newest first."""
        query = "select problem_id from problems where position < $1 order by position desc limit $2"
        return [record["problem_id"] for record in await self._pool.fetch(query, before, limit)]

    async def around(self, problem_id: str, position: int) -> tuple[int | None, int | None]:
        """The positions of a problem's events before and after what is shown of it at `position`."""
        query = (
            "select (select position from feed where problem_id = $1 and position <= $2"
            " order by position desc offset 1 limit 1) as earlier, (select min(position) from feed"
            " where problem_id = $1 and position > $2) as later"
        )
        row = await self._pool.fetchrow(query, problem_id, position)
        assert row is not None
        return row["earlier"], row["later"]

    async def _find(self, problem_id: str) -> asyncpg.Record | None:
        found = await super()._find(problem_id)
        if found is None:
            await self._projector.catch_up()  # it may have been published a moment ago
            found = await super()._find(problem_id)
        return found

    def _unknown(self, problem_id: str) -> FedotaError:
        return FedotaError("problem_not_found", f"There is no problem {problem_id[:40]}. Look at /api/problems.")


def _problem(record: asyncpg.Record) -> Row:
    # `problem_id` is left out of every other row: there it stands in the address
    row = {"problem_id": record["problem_id"], **_row(record)}
    if row.pop("has_model") and row["state"] == "draft":
        row["state"] = "ready"
    row["participations"] = {"approved": row.pop("approved"), "requested": row.pop("requested")}
    row["infrastructure"] = {"state": _infrastructure_state(row["run"], row.pop("whole"), row.pop("down"))}
    return row


def _component(row: Row) -> Row:
    return {name: row[name] for name in ("component", "state", "reason", "log", "changed")}


def _infrastructure(run: int, whole: Row | None, components: list[Row]) -> Row:
    down = any(component["state"] == "degraded" for component in components)
    state = _infrastructure_state(run, whole["state"] if whole else None, down)
    told = {name: value for name, value in (whole or {"run": run}).items() if name != "component"}
    return {**told, "state": state, "components": components}


def _infrastructure_state(run: int, whole: str | None, down: bool) -> str:
    if whole is None:
        return "starting" if run else "none"
    return "degraded" if whole == "running" and down else whole


def without_logs(infrastructure: Row) -> Row:
    """The same for eyes that may not see what the processes wrote."""
    shown = {name: value for name, value in infrastructure.items() if name != "log"}
    shown["components"] = [
        {name: value for name, value in component.items() if name != "log"} for component in shown["components"]
    ]
    return shown


def is_problem_id(text: str) -> bool:
    """Whether this could name a problem: a UUID, lower case, with dashes."""
    try:
        return str(UUID(text)) == text
    except ValueError:
        return False
