"""Prepared statements: the driver's speed with the transaction's promises, on each backend."""

from __future__ import annotations

import pytest
from sqlalchemy import Text, bindparam, select, update

from holdfast.db.border import ConstraintFailed
from holdfast.db.database import Database
from holdfast.db.prepared import VALUES_ROWS, InsertAll, Prepared, among, insert, rows_of
from holdfast.errors import Conflict, HoldfastError
from tests.db.jars import content, jars, make_jars

PUT = InsertAll(jars)
FIND = Prepared(lambda dialect: select(jars).where(among(dialect, jars.c.name, "names")).order_by(jars.c.name))
GIVEN = Prepared(lambda dialect: select(rows_of(dialect, "names", Text()).c.value))
ADD = Prepared(
    lambda _: (
        update(jars)
        .where(jars.c.name == bindparam("jar"), jars.c.beans + bindparam("more") <= bindparam("at_most"))
        .values(beans=jars.c.beans + bindparam("more"))
        .returning(jars.c.name, jars.c.beans)
    )
)
PUT_ONCE = Prepared(
    lambda dialect: insert(dialect, jars).values(name=bindparam("jar"), beans=7).on_conflict_do_nothing()
)


async def test_rows_come_with_the_names_of_their_columns(database: Database) -> None:
    async with database.transaction() as tx:
        await PUT.many(tx, [{"name": "a", "beans": 1}, {"name": "b", "beans": 2}, {"name": "c", "beans": 3}])
        found = await FIND.rows(tx, names=["c", "a", "nobody", "a"])
        assert [(row.name, row.beans) for row in found] == [("a", 1), ("c", 3)]
    assert await content(database) == {"a": 1, "b": 2, "c": 3}


@pytest.mark.parametrize("names", [[], ["x"], ["b", "a", "b"], ["'; DROP TABLE jar; --", '"', "\\", "käse 🧀", "{}"]])
async def test_a_list_is_given_as_it_is(database: Database, names: list[str]) -> None:
    async with database.transaction() as tx:
        assert sorted(row.value for row in await GIVEN.rows(tx, names=names)) == sorted(names)
        assert await FIND.rows(tx, names=names) == []


async def test_what_a_statement_returns_is_fetched(database: Database) -> None:
    await make_jars(database, "a")
    async with database.transaction() as tx:
        assert [tuple(row) for row in await ADD.rows(tx, jar="a", more=5, at_most=9)] == [("a", 5)]
        assert await ADD.rows(tx, jar="a", more=5, at_most=9) == []
    assert await content(database) == {"a": 5}


async def test_values_that_are_part_of_the_statement_need_not_be_given(database: Database) -> None:
    async with database.transaction() as tx:
        await PUT_ONCE.many(tx, [{"jar": "a"}, {"jar": "a"}, {"jar": "b"}])
    assert await content(database) == {"a": 7, "b": 7}


async def test_nothing_to_run_runs_nothing(database: Database) -> None:
    async with database.transaction() as tx:
        await PUT.many(tx, [])
    assert await content(database) == {}


@pytest.mark.parametrize("by", ["name", "order"])
@pytest.mark.parametrize("count", [1, VALUES_ROWS - 1, VALUES_ROWS, VALUES_ROWS + 1, 3 * VALUES_ROWS + 7])
async def test_rows_however_many_are_all_inserted(database: Database, count: int, by: str) -> None:
    rows = [(f"jar {number}", number) for number in range(count)]
    async with database.transaction() as tx:
        if by == "name":
            await PUT.many(tx, [{"beans": beans, "name": name} for name, beans in rows])
        else:
            await PUT.tuples(tx, rows)
    assert await content(database) == dict(rows)


