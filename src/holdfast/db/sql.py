"""Small SQL pieces that both dialects write differently, with a text that does not change with the data.

A constant text keeps the statement caches of SQLAlchemy, asyncpg and PostgreSQL useful: `IN (…)` with a varying number
of parameters would be another statement for every batch size.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import msgspec
from sqlalchemy import BindParameter, ColumnElement, Table, TableValuedAlias, any_, bindparam, column, func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.types import TypeEngine

from holdfast.db.database import Tx


def insert(tx: Tx, table: Table) -> postgresql.Insert | sqlite.Insert:
    """An INSERT that knows ON CONFLICT."""
    return postgresql.insert(table) if tx.dialect == "postgresql" else sqlite.insert(table)


def rows_of(tx: Tx, values: Collection[Any], kind: TypeEngine[Any]) -> TableValuedAlias:
    """The values as a table with one column `value`: `unnest(array)` on PostgreSQL, `json_each` on SQLite."""
    if tx.dialect == "postgresql":
        array: BindParameter[Any] = bindparam(None, list(values), type_=postgresql.ARRAY(kind))
        return func.unnest(array).table_valued(column("value", kind), name="given").render_derived()
    document: BindParameter[str] = bindparam(None, msgspec.json.encode(list(values)).decode())
    return func.json_each(document).table_valued(column("value", kind), name="given")


def among(tx: Tx, where: ColumnElement[Any], values: Collection[Any]) -> ColumnElement[bool]:
    """`where` is one of the values."""
    if tx.dialect == "postgresql":
        return where == any_(bindparam(None, list(values), type_=postgresql.ARRAY(where.type)))
    return where.in_(select(rows_of(tx, values, where.type).c.value))
