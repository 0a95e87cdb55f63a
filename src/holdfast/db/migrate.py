"""Alembic migrations, one history per room, applied in one transaction under a lock.

Safe to run twice and from two processes at once: PostgreSQL by an advisory lock in the migrating transaction, SQLite by
the file lock that only one writing process can hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.runtime.environment import EnvironmentContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from holdfast.db.database import Database
from holdfast.errors import SchemaOutdated

_ADVISORY_LOCK = 0x686F6C64  # "hold"; any number of ours that no one else takes


class History(msgspec.Struct, frozen=True, kw_only=True):
    """One room's migrations: its name and the folder that holds `versions/`."""

    name: str
    folder: Path

    @property
    def version_table(self) -> str:
        return f"holdfast_{self.name}_version"

    def script(self) -> ScriptDirectory:
        config = Config()
        config.set_main_option("script_location", str(self.folder))
        config.set_main_option("path_separator", "os")
        return ScriptDirectory.from_config(config)


async def migrate(database: Database, histories: Sequence[History]) -> dict[str, tuple[str | None, str | None]]:
    """Bring every room to its newest revision; answers room -> (revision before, revision after)."""
    moved = {}
    async with database.transaction() as tx:
        if database.dialect == "postgresql":
            await tx.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
        for history in histories:
            before = await tx.connection.run_sync(_revision, history)
            await tx.connection.run_sync(_upgrade, history)
            after = await tx.connection.run_sync(_revision, history)
            moved[history.name] = (before, after)
    return moved


async def require_current(database: Database, histories: Sequence[History]) -> None:
    """Raise `SchemaOutdated` naming the rooms that `holdfast migrate` would change."""
    async with database.read() as tx:
        behind = [
            history.name
            for history in histories
            if await tx.connection.run_sync(_revision, history) != history.script().get_current_head()
        ]
    if behind:
        raise SchemaOutdated(f"the database lacks migrations of: {', '.join(behind)}; run `holdfast migrate`")


def _revision(connection: Connection, history: History) -> str | None:
    return MigrationContext.configure(connection, opts={"version_table": history.version_table}).get_current_revision()


def _upgrade(connection: Connection, history: History) -> None:
    script = history.script()

    def steps(revision: tuple[str, ...], _: MigrationContext) -> object:
        return script._upgrade_revs("head", revision)  # type: ignore[arg-type]  # Alembic's own cookbook calls it so

    with EnvironmentContext(Config(), script, fn=steps, destination_rev="head") as environment:
        environment.configure(connection=connection, version_table=history.version_table)
        environment.run_migrations()
