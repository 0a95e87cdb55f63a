"""Many rows at once: on PostgreSQL they go by COPY, and nobody can tell but by the time it takes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import asyncpg
import pytest
from sqlalchemy import BigInteger, Column, LargeBinary, MetaData, Table, Text, select
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.schema import CreateTable

from holdfast.db.border import ConstraintFailed, KeyTaken
from holdfast.db.database import Database, Tx
from holdfast.db.enlist import enlist
from holdfast.db.prepared import COPY_FROM, InsertAll
from holdfast.errors import HoldfastError
from tests.db.jars import content, jars, make_jars
from tests.db.test_postgres import opened

PUT = InsertAll(jars)
things = Table(
    "thing",
    MetaData(),
    Column("id", BigInteger, primary_key=True),
    Column("told", Text),
    Column("raw", LargeBinary),
    Column("size", BigInteger),
)
PUT_THINGS = InsertAll(things)
Way = Callable[[Tx, Sequence[Mapping[str, Any]]], Any]


async def by_name(tx: Tx, rows: Sequence[Mapping[str, Any]]) -> None:
    await PUT.many(tx, rows)


async def by_place(tx: Tx, rows: Sequence[Mapping[str, Any]]) -> None:
    await PUT.tuples(tx, [(row["name"], row["beans"]) for row in rows])


WAYS = pytest.mark.parametrize("put_all", [by_name, by_place])


def rows_of(count: int) -> list[dict[str, Any]]:
    return [{"name": str(number), "beans": number} for number in range(count)]


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each COPY had."""
    counts: list[int] = []
    copy = Tx.copy

    async def noted(self: Tx, table: str, columns: Sequence[str], rows: Collection[Sequence[Any]]) -> None:
        counts.append(len(rows))
        await copy(self, table, columns, rows)

    monkeypatch.setattr(Tx, "copy", noted)
    return counts


@pytest.fixture
async def with_things(database: Database) -> Database:
    async with database.transaction() as tx:
        await tx.execute(CreateTable(things))
    return database


@WAYS
@pytest.mark.parametrize("count", [0, 1, COPY_FROM - 1, COPY_FROM, COPY_FROM + 1, 1_000])
async def test_every_row_is_there_once_however_many_there_are(
    database: Database, put_all: Way, count: int, copied: list[int]
) -> None:
    async with database.transaction() as tx:
        await put_all(tx, rows_of(count))
    assert await content(database) == {str(number): number for number in range(count)}
    assert copied == ([count] if database.dialect == "postgresql" and count >= COPY_FROM else [])