@pytest.mark.parametrize("at", [0, VALUES_ROWS - 1, VALUES_ROWS, 2 * VALUES_ROWS + 1])
async def test_one_taken_key_among_many_rows_is_a_conflict_and_none_is_inserted(database: Database, at: int) -> None:
    await make_jars(database, f"jar {at}")
    with pytest.raises(Conflict):
        async with database.transaction() as tx:
            await PUT.tuples(tx, [(f"jar {number}", 1) for number in range(2 * VALUES_ROWS + 2)])
    assert await content(database) == {f"jar {at}": 0}


async def test_what_is_rolled_back_is_gone(database: Database) -> None:
    async def work() -> None:
        async with database.transaction() as tx:
            await PUT.many(tx, [{"name": "a", "beans": 1}])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        await work()
    assert await content(database) == {}


async def test_statements_of_both_kinds_share_one_transaction(database: Database) -> None:
    async with database.transaction() as tx:
        await PUT.many(tx, [{"name": "a", "beans": 1}])
        assert (await tx.execute(select(jars.c.beans))).scalar_one() == 1
        await tx.execute(update(jars).values(beans=2))
        assert [row.beans for row in await FIND.rows(tx, names=["a"])] == [2]
        assert await content(database) == {}
    assert await content(database) == {"a": 2}


async def test_a_taken_key_is_a_conflict_here_too(database: Database) -> None:
    await make_jars(database, "a")
    with pytest.raises(Conflict) as caught:
        async with database.transaction() as tx:
            await PUT.many(tx, [{"name": "b", "beans": 1}, {"name": "a", "beans": 1}])
    assert caught.value.__cause__ is not None
    assert await content(database) == {"a": 0}


@pytest.mark.parametrize("beans", [-1, None])
async def test_a_broken_rule_of_the_table_is_a_failed_constraint_here_too(
    database: Database, beans: int | None
) -> None:
    with pytest.raises(ConstraintFailed):
        async with database.transaction() as tx:
            await PUT.many(tx, [{"name": "a", "beans": beans}])
    assert await content(database) == {}


@pytest.mark.parametrize(
    "value",
    [2**80, "half a pair \ud800", "a nul \x00 byte", b"\xff", object()],
    ids=["huge", "surrogate", "nul", "bytes", "object"],
)
@pytest.mark.parametrize("column", ["name", "beans"])
async def test_a_value_a_column_cannot_hold_does_not_look_like_a_database_that_is_away(
    database: Database, column: str, value: object
) -> None:
    try:
        async with database.transaction() as tx:
            await PUT.many(tx, [{"name": "a", "beans": 1} | {column: value}])
    except Exception as error:
        assert not (isinstance(error, HoldfastError) and error.retryable), error  # noqa: PT017  # SQLite takes some
    async with database.transaction() as tx:
        await PUT.many(tx, [{"name": "after", "beans": 1}])


@pytest.mark.parametrize("names", [["\ud800"], [7], [object()]], ids=["surrogate", "integer", "object"])
async def test_a_list_the_database_cannot_hold_does_not_look_like_a_database_that_is_away(
    database: Database, names: list[object]
) -> None:
    try:
        async with database.transaction() as tx:
            await FIND.rows(tx, names=names)
    except Exception as error:
        assert not (isinstance(error, HoldfastError) and error.retryable), error  # noqa: PT017  # SQLite takes some
    async with database.transaction() as tx:
        await PUT.many(tx, [{"name": "after", "beans": 1}])


async def test_a_snapshot_holds_for_statements_on_the_driver_too(database: Database) -> None:
    await make_jars(database, "a")
    async with database.read(snapshot=True) as tx:
        assert [row.beans for row in await FIND.rows(tx, names=["a"])] == [0]
        async with database.transaction() as other:
            await ADD.rows(other, jar="a", more=5, at_most=9)
        assert [row.beans for row in await FIND.rows(tx, names=["a"])] == [0]
        assert (await tx.execute(select(jars.c.beans))).scalar_one() == 0
    async with database.read(snapshot=True) as tx:
        assert [row.beans for row in await FIND.rows(tx, names=["a"])] == [5]
