"""Open the database a URL names."""

from __future__ import annotations

from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from holdfast.db.database import Database
from holdfast.db.postgres import PostgresDatabase
from holdfast.db.sqlite import MEMORY, SqliteDatabase
from holdfast.errors import InvalidSettings
from holdfast.settings import DatabaseSettings

URL_OPTIONS = {"host", "port", "ssl"}


async def connect(settings: DatabaseSettings, *, read_only: bool = False, create: bool = True) -> Database:
    """Open `sqlite:///file.db`, `sqlite://` (in memory) or `postgresql://user@host/name`.

    Without `create` a SQLite file must be there already. Raises `InvalidSettings` for another URL and whatever the
    database's own `open` raises.
    """
    try:
        url = make_url(settings.url)
    except (ArgumentError, ValueError) as error:
        raise InvalidSettings("HOLDFAST_DATABASE is not a URL; write sqlite:///file.db or postgresql://…") from error
    if url.port is not None and not 0 < url.port < 65_536:
        raise InvalidSettings(f"HOLDFAST_DATABASE: {url.port} is no port; ports are 1 to 65535")
    if odd := set(url.query) - URL_OPTIONS:
        raise InvalidSettings(f"HOLDFAST_DATABASE: the URL's option {min(odd)!r} is unknown; known: host, port, ssl")
    match url.get_backend_name():
        case "sqlite":
            path = url.database or MEMORY
            return await SqliteDatabase.open(path, readers=settings.readers, read_only=read_only, create=create)
        case "postgresql":
            return await PostgresDatabase.open(
                url, pool_size=settings.pool_size, statement_timeout_ms=settings.statement_timeout_ms
            )
        case other:
            raise InvalidSettings(f"HOLDFAST_DATABASE: {other} is not supported; use sqlite:/// or postgresql://")