@WAYS
@pytest.mark.parametrize("at", [0, COPY_FROM // 2, COPY_FROM])
async def test_a_taken_key_voids_the_transaction_and_leaves_none_of_the_rows(
    database: Database, put_all: Way, at: int
) -> None:
    await make_jars(database, "taken")
    rows = rows_of(COPY_FROM)
    rows.insert(at, {"name": "taken", "beans": 77})
    woken: list[str] = []

    async def work() -> None:
        async with database.transaction() as tx:
            tx.on_commit(lambda: woken.append("x"))
            await PUT.many(tx, [{"name": "before", "beans": 1}])
            with suppress(KeyTaken):  # the transaction is void all the same
                await put_all(tx, rows)

    with pytest.raises(KeyTaken) as caught:
        await work()
    assert "77" not in caught.value.detail
    assert caught.value.__cause__ is not None
    assert woken == []
    assert await content(database) == {"taken": 0}


@pytest.mark.parametrize("beans", [-1, None])
async def test_a_broken_rule_is_a_failed_constraint_also_of_one_among_many(
    database: Database, beans: int | None
) -> None:
    with pytest.raises(ConstraintFailed):
        async with database.transaction() as tx:
            await PUT.many(tx, [*rows_of(COPY_FROM), {"name": "odd", "beans": beans}])
    assert await content(database) == {}


@pytest.mark.parametrize("count", [COPY_FROM - 1, COPY_FROM])
async def test_values_survive_as_they_are(with_things: Database, count: int) -> None:
    told = ["", "käse 🧀", "\\N", "\\.", "a\tb\nc\rd", '"quoted"', "'; DROP TABLE thing; --", "\ufeff\u200f", None]
    raw = [b"", b"\x00\xff\xfe", bytes(range(256)) * 40, b"\\x41", None]
    size = [0, -1, 2**63 - 1, -(2**63), None]
    rows = [
        {
            "id": number,
            "told": told[number % len(told)],
            "raw": raw[number % len(raw)],
            "size": size[number % len(size)],
        }
        for number in range(count)
    ]
    async with with_things.transaction() as tx:
        await PUT_THINGS.many(tx, rows)
    async with with_things.read() as tx:
        found = (await tx.execute(select(things).order_by(things.c.id))).all()
    assert [tuple(row) for row in found] == [tuple(row.values()) for row in rows]


@pytest.mark.parametrize(
    "change",
    [
        {"told": "a nul \x00 byte"},
        {"told": "half a pair \ud800"},
        {"told": 7},
        {"told": object()},
        {"raw": "text"},
        {"size": 2**63},
        {"size": "many"},
    ],
    ids=["nul", "surrogate", "number", "object", "text for bytes", "too large", "text for a number"],
)
@pytest.mark.parametrize("count", [1, COPY_FROM])
async def test_a_value_a_column_cannot_hold_does_not_look_like_a_database_that_is_away(
    with_things: Database, change: dict[str, object], count: int
) -> None:
    """Otherwise one odd message would make its neighbours wait and be tried again for ever."""
    rows = [{"id": number, "told": "x", "raw": b"x", "size": 1} for number in range(count)]
    rows[-1] |= change
    refused = False
    try:
        async with with_things.transaction() as tx:
            await PUT_THINGS.many(tx, rows)
    except Exception as error:
        refused = True
        assert not (isinstance(error, HoldfastError) and error.retryable), error  # noqa: PT017  # SQLite takes some
    assert refused or with_things.dialect == "sqlite"
    async with with_things.transaction() as tx:
        await PUT_THINGS.many(tx, [{"id": 1_000 + n, "told": "y", "raw": b"", "size": n} for n in range(COPY_FROM)])
    async with with_things.read() as tx:
        found = (await tx.execute(select(things.c.id))).scalars().all()
    assert len(found) == COPY_FROM + (0 if refused else count)


async def test_a_transaction_of_somebody_else_is_never_copied_into(
    database: Database, database_url: str, copied: list[int]
) -> None:
    """His driver may not have it, or may be in the middle of something of his own."""
    driver = "postgresql+asyncpg" if database.dialect == "postgresql" else "sqlite+aiosqlite"
    engine = create_async_engine(database_url.replace(database_url.partition(":")[0], driver))
    try:
        async with engine.begin() as connection:
            tx = await enlist(connection)
            assert not tx.copies
            await PUT.many(tx, rows_of(COPY_FROM + 10))
            await PUT.tuples(tx, [(f"more {number}", 1) for number in range(COPY_FROM + 10)])
    finally:
        await engine.dispose()
    assert len(await content(database)) == 2 * (COPY_FROM + 10)
    assert copied == []


async def test_an_asyncpg_connection_of_somebody_else_is_never_copied_into(
    postgres_url: str, copied: list[int]
) -> None:
    connection = await asyncpg.connect(postgres_url.replace("+asyncpg", ""))
    try:
        async with opened(postgres_url) as database:
            await make_jars(database)
            async with connection.transaction():
                tx = await enlist(connection)
                assert not tx.copies
                await PUT.many(tx, rows_of(COPY_FROM + 10))
            assert len(await content(database)) == COPY_FROM + 10
    finally:
        await connection.close()
    assert copied == []
