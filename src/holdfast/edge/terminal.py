"""What commands share: the database they ask, tables and JSON, and text of unknown origin made harmless."""

from __future__ import annotations

import getpass
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import typer

from holdfast import observe
from holdfast.db.connect import connect
from holdfast.db.database import Database
from holdfast.db.migrate import History, require_current
from holdfast.messaging.tables import HISTORY
from holdfast.settings import Settings, load


@asynccontextmanager
async def database_of_settings(
    *, read_only: bool, histories: Sequence[History] = (HISTORY,)
) -> AsyncIterator[Database]:
    """The configured database, migrated; raises what connecting raises, `SchemaOutdated`, `InvalidSettings`."""
    settings = settings_with_logs()
    database = await connect(settings.database, read_only=read_only, create=False)
    try:
        await require_current(database, histories)  # a program of the toolkit has no other tables than messaging's
        yield database
    finally:
        await database.close()


def settings_with_logs() -> Settings:
    """The settings, and logs as they say."""
    settings = load()
    observe.configure_logs(settings.log.format, settings.log.level)
    return settings


def actor_or_user(given: str | None) -> str:
    """Who does this, for the audit: who was named, or the user of the operating system."""
    if given is not None:
        return given
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # no name belongs to this user, as in some containers
        return f"uid {os.getuid()}"


def print_json(value: Any) -> None:
    """A value that msgspec can encode, indented."""
    typer.echo(msgspec.json.format(msgspec.json.encode(value)).decode())


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns, the last one as long as it is: one line for each row, whatever the terminal's width."""
    lines = [head, *([safe(cell).replace("\n", " ") for cell in row] for row in rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(head) - 1)]
    for line in lines:
        typer.echo("  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]))


def safe(text: str) -> str:
    """Text of unknown origin for a terminal: control characters are written out, so that none is obeyed."""
    return "".join(each if each.isprintable() or each == "\n" else repr(each)[1:-1] for each in text)
