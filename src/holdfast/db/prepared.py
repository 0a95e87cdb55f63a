"""Prepared: a hot statement, built and compiled once for each dialect, then run on the driver itself.

SQLAlchemy writes the SQL, so there is one statement for both dialects; its execution path is left out, since building,
caching and adapting cost more than the driver's own work (measured with 30 rows on asyncpg: 400 us of CPU for a SELECT
built anew, 150 us for the same object again, 35 us on the driver; an INSERT 310 us against 70 us).
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import ColumnElement, Executable, TableValuedAlias, any_, bindparam, column, func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.dialects.postgresql.asyncpg import dialect as asyncpg_dialect
from sqlalchemy.dialects.sqlite.aiosqlite import dialect as aiosqlite_dialect
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.types import TypeEngine

from holdfast.db.database import Dialect, Tx

COPY_FROM = 50  # rows
VALUES_ROWS = 50  # rows in one INSERT on SQLite

_COMPILERS = {"postgresql": asyncpg_dialect, "sqlite": aiosqlite_dialect}


class _Compiled(NamedTuple):
    statement: Executable
    text: str
    names: tuple[str, ...]  # parameters in the driver's order
    defaults: Mapping[str, Any]  # values that are part of the statement
    row: Callable[[Iterable[Any]], Any]
    pick: Callable[[Mapping[str, Any]], tuple[Any, ...]]  # parameters of one of many rows, no lists among them


class Prepared:
    """A statement whose text never changes; its parameters are named, lists among them for `among` and `rows_of`.

    Rows come as named tuples of the statement's columns. Only columns of integers, text and bytes: no value is
    converted on its way. Raises what `Tx.execute` raises.
    """

    def __init__(self, build: Callable[[Dialect], Executable]) -> None:
        self._build = build
        self._compiled: dict[Dialect, _Compiled] = {}

    async def rows(self, tx: Tx, **values: Any) -> list[Any]:
        """Run it once and fetch all rows."""
        compiled = self._compile(tx.dialect)
        if tx.takes_text:
            found = await tx.fetch(compiled.text, _arguments(compiled, tx.dialect, values))
        else:
            named = {name: _encoded(value, tx.dialect) for name, value in values.items()}
            result = await tx.execute(compiled.statement, named)
            found = result.all() if result.returns_rows else []
        return [compiled.row(each) for each in found]

    async def many(self, tx: Tx, rows: Collection[Mapping[str, Any]]) -> None:
        """Run it for each set of parameters; nothing is fetched."""
        if rows:
            compiled = self._compile(tx.dialect)
            if tx.takes_text:
                await tx.run_many(compiled.text, [compiled.pick(row) for row in rows])
            else:
                await tx.execute(compiled.statement, list(rows))

    def _compile(self, dialect: Dialect) -> _Compiled:
        if dialect not in self._compiled:
            statement = self._build(dialect)
            compiled = statement.compile(dialect=_COMPILERS[dialect]())  # type: ignore[attr-defined]
            assert isinstance(compiled, SQLCompiler)
            names = tuple(compiled.positiontup or ())
            defaults = {name: value for name, value in compiled.params.items() if value is not None}
            columns = [entry.keyname for entry in compiled._result_columns]
            row = namedtuple("Row", columns, rename=True)  # type: ignore[misc]  # named at run time
            pick = _picker(names, defaults)
            self._compiled[dialect] = _Compiled(statement, str(compiled), names, defaults, row._make, pick)
        return self._compiled[dialect]


class InsertAll(Prepared):
    """The plain INSERT of whole rows.

    On PostgreSQL many rows go by COPY, which costs the server a third (measured with rows of hf_message, 200 at a time:
    5.6 us each against 15.7 us); few do not, since it takes one round trip more. On SQLite they go by the VALUES of one
    statement, which costs two thirds (100 at a time: 8.7 us each against 12.8 us) and holds no other thread up between
    them.
    """

    def __init__(self, table: Any) -> None:
        super().__init__(lambda _: table.insert().values({each.name: bindparam(each.name) for each in table.columns}))
        self._table: str = table.name
        self._columns = tuple(each.name for each in table.columns)
        self._pick = itemgetter(*self._columns)
        self._values = ""

    async def many(self, tx: Tx, rows: Collection[Mapping[str, Any]]) -> None:
        """Insert rows given by column name."""
        if tx.takes_text:
            await self.tuples(tx, [self._pick(row) for row in rows])
        else:
            await super().many(tx, rows)

    async def tuples(self, tx: Tx, rows: Collection[Sequence[Any]]) -> None:
        """Insert rows whose values stand in the order of the table's columns."""
        if len(rows) >= COPY_FROM and tx.copies:
            await tx.copy(self._table, self._columns, rows)
        elif rows and tx.takes_text:
            compiled = self._compile(tx.dialect)
            assert compiled.names == self._columns
            await self._run_rows(tx, compiled.text, list(rows))
        else:
            await super().many(tx, [dict(zip(self._columns, row, strict=True)) for row in rows])

    async def _run_rows(self, tx: Tx, one: str, rows: list[Sequence[Any]]) -> None:
        whole = len(rows) - len(rows) % VALUES_ROWS if tx.dialect == "sqlite" else 0
        for start in range(0, whole, VALUES_ROWS):
            chunk = rows[start : start + VALUES_ROWS]
            await tx.fetch(self._values_text(one), [value for row in chunk for value in row])
        if whole < len(rows):
            await tx.run_many(one, rows[whole:])

    def _values_text(self, one: str) -> str:
        if not self._values:
            row = f"({', '.join('?' * len(self._columns))})"
            assert one.endswith(row)
            self._values = one + f", {row}" * (VALUES_ROWS - 1)
        return self._values


def insert(dialect: Dialect, table: Any) -> postgresql.Insert | sqlite.Insert:
    """An INSERT that knows ON CONFLICT."""
    return postgresql.insert(table) if dialect == "postgresql" else sqlite.insert(table)


def rows_of(dialect: Dialect, name: str, kind: TypeEngine[Any]) -> TableValuedAlias:
    """The list parameter `name` as a table with one column `value`: `unnest` on PostgreSQL, `json_each` on SQLite."""
    if dialect == "postgresql":
        array = bindparam(name, type_=postgresql.ARRAY(kind))
        return func.unnest(array).table_valued(column("value", kind), name="given").render_derived()
    return func.json_each(bindparam(name)).table_valued(column("value", kind), name="given")


def among(dialect: Dialect, where: ColumnElement[Any], name: str) -> ColumnElement[bool]:
    """`where` is one of the list parameter `name`."""
    if dialect == "postgresql":
        return where == any_(bindparam(name, type_=postgresql.ARRAY(where.type)))
    return where.in_(select(rows_of(dialect, name, where.type).c.value))


def _arguments(compiled: _Compiled, dialect: Dialect, values: Mapping[str, Any]) -> tuple[Any, ...]:
    defaults = compiled.defaults
    return tuple(_encoded(values[name], dialect) if name in values else defaults[name] for name in compiled.names)


def _picker(names: tuple[str, ...], defaults: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
    if len(names) > 1 and not set(names) & set(defaults):
        return itemgetter(*names)  # the common INSERT; twice as fast as the general way
    return lambda row: tuple(row[name] if name in row else defaults[name] for name in names)


def _encoded(value: Any, dialect: Dialect) -> Any:
    if isinstance(value, (list, set, frozenset)):
        return list(value) if dialect == "postgresql" else msgspec.json.encode(list(value)).decode()
    return value
