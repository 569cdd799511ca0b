"""Changes of a read model's tables as values, and the one place that writes them: a batch at once, set by set.

The changes of a batch are first collapsed, table by table and key by key, so that three phases are left, first all
drops, then all sets, then all puts. What stands in the tables afterwards is what the changes one by one would leave.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from itertools import groupby
from typing import Any, Final, NamedTuple

import msgspec

from fedota.events import Event, to_json
from fedota.kernel.database import Connection

_SLICE: Final = 250  # changes between two turns of the others in this process
_MANY: Final = 50  # rows that COPY takes in half the time; it costs two round trips more
_COLUMNS: Final = """
select wanted.name as "table", a.attname as name, format_type(a.atttypid, null) as type,
    coalesce(a.attnum = any(i.indkey), false) as is_key,
    format_type(a.atttypid, a.atttypmod) as declared, a.attnotnull as required
from unnest($1::text[]) as wanted (name)
join pg_attribute a on a.attrelid = to_regclass(wanted.name) and a.attnum > 0 and not a.attisdropped
left join pg_index i on i.indrelid = a.attrelid and i.indisprimary
order by a.attnum
"""
_PLACES: Final = "select array(select to_regclass(name)::oid::bigint from unnest($1::text[]) as wanted (name))"

Key = tuple[Any, ...]
Row = dict[str, Any]
BatchHandler = Callable[[Connection, Sequence[Event]], Awaitable[None]]


class Put(msgspec.Struct, frozen=True):
    """A row with these values; where there was none with this key, `defaults` stand in its other columns.

    The key of `Put` and `Set` is the whole primary key. Columns of type json take any value, as its JSON.
    """

    table: str
    key: Row
    values: Row
    defaults: Row = {}


class Set(msgspec.Struct, frozen=True):
    """These columns of the row with this key, where there is one."""

    table: str
    key: Row
    values: Row


class Drop(msgspec.Struct, frozen=True):
    """No row with this key, which may be a part of the primary key."""

    table: str
    key: Row


class Add(msgspec.Struct, frozen=True):
    """A new row of a table that only grows: no other kind of change is ever made to it."""

    table: str
    row: Row


Change = Put | Set | Drop | Add


class _Table(NamedTuple):
    """What the catalog knows of a table: the type of each column, and its primary key."""

    name: str
    types: dict[str, str]
    key: tuple[str, ...]

    def key_of(self, row: Row) -> Key:
        """The row's place; keys are compared as PostgreSQL will hold them."""
        return tuple([_storable(row[name]) for name in self.key])

    def columns(self, names: Iterable[str], rows: Sequence[Row]) -> list[list[Any]]:
        """The rows' values, an array for each of these columns."""
        return [self.column(name, [row[name] for row in rows]) for name in names]

    def column(self, name: str, values: list[Any]) -> list[Any]:
        """The values as the column takes them."""
        match self.types[name]:
            case "json" | "jsonb":
                return [None if value is None else to_json(value).decode() for value in values]
            case "text" | "character varying":
                return [_storable(value) for value in values]
            case _:
                return values

    def given(self, names: Iterable[str]) -> str:
        """A set of rows with these columns, each an array of its own among a statement's arguments."""
        return f"unnest({', '.join(f'${number}::{self.types[name]}[]' for number, name in enumerate(names, 1))})"


class _Pending:
    """What is left of a batch's changes in one table."""

    def __init__(self, table: _Table) -> None:
        self._table = table
        self._drops: dict[tuple[str, ...], set[Key]] = {}
        self._sets: dict[Key, Row] = {}
        self._puts: dict[Key, tuple[Row, Row]] = {}  # values and defaults
        self._added: list[Row] = []

    def take(self, change: Change) -> None:
        """One more change, after all before it."""
        if isinstance(change, (Put, Set)):
            self._change(change)
        elif isinstance(change, Add):
            self._added.append(change.row)
        else:
            self._drop(change.key)

    def _change(self, change: Put | Set) -> None:
        key = self._table.key_of(change.key)
        if put := self._puts.get(key):  # then the row is there, whether it was before or not
            self._puts[key] = ({**put[0], **change.values}, put[1])
        elif isinstance(change, Put):
            self._puts[key] = (change.values, change.defaults)  # beside a set, which is for a row that was there before
        else:
            self._sets[key] = {**self._sets.get(key, {}), **change.values}

    def _drop(self, key: Row) -> None:
        columns, values = tuple(key), tuple([_storable(value) for value in key.values()])
        self._drops.setdefault(columns, set()).add(values)
        for pending in (self._sets, self._puts):
            for covered in self._covered(pending, key):
                del pending[covered]

    def _covered(self, pending: Collection[Key], key: Row) -> list[Key]:
        if len(key) == len(self._table.key):
            whole = self._table.key_of(key)
            return [whole] if whole in pending else []
        places = [(self._table.key.index(name), _storable(value)) for name, value in key.items()]
        return [one for one in pending if all(one[place] == value for place, value in places)]

    async def write(self, connection: Connection) -> None:
        """All of it. Collapsing rests on the order: drops, sets, puts."""
        if self._added:
            await self._insert(connection)
        for columns, keys in self._drops.items():
            await self._delete(connection, columns, list(keys))
        for group in _grouped((key, values, {}) for key, values in self._sets.items()):
            await self._update(connection, group)
        for group in _grouped((key, *put) for key, put in self._puts.items()):
            await self._upsert(connection, group)

    async def _insert(self, connection: Connection) -> None:
        """A table of which more than its growth is said is not for `Add`."""
        if self._drops or self._sets or self._puts:
            raise ValueError(f"rows are added to the table {self._table.name} and changed too")
        for names, group in groupby(self._added, key=tuple):
            arrays = self._table.columns(names, list(group))
            await asyncio.sleep(0)  # the driver takes as long again
            if len(arrays[0]) < _MANY:
                rows = f"select * from {self._table.given(names)}"  # noqa: S608 - names are ours
                await connection.execute(f"insert into {self._table.name} ({', '.join(names)}) {rows}", *arrays)
            else:
                records = zip(*arrays, strict=True)
                await connection.copy_records_to_table(self._table.name, columns=names, records=records)

    async def _delete(self, connection: Connection, columns: Sequence[str], keys: list[Key]) -> None:
        given = f"{self._table.given(columns)} as given ({', '.join(columns)})"
        matches = " and ".join(f"t.{name} = given.{name}" for name in columns)
        arrays = [[key[place] for key in keys] for place in range(len(columns))]
        await connection.execute(f"delete from {self._table.name} t using {given} where {matches}", *arrays)  # noqa: S608

    async def _update(self, connection: Connection, group: "_Group") -> None:
        table, columns = self._table, (*self._table.key, *group.values)
        updates = ", ".join(f"{name} = given.{name}" for name in group.values)
        matches = " and ".join(f"t.{name} = given.{name}" for name in table.key)
        arrays = group.arrays(table)
        await asyncio.sleep(0)  # the driver takes as long again
        await connection.execute(
            f"update {table.name} t set {updates}"  # noqa: S608 - names are ours
            f" from {table.given(columns)} as given ({', '.join(columns)}) where {matches}",
            *arrays,
        )

    async def _upsert(self, connection: Connection, group: "_Group") -> None:
        table, columns = self._table, (*self._table.key, *group.values, *group.defaults)
        updates = ", ".join(f"{name} = excluded.{name}" for name in group.values)
        arrays = group.arrays(table)
        await asyncio.sleep(0)
        await connection.execute(
            f"insert into {table.name} ({', '.join(columns)}) select * from {table.given(columns)}"  # noqa: S608
            f" on conflict ({', '.join(table.key)}) do {f'update set {updates}' if updates else 'nothing'}",
            *arrays,
        )


