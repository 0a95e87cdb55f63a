"""What the order engine's commands share: a look at the database of the settings, or a system that does something."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from holdfast.bootstrap import HISTORIES, System, running
from holdfast.db.database import Database
from holdfast.edge.terminal import database_of_settings, settings_with_logs

D = TypeVar("D")
T = TypeVar("T")


def look(desk_of: Callable[[Database], D], question: Callable[[D], Awaitable[T]]) -> T:
    """Ask something of a desk on the database, read-only: also beside a running server."""

    async def run() -> T:
        async with database_of_settings(read_only=True, histories=HISTORIES) as database:
            return await question(desk_of(database))

    return asyncio.run(run())


def change(work: Callable[[System], Awaitable[T]]) -> T:
    """Have a whole system do something; its workers do not run. Refused on SQLite while a server runs."""

    async def run() -> T:
        async with running(settings_with_logs()) as system:
            return await work(system)

    return asyncio.run(run())
