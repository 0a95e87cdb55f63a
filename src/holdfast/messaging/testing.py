"""The whole toolkit for tests: on SQLite in memory, with a clock that moves only when told to.

Nothing is simulated: publisher, outbox, inbox, listeners, retries and error store are those of production, on a real
database that is gone when the block ends. There is no server and no network.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, NamedTuple

from sqlalchemy import insert, select

from holdfast.clock import US_PER_S, ManualClock, SystemClock
from holdfast.db.database import Tx
from holdfast.db.group_commit import GroupCommit
from holdfast.db.migrate import migrate
from holdfast.db.sqlite import MEMORY, SqliteDatabase
from holdfast.errors import CannotDecode, InvalidInput, PublishError
from holdfast.ids import IdSource
from holdfast.messaging.codec import Codec
from holdfast.messaging.error_store import LIST_MAX
from holdfast.messaging.faults import Faults, FaultyListener, ScriptedFailure
from holdfast.messaging.listen import Listen
from holdfast.messaging.listener import Listener
from holdfast.messaging.message import Delivery, Message, Outgoing
from holdfast.messaging.parked import ParkedMessage
from holdfast.messaging.recover import Park
from holdfast.messaging.tables import HISTORY, messages
from holdfast.messaging.toolkit import Messaging, parts
from holdfast.messaging.topology import MILLISECONDS_MAX, Topology
from holdfast.messaging.transports.sql.insight import overview
from holdfast.messaging.transports.sql.rows import message_of
from holdfast.messaging.transports.sql.transport import SqlTransport
from holdfast.settings import MessagingSettings

__all__ = ["Bus", "Faults", "Published", "ScriptedFailure", "bus"]

START_US = 1_770_000_000 * US_PER_S  # a fixed instant in the time of our ids, so that runs are alike
REST_S = 10.0  # of real time; who is not at rest by then never will be
POLL_S = 0.001
DRAIN_S = 0.5  # of real time, for handlers that still run when the block ends
TURNS = 50  # of an event loop that does not show whether something is ready

# One process, one clock and no lost wake-up: nothing has to be polled, and no holder can die without giving back. So
# the guards of production never get their turn, and years pass in one step.
SETTINGS = MessagingSettings(poll_ms=MILLISECONDS_MAX, lease_ms=MILLISECONDS_MAX)

_real = SystemClock()


class Published(NamedTuple):
    """A message that was stored, or that nobody had to take: where it was sent, and its body."""

    exchange: str
    routing_key: str
    body: Any


class JournalTransport(SqlTransport):
    """The SQL transport, which remembers what was committed, in that order."""

    journal: list[Message]

    async def publish_in(self, tx: Tx, batch: Sequence[Outgoing]) -> list[PublishError | None]:
        problems = await super().publish_in(tx, batch)
        sent = [outgoing.message for outgoing, problem in zip(batch, problems, strict=True) if problem is None]
        tx.on_commit(lambda: self.journal.extend(sent))
        return problems


class Bus(Messaging, frozen=True, kw_only=True):
    """The running toolkit of a test, with a hand on its time, an eye on its queues, and scripts of what goes wrong."""

    database: SqliteDatabase
    clock: ManualClock
    faults: Faults
    resting: asyncio.Lock

    def listen(self, listen: Listen) -> Listener:
        """Start a listener; it stops with the block."""
        listener = self._prepared(FaultyListener, listen)
        listener.script(self.faults, self._copy)
        listener.start()
        return listener

    # -- time ---------------------------------------------------------------------------------------------------------

    async def advance(self, seconds: float) -> None:
        """Move the clock, stopping at every instant at which something is due until all of it has happened.

        What a handler waits for outside of this event loop (a socket, a thread) is not waited for; see `drained`.
        Raises `InvalidInput` for a negative time, `AssertionError` when something does not come to rest.
        """
        if seconds < 0:
            raise InvalidInput(f"time does not go back: advance by 0 seconds or more, not {seconds}")
        await self.idle()
        left_us = round(seconds * US_PER_S)
        while (wait_us := self.clock.next_wake_us()) is not None and wait_us <= left_us:
            self.clock.advance(wait_us / US_PER_S)
            left_us -= wait_us
            await self.idle()
        self.clock.advance(left_us / US_PER_S)
        await self.idle()

    async def idle(self) -> None:
        """Let everything happen that can happen without time going on.

        Raises `AssertionError` when that takes longer than 10 seconds of real time.
        """
        try:
            async with asyncio.timeout(REST_S), self.resting:
                await self._rest()
        except TimeoutError:
            what = "a transaction is open all the while" if self.database.writing else "some task never waits"
            raise AssertionError(f"not idle within {REST_S:g} s: {what}; call this outside of transactions") from None

    async def _rest(self) -> None:
        """Yield until no callback is ready; in memory, all work of the database's thread is inside a transaction."""
        ready = getattr(asyncio.get_running_loop(), "_ready", None)
        quiet = 0
        while quiet < (1 if ready is not None else TURNS):
            await _real.sleep(0)
            if self.database.writing:
                await self.database.written()
                quiet = 0
            elif ready:
                quiet = 0
            else:
                quiet += 1

    async def drained(self, wait_s: float = 10.0) -> None:
        """Return once no message is ready or unacked; those that are not due yet may stay.

        Time does not go on meanwhile: a handler that waits for the clock (a local retry) needs `advance`. Raises
        `AssertionError` that names the queues with their counts after `wait_s` seconds of real time.
        """
        give_up = _real.monotonic() + wait_s
        while True:
            await self.idle()
            async with self.database.read() as tx:
                queues = await overview(tx, self.clock.now_us())
            busy = [each for each in queues if each.ready or each.unacked]
            if not busy:
                return
            if _real.monotonic() >= give_up:
                counts = ", ".join(f"{each.queue} ({each.ready} ready, {each.unacked} unacked)" for each in busy)
                raise AssertionError(
                    f"not drained within {wait_s:g} s: {counts}; does it have a listener, "
                    "or does a handler wait for the clock (then advance it)?"
                )
            await _real.sleep(POLL_S)

    # -- looking ------------------------------------------------------------------------------------------------------

    @property
    def published(self) -> list[Published]:
        """All that was committed, by publisher, outbox and recoverers, in that order; replays are not in it."""
        assert isinstance(self.transport, JournalTransport)
        return [
            Published(message.exchange, message.routing_key, self._body(message)) for message in self.transport.journal
        ]

    async def messages(self, queue: str, *, delayed: bool = False) -> list[Any]:
        """The bodies that wait in the queue, in order of delivery; with `delayed` also those that are not due yet.

        Raises `InvalidInput` for a queue that does not exist. A body that cannot be decoded is given as bytes.
        """
        await self.transport.stats(queue)
        waiting = select(*messages.columns).where(messages.c.queue == queue, messages.c.lease.is_(None))
        if not delayed:
            waiting = waiting.where(messages.c.due_us <= self.clock.now_us())
        async with self.database.read() as tx:
            rows = (await tx.execute(waiting.order_by(messages.c.due_us, messages.c.id))).all()
        return [self._body(message_of(row)) for row in rows]

    async def parked(self, queue: str | None = None) -> list[ParkedMessage]:
        """What was given up on and is still in the error store, oldest first."""
        found = await self.error_store.list(queue, limit=LIST_MAX)
        return [await self.error_store.show(each.id) for each in found]

    def _body(self, message: Message) -> Any:
        try:
            return self.codec.decode(message)
        except CannotDecode:
            return message.body

    async def _copy(self, delivery: Delivery) -> None:
        """Put the message into its queue once more, as if it had been sent twice."""
        now_us = self.clock.now_us()
        async with self.database.transaction() as tx:
            row = (await tx.execute(select(*messages.columns).where(messages.c.id == delivery.receipt.row_id))).one()
            fresh = {"id": self.ids.next(), "due_us": now_us, "ready_us": now_us, "lease": None, "deliveries": 0}
            await tx.execute(insert(messages), [{**row._mapping, **fresh}])
            tx.on_commit(lambda: self.transport.tell({(delivery.queue, now_us)}))


