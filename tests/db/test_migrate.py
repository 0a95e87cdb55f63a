"""Migrations: repeatable, safe from two processes, and equal to what the code believes the tables are."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import CheckConstraint, Connection, MetaData, inspect, text

from holdfast.bootstrap import HISTORIES, migrate_all, running
from holdfast.db.connect import connect
from holdfast.db.database import Database
from holdfast.db.migrate import migrate, require_current
from holdfast.errors import SchemaOutdated
from holdfast.messaging.tables import metadata as messaging_metadata
from holdfast.services.schema import metadata as services_metadata
from holdfast.settings import DatabaseSettings, Settings
from tests.conftest import quick_settings

ROOT = Path(__file__).resolve().parents[2]
ROOMS = {"messaging": messaging_metadata, "services": services_metadata}
HEADS = {history.name: history.script().get_current_head() for history in HISTORIES}

MIGRATE = """
import asyncio, sys
from holdfast.bootstrap import migrate_all
from holdfast.errors import HoldfastError
from holdfast.settings import DatabaseSettings, Settings
try:
    moved = asyncio.run(migrate_all(Settings(database=DatabaseSettings(url=sys.argv[1]))))
    print(*(name for name, (before, after) in sorted(moved.items()) if before != after))
except HoldfastError as error:
    print(error.code)
"""


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """An open, empty database."""
    opened = await connect(DatabaseSettings(url=database_url))
    yield opened
    await opened.close()


async def inspected(database: Database, look: Any) -> Any:
    async with database.read() as tx:
        return await tx.connection.run_sync(look)


async def test_migrating_twice_changes_nothing_the_second_time(database: Database) -> None:
    assert await migrate(database, HISTORIES) == {name: (None, head) for name, head in HEADS.items()}
    assert await migrate(database, HISTORIES) == {name: (head, head) for name, head in HEADS.items()}


async def test_migrate_all_opens_and_closes_the_database_by_itself(database_url: str) -> None:
    settings = Settings(database=DatabaseSettings(url=database_url))
    assert {name: after for name, (_, after) in (await migrate_all(settings)).items()} == HEADS
    assert {name: before for name, (before, _) in (await migrate_all(settings)).items()} == HEADS


async def test_an_unmigrated_database_is_refused_naming_the_rooms(database: Database) -> None:
    with pytest.raises(SchemaOutdated, match=r"messaging, services; run `holdfast migrate`"):
        await require_current(database, HISTORIES)
    await migrate(database, [HISTORIES[0]])
    with pytest.raises(SchemaOutdated, match=r"of: services;"):
        await require_current(database, HISTORIES)
    await migrate(database, HISTORIES)
    await require_current(database, HISTORIES)


async def test_a_system_does_not_start_before_the_migration(database_url: str) -> None:
    settings = quick_settings(database_url)
    with pytest.raises(SchemaOutdated):
        async with running(settings):
            pass
    await migrate_all(settings)
    async with running(settings):
        pass


async def test_a_failed_migration_leaves_nothing_behind(database: Database) -> None:
    def tables(connection: Connection) -> list[str]:
        return inspect(connection).get_table_names()

    async with database.transaction() as tx:
        await tx.execute(text("CREATE TABLE order_order (in_the_way integer)"))
    with pytest.raises(Exception, match="order_order"):
        await migrate(database, HISTORIES)
    assert await inspected(database, tables) == ["order_order"]

    async with database.transaction() as tx:
        await tx.execute(text("DROP TABLE order_order"))
    assert await migrate(database, HISTORIES) == {name: (None, head) for name, head in HEADS.items()}


@pytest.mark.parametrize("room", sorted(ROOMS))
async def test_the_migrated_schema_is_the_one_in_the_code(database: Database, room: str) -> None:
    metadata = ROOMS[room]
    await migrate(database, HISTORIES)

    def differences(connection: Connection) -> list[Any]:
        def ours(name: str | None, kind: str, _: Any) -> bool:
            return kind != "table" or name in metadata.tables

        options = {"compare_type": True, "compare_server_default": True, "include_name": ours}
        return list(compare_metadata(MigrationContext.configure(connection, opts=options), metadata))

    assert await inspected(database, differences) == []


async def test_the_migrated_tables_and_no_others_are_in_the_code(database: Database) -> None:
    await migrate(database, HISTORIES)

    def tables(connection: Connection) -> set[str]:
        return set(inspect(connection).get_table_names())

    known = {name for metadata in ROOMS.values() for name in metadata.tables}
    assert await inspected(database, tables) == known | {history.version_table for history in HISTORIES}


@pytest.mark.parametrize("room", sorted(ROOMS))
async def test_the_migrated_checks_and_primary_keys_are_those_in_the_code(database: Database, room: str) -> None:
    """What Alembic's comparison does not look at."""
    metadata = ROOMS[room]
    await migrate(database, HISTORIES)

    def keys(connection: Connection) -> dict[str, Any]:
        look = inspect(connection)
        return {
            name: (
                {check["name"] for check in look.get_check_constraints(name)},
                look.get_pk_constraint(name)["constrained_columns"],
            )
            for name in metadata.tables
        }

    assert await inspected(database, keys) == {name: declared(metadata, name) for name in metadata.tables}


def declared(metadata: MetaData, name: str) -> tuple[set[str], list[str]]:
    """The names of a table's checks and the columns of its primary key."""
    table = metadata.tables[name]
    checks = [constraint for constraint in table.constraints if isinstance(constraint, CheckConstraint)]
    prefix = f"ck_{name}_"
    named = {str(check.name) for check in checks}
    return {each if each.startswith(prefix) else prefix + each for each in named}, [
        column.name for column in table.primary_key.columns
    ]


async def test_two_processes_that_migrate_at_once_migrate_once(database_url: str) -> None:
    command = [sys.executable, "-c", MIGRATE, database_url]
    pipe = asyncio.subprocess.PIPE
    started = [
        await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=pipe, stderr=subprocess.STDOUT)
        for _ in range(2)
    ]
    outputs = sorted([(await process.communicate())[0].decode().strip() for process in started])

    assert [process.returncode for process in started] == [0, 0], outputs
    if database_url.startswith("sqlite"):
        assert outputs in (["", "messaging services"], ["database_in_use", "messaging services"])
    else:
        assert outputs == ["", "messaging services"]
    opened = await connect(DatabaseSettings(url=database_url))
    await require_current(opened, HISTORIES)
    await opened.close()
