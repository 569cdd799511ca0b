"""Changes that are written a batch at once leave what the same changes one by one would leave, to the byte."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedota.events import to_json
from fedota.kernel.tables import Add, Change, Drop, Put, Set, Tables

TABLES: Final = """
create table things (
    owner text, run int, part text, state text not null default 'new', size bigint, said text, parts json,
    share float8, final boolean, changed timestamptz, primary key (owner, run, part)
);
create table words (word text primary key, meaning text, seen jsonb);
create table lines (number bigserial primary key, said text, parts json, share float8, final boolean, day timestamptz);
"""
NAMES: Final = ("things", "words", "lines")
COLUMNS: Final[dict[str, st.SearchStrategy[Any]]] = {
    "state": st.sampled_from(["draft", "running", "a\0b"]),
    "size": st.none() | st.integers(-(2**63), 2**63 - 1),
    "said": st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
    "parts": st.none() | st.lists(st.sampled_from(["x", "\0", "ü"])) | st.dictionaries(st.just("a"), st.floats(0, 1)),
    "share": st.none() | st.floats(),
    "final": st.none() | st.booleans(),
    "changed": st.none() | st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC)),
}
# two texts that are one key once PostgreSQL holds them, and two that only look alike
OWNERS: Final = st.sampled_from(["a", "a\0", "a\ufffd", "A"])
RUNS: Final = st.integers(1, 2)
PARTS: Final = st.sampled_from(["", "x"])
KEYS: Final = st.fixed_dictionaries({"owner": OWNERS, "run": RUNS, "part": PARTS})
PARTIAL_KEYS: Final = KEYS | st.one_of(
    st.fixed_dictionaries({"owner": OWNERS}),
    st.fixed_dictionaries({"run": RUNS}),
    st.fixed_dictionaries({"part": PARTS, "owner": OWNERS}),
    st.fixed_dictionaries({"part": PARTS, "run": RUNS, "owner": OWNERS}),
)
VALUES: Final = st.fixed_dictionaries({}, optional=COLUMNS)
WORDS: Final = st.fixed_dictionaries({"word": st.sampled_from(["a", "b", "b\0"])})
MEANINGS: Final = st.fixed_dictionaries(
    {}, optional={"meaning": COLUMNS["said"], "seen": st.none() | st.integers(0, 9)}
)
LINES: Final = st.fixed_dictionaries(
    {"said": COLUMNS["said"], "parts": COLUMNS["parts"], "share": COLUMNS["share"], "final": COLUMNS["final"]},
    optional={"day": COLUMNS["changed"]},
)
CHANGES: Final[st.SearchStrategy[Change]] = st.one_of(
    st.builds(Put, st.just("things"), KEYS, VALUES, VALUES),
    st.builds(Set, st.just("things"), KEYS, VALUES.filter(bool)),
    st.builds(Drop, st.just("things"), PARTIAL_KEYS),
    st.builds(Put, st.just("words"), WORDS, MEANINGS),
    st.builds(Set, st.just("words"), WORDS, MEANINGS.filter(bool)),
    st.builds(Drop, st.just("words"), WORDS),
    st.builds(Add, st.just("lines"), LINES),
)


def test_a_batch_is_worth_its_changes_one_by_one(database_url: str) -> None:
    """Whatever is put, set and dropped, in whatever order, cut into batches wherever."""
    with asyncio.Runner() as runner:
        connection = runner.run(asyncpg.connect(database_url))
        tables = Tables(*NAMES)

        @settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
        @given(st.lists(st.lists(CHANGES, max_size=12), min_size=1, max_size=3))
        def agree(batches: list[list[Change]]) -> None:
            alone = runner.run(_rows_after(connection, _one_by_one(connection, batches)))
            assert runner.run(_rows_after(connection, _at_once(connection, tables, batches))) == alone

        try:
            runner.run(connection.execute(TABLES))
            agree()
        finally:
            runner.run(connection.close())


async def _rows_after(connection: "asyncpg.Connection[asyncpg.Record]", writing: Any) -> list[list[str]]:
    """What stands in the tables after `writing`, which leaves no trace."""
    transaction = connection.transaction()
    await transaction.start()
    try:
        await writing
        await connection.execute("update lines set number = number - (select min(number) from lines)")
        return [
            [row[0] for row in await connection.fetch(f"select t::text from {name} t order by 1")] for name in NAMES
        ]
    finally:
        await transaction.rollback()


async def _at_once(connection: Any, tables: Tables, batches: Sequence[Sequence[Change]]) -> None:
    for batch in batches:
        await tables.write(connection, batch)


async def _one_by_one(connection: Any, batches: Sequence[Sequence[Change]]) -> None:
    for batch in batches:
        for change in batch:
            await _apply(connection, change)


async def _apply(connection: Any, change: Change) -> None:
    """The plainest way to write a change."""
    match change:
        case Put(table, key, values, defaults):
            row = {**key, **defaults, **values}
            holders = ", ".join(f"${number}" for number in range(1, len(row) + 1))
            updates = ", ".join(f"{name} = excluded.{name}" for name in values)
            await connection.execute(
                f"insert into {table} ({', '.join(row)}) values ({holders})"
                f" on conflict ({', '.join(key)}) do {'update set ' + updates if updates else 'nothing'}",
                *_stored(row),
            )
        case Set(table, key, values):
            updates = ", ".join(f"{name} = ${number}" for number, name in enumerate(values, len(key) + 1))
            query = f"update {table} set {updates} where {_where(key)}"
            await connection.execute(query, *_stored({**key, **values}))
        case Add(table, row):
            holders = ", ".join(f"${number}" for number in range(1, len(row) + 1))
            query = f"insert into {table} ({', '.join(row)}) values ({holders})"
            await connection.execute(query, *_stored(row))
        case Drop(table, key):
            await connection.execute(f"delete from {table} where {_where(key)}", *_stored(key))


def _where(key: dict[str, Any]) -> str:
    return " and ".join(f"{name} = ${number}" for number, name in enumerate(key, 1))


def _stored(row: dict[str, Any]) -> list[Any]:
    def stored(name: str, value: Any) -> Any:
        if name in ("parts", "seen") and value is not None:
            return to_json(value).decode()
        return value.replace("\0", "\ufffd") if isinstance(value, str) else value

    return [stored(name, value) for name, value in row.items()]


@pytest.fixture
async def connection(database_url: str) -> Any:
    """A database with the tables."""
    made = await asyncpg.connect(database_url)
    await made.execute(TABLES)
    yield made
    await made.close()


async def test_a_batch_takes_few_statements(connection: Any) -> None:
    """However many changes it has: this is what makes a batch cheap."""
    key = {"owner": "a", "run": 1}
    changes: list[Change] = []
    for number in range(1000):
        part = {**key, "part": str(number % 50)}
        changes += [Put("things", part, {"size": number}), Set("things", part, {"said": str(number)})]
    statements: list[str] = []
    tables = Tables("things")
    await tables.write(connection, [*changes, Drop("things", key), *changes])  # the driver asks for types once
    with connection.query_logger(lambda query: statements.append(query.query)):
        await tables.write(connection, [Drop("things", key), *changes])
        await asyncio.sleep(0)  # what is logged is told a moment later
    assert len(statements) == 3  # where the tables are, the drop, the put
    assert await connection.fetchval("select array_agg(said::int order by said::int) from things") == [
        *range(950, 1000)
    ]


async def test_a_row_that_cannot_be_leaves_nothing(connection: Any) -> None:
    """The statement fails as a whole, and whoever gave the batch hears of it."""
    good, bad = ({"owner": name, "run": 1, "part": ""} for name in "ab")
    with pytest.raises(asyncpg.NotNullViolationError):
        rows = [Put("things", good, {"state": "x"}), Put("things", bad, {"state": None})]
        await Tables("things").write(connection, rows)
    assert await connection.fetchval("select count(*) from things") == 0


async def test_a_table_that_grows_is_not_changed_too(connection: Any) -> None:
    """In one batch the one would overtake the other: it is refused, and not guessed at."""
    row = {"said": "a", "parts": None, "share": None, "final": None}
    with pytest.raises(ValueError, match="added to the table lines and changed too"):
        await Tables("lines").write(connection, [Add("lines", row), Set("lines", {"number": 1}, {"said": "b"})])
    assert await connection.fetchval("select count(*) from lines") == 0


async def test_tables_that_were_made_anew(connection: Any) -> None:
    """With other columns, under the same names: the next batch knows."""
    tables, word = Tables("words"), {"word": "a"}
    await tables.write(connection, [Put("words", word, {"meaning": "b"})])
    await connection.execute("drop table words; create table words (word text primary key, meaning json, more int)")
    await tables.write(connection, [Put("words", word, {"meaning": ["b"], "more": 1})])
    assert [tuple(row) for row in await connection.fetch("select * from words")] == [("a", '["b"]', 1)]
