"""The toolkit put together: one call gives publisher, outbox, inbox and listeners over a database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar

import msgspec

from holdfast import observe
from holdfast.clock import Clock, SystemClock
from holdfast.db.database import Database
from holdfast.db.group_commit import GroupCommit
from holdfast.db.migrate import require_current
from holdfast.ids import IdSource
from holdfast.messaging.codec import Codec
from holdfast.messaging.error_store import ErrorStore
from holdfast.messaging.inbox import Inbox
from holdfast.messaging.injection import Incoming
from holdfast.messaging.listen import Listen
from holdfast.messaging.listener import Listener
from holdfast.messaging.outbox import Outbox
from holdfast.messaging.publisher import Publisher
from holdfast.messaging.queue_gauges import QueueGauges
from holdfast.messaging.recover import Park, Recoverer, Republish, error_topology
from holdfast.messaging.request import Requester, reply
from holdfast.messaging.tables import HISTORY
from holdfast.messaging.topology import Topology
from holdfast.messaging.transports.registry import sql_transport
from holdfast.messaging.transports.sql.insight import Peeked
from holdfast.messaging.transports.sql.transport import SqlTransport
from holdfast.settings import DatabaseSettings, MessagingSettings

L = TypeVar("L", bound=Listener)


class Messaging(msgspec.Struct, frozen=True, kw_only=True):
    """The running toolkit."""

    clock: Clock
    ids: IdSource
    group: GroupCommit
    transport: SqlTransport
    codec: Codec
    inbox: Inbox
    outbox: Outbox
    publisher: Publisher
    error_store: ErrorStore
    recover: Recoverer
    queue_gauges: QueueGauges
    drain_s: float
    listeners: list[Listener]

    def listen(self, listen: Listen) -> Listener:
        """Start a listener; it stops with the toolkit."""
        listener = self._prepared(Listener, listen)
        listener.start()
        return listener

    def _prepared(self, kind: type[L], listen: Listen) -> L:
        """A listener with the toolkit's parts, which stops with it and is still to be started."""
        listener = kind(
            listen,
            transport=self.transport,
            group=self.group,
            inbox=self.inbox,
            codec=self.codec,
            clock=self.clock,
            recover=self.recover,
        )
        self.listeners.append(listener)
        return listener

    def requester(self) -> Requester:
        """What asks and waits for replies: `async with bus.requester() as requests: await requests.ask(...)`."""
        return Requester(self.transport, self.publisher, self.codec, self.clock, self.ids)

    async def reply(self, incoming: Incoming, body: Any) -> None:
        """Answer a request that a plain handler got; raises `InvalidInput` for a message that is none."""
        await reply(self.publisher, incoming, body)

    async def pending(
        self, *, queue: str | None = None, cancel_key: str | None = None, limit: int = 100
    ) -> Sequence[Peeked]:
        """Delayed messages that are not due yet, the soonest first, at most `limit` (1,000): of a queue, under a key.

        Raises `InvalidInput` where neither is given.
        """
        return await self.transport.pending(queue=queue, cancel_key=cancel_key, limit=limit)

    async def observe_queues(self) -> bool:
        """Bring the gauges of the queues up to date for a scrape of `holdfast.observe.registry`.

        Counts at most every 5 s, waits for it 1 s at most, raises nothing; answers whether they are at most 5 s old.
        """
        return await self.queue_gauges.refresh()

    async def stop_listeners(self) -> None:
        """Let running handlers finish, give the rest back to the queues."""
        await asyncio.gather(*(listener.stop(self.drain_s) for listener in self.listeners))
        self.listeners.clear()


def parts(
    database: Database, group: GroupCommit, transport: SqlTransport, codec: Codec, clock: Clock, ids: IdSource
) -> dict[str, Any]:
    """What every `Messaging` is made of, by field, whoever runs it and recovers its messages."""
    return {
        "clock": clock,
        "ids": ids,
        "group": group,
        "transport": transport,
        "codec": codec,
        "inbox": Inbox(clock),
        "outbox": Outbox(transport, codec, clock, ids),
        "publisher": Publisher(transport, codec, clock, ids),
        "error_store": ErrorStore(database, clock, ids, tell=transport.tell),
        "queue_gauges": QueueGauges(database, clock),
        "listeners": [],
    }


@asynccontextmanager
async def open_messaging(
    database: Database,
    types: Mapping[str, type] | Codec,
    topology: Topology,
    *,
    clock: Clock | None = None,
    settings: MessagingSettings | None = None,
    database_settings: DatabaseSettings | None = None,
    error_service: str | None = None,
) -> AsyncIterator[Messaging]:
    """Run the toolkit over a migrated database: declare the topology, give everything, drain at the end.

    `types` maps each type id on the wire to its class; give a `Codec` instead for upcasters, Java names or compression.
    Raises `SchemaOutdated` when the tables are missing (`await migrate(database, [HISTORY])` makes them) and
    `TopologyMismatch`.

    With `error_service` the error exchange and the queue `{error_service}.error.queue` are declared too, and listeners
    without a recoverer of their own republish there; otherwise they park in the error store.
    """
    clock = clock or SystemClock()
    settings = settings or MessagingSettings()
    limits = database_settings or DatabaseSettings()
    async with AsyncExitStack() as stack:
        await require_current(database, [HISTORY])
        observe.tracer()  # asked now, so that the first message has its span
        group = GroupCommit(database, clock, batch_max=limits.batch_max, queue_max=limits.queue_max)
        group.start()
        stack.push_async_callback(group.close)
        ids = IdSource(clock)
        transport = await stack.enter_async_context(sql_transport(database, group, clock, ids, settings))
        if error_service is not None:
            topology += error_topology(error_service)
        await transport.declare(topology)
        codec = types if isinstance(types, Codec) else Codec(types)
        running = Messaging(
            **parts(database, group, transport, codec, clock, ids),
            recover=Park() if error_service is None else Republish(service=error_service),
            drain_s=settings.drain_ms / 1_000,
        )
        stack.push_async_callback(running.queue_gauges.close)
        stack.push_async_callback(running.stop_listeners)
        yield running
