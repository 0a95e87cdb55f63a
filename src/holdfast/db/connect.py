"""Open the database a URL names."""

from __future__ import annotations

from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from holdfast.db.database import Database
from holdfast.db.postgres import PostgresDatabase
from holdfast.db.sqlite import MEMORY, SqliteDatabase
from holdfast.errors import InvalidSettings
from holdfast.settings import DatabaseSettings


async def connect(settings: DatabaseSettings, *, read_only: bool = False) -> Database:
    """Open `sqlite:///file.db`, `sqlite://` (in memory) or `postgresql://user@host/name`.

    Raises `InvalidSettings` for another URL and whatever the database's own `open` raises.
    """
    try:
        url = make_url(settings.url)
    except ArgumentError as error:
        raise InvalidSettings("HOLDFAST_DATABASE is not a URL; write sqlite:///file.db or postgresql://…") from error
    match url.get_backend_name():
        case "sqlite":
            return await SqliteDatabase.open(url.database or MEMORY, readers=settings.readers, read_only=read_only)
        case "postgresql":
            return await PostgresDatabase.open(
                url, pool_size=settings.pool_size, statement_timeout_ms=settings.statement_timeout_ms
            )
        case other:
            raise InvalidSettings(f"HOLDFAST_DATABASE: {other} is not supported; use sqlite:/// or postgresql://")
