"""The registry of transports, imported lazily so that client libraries stay optional."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module

from holdfast.clock import Clock
from holdfast.db.database import Database
from holdfast.db.group_commit import GroupCommit
from holdfast.db.postgres import PostgresDatabase
from holdfast.ids import IdSource
from holdfast.messaging.transports.sql.transport import SqlTransport
from holdfast.messaging.transports.sql.wakeups import Wakeups
from holdfast.settings import MessagingSettings


@asynccontextmanager
async def sql_transport(
    database: Database, group: GroupCommit, clock: Clock, ids: IdSource, settings: MessagingSettings
) -> AsyncIterator[SqlTransport]:
    """The transport over the tables of `database`, with LISTEN/NOTIFY where that is PostgreSQL."""
    wakeups = Wakeups()
    notifier = None
    if isinstance(database, PostgresDatabase):
        module = import_module("holdfast.messaging.transports.sql.notify")
        notifier = module.Notifier(database.url, wakeups, clock, ids.next())
        notifier.start()
    transport = SqlTransport(
        database, group, clock, ids, settings, wakeups=wakeups, tell_others=notifier.send if notifier else None
    )
    try:
        await transport.start()
        yield transport
    finally:
        await transport.close()
        if notifier is not None:
            await notifier.close()
