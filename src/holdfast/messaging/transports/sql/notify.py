"""LISTEN/NOTIFY: wake the subscriptions of other processes on PostgreSQL.

Sent after the commit, on a connection of its own and coalesced: NOTIFY inside the transaction would make all commits
of the database wait for one lock. What is lost while the connection is away, polling finds.
"""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
from sqlalchemy import URL

from holdfast import observe
from holdfast.clock import Clock
from holdfast.messaging.transports.sql.wakeups import CHANNEL, Wakeups, hint

RECONNECT_S = 1.0

log = observe.logger("notify")


class Notifier:
    """One asyncpg connection that listens and notifies."""

    def __init__(self, url: URL, wakeups: Wakeups, clock: Clock, instance: int) -> None:
        self._dsn = url.set(drivername="postgresql").render_as_string(hide_password=False)
        self._wakeups = wakeups
        self._clock = clock
        self._instance = instance
        self._pending: dict[str, int] = {}
        self._stirred = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="notify")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def send(self, queue: str, due_us: int) -> None:
        """Tell other processes; of several hints for one queue the earliest is sent."""
        self._pending[queue] = min(due_us, self._pending.get(queue, due_us))
        self._stirred.set()

    async def _run(self) -> None:
        while True:
            try:
                await self._serve()
            except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
                log.warning("notify_connection_lost", error=type(error).__name__)
            await self._clock.sleep(RECONNECT_S)

    async def _serve(self) -> None:
        connection = await asyncpg.connect(self._dsn, timeout=10, command_timeout=10)
        try:
            connection.add_termination_listener(lambda _: self._stirred.set())
            await connection.add_listener(CHANNEL, self._heard)
            while not connection.is_closed():
                await self._stirred.wait()
                self._stirred.clear()
                pending, self._pending = self._pending, {}
                for queue, due_us in pending.items():
                    payload = hint(self._instance, due_us, queue)
                    await connection.execute("SELECT pg_notify($1, $2)", CHANNEL, payload)
        finally:
            connection.terminate()

    def _heard(self, _connection: Any, _pid: int, _channel: str, payload: str) -> None:
        instance, _, rest = payload.partition(" ")
        due_us, _, queue = rest.partition(" ")
        if instance != str(self._instance) and due_us.isdigit():
            self._wakeups.tell([(queue, int(due_us))])