class _Group(NamedTuple):
    """Rows that have the same columns: names of values and defaults, and the rows."""

    values: tuple[str, ...]
    defaults: tuple[str, ...]
    rows: list[tuple[Key, Row, Row]]

    def arrays(self, table: _Table) -> list[list[Any]]:
        """Key, values and defaults, column by column."""
        keys, values, defaults = zip(*self.rows, strict=True)
        places = ([key[place] for key in keys] for place in range(len(table.key)))
        return [*places, *table.columns(self.values, values), *table.columns(self.defaults, defaults)]


def _grouped(rows: Iterable[tuple[Key, Row, Row]]) -> list[_Group]:
    groups: dict[tuple[tuple[str, ...], tuple[str, ...]], _Group] = {}
    for row in rows:
        _, values, defaults = row
        names = tuple(values), tuple([name for name in defaults if name not in values])
        group = groups.get(names)
        if group is None:
            group = groups[names] = _Group(*names, [])
        group.rows.append(row)
    return list(groups.values())


def _storable(value: Any) -> Any:
    """The value without the one character that PostgreSQL's text cannot hold: a process may log anything."""
    return value.replace("\0", "\ufffd") if isinstance(value, str) and "\0" in value else value


class Tables:
    """The tables of these names in the schema where plain names live; no row of them refers to another.

    The same names are other tables in a rebuild, as of a position and after a rebuild, maybe with other columns: what
    the catalog says is remembered for the very tables that it was asked about.
    """

    def __init__(self, *names: str) -> None:
        self._names = names
        self._known: tuple[list[int | None], dict[str, _Table]] = ([], {})

    async def write(self, connection: Connection, changes: Iterable[Change]) -> None:
        """These changes, in order."""
        tables = await self._tables(connection)
        pending: dict[str, _Pending] = {}
        for number, change in enumerate(changes, 1):
            table = pending.get(change.table)
            if table is None:
                table = pending[change.table] = _Pending(tables[change.table])
            table.take(change)
            if number % _SLICE == 0:
                await asyncio.sleep(0)
        for table in pending.values():
            await table.write(connection)

    async def _tables(self, connection: Connection) -> dict[str, _Table]:
        places: list[int | None] = await connection.fetchval(_PLACES, self._names)
        known, tables = self._known
        if places != known:
            tables = await self._read_catalog(connection)
            self._known = places, tables
        return tables

    async def _read_catalog(self, connection: Connection) -> dict[str, _Table]:
        tables = await columns_of(connection, self._names)
        if missing := [name for name, columns in tables.items() if not columns]:
            raise LookupError(f"there is no table {', '.join(missing)}")
        return {
            name: _Table(
                name,
                {column["name"]: column["type"] for column in columns},
                tuple(column["name"] for column in columns if column["is_key"]),
            )
            for name, columns in tables.items()
        }


async def columns_of(connection: Connection, names: Sequence[str]) -> dict[str, list[Row]]:
    """What the catalog says of each column of each of these tables, in order; of no column where there is no table."""
    rows = await connection.fetch(_COLUMNS, names)
    return {name: [dict(row) for row in rows if row["table"] == name] for name in names}


def writing(changes: Callable[[Event], Iterable[Change]], *names: str) -> BatchHandler:
    """The handler that writes what events change in the tables of these names."""
    tables = Tables(*names)

    async def write(connection: Connection, events: Sequence[Event]) -> None:
        await tables.write(connection, (change for event in events for change in changes(event)))

    return write