@asynccontextmanager
async def bus(types: Mapping[str, type] | Codec, topology: Topology) -> AsyncIterator[Bus]:
    """Run the toolkit on a database of its own in memory; nothing is left when the block ends.

    `types` and `topology` are those of `open_messaging`. Only one transaction is open at a time: while a task has one,
    it reads by its `tx`. Queues that are `auto_delete` without being exclusive stay after their last consumer.
    """
    clock = ManualClock(START_US)
    codec = types if isinstance(types, Codec) else Codec(types)
    async with AsyncExitStack() as stack:
        database = await SqliteDatabase.open(MEMORY)
        stack.push_async_callback(database.close)
        await migrate(database, [HISTORY])
        group = GroupCommit(database, clock)
        group.start()
        stack.push_async_callback(group.close)
        ids = IdSource(clock)
        transport = JournalTransport(database, group, clock, ids, SETTINGS)
        transport.journal = []
        stack.push_async_callback(transport.close)
        await transport.start()
        await transport.declare(topology)
        running = Bus(
            **parts(database, group, transport, codec, clock, ids),
            recover=Park(),
            drain_s=DRAIN_S,
            database=database,
            faults=Faults(),
            resting=asyncio.Lock(),
        )
        stack.push_async_callback(running.queue_gauges.close)
        stack.push_async_callback(running.stop_listeners)
        yield running
