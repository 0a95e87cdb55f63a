"""SWITCHBOARD: settings -> database, transport, services, listeners. Alone knows every part."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import msgspec
from sqlalchemy import text

from holdfast import observe
from holdfast.clock import Clock, SystemClock
from holdfast.db.connect import connect
from holdfast.db.database import Database
from holdfast.db.group_commit import GroupCommit
from holdfast.db.migrate import migrate, require_current
from holdfast.errors import InvalidSettings
from holdfast.ids import IdSource
from holdfast.messaging.codec import Codec
from holdfast.messaging.inbox import Inbox
from holdfast.messaging.listen import Listen
from holdfast.messaging.listener import Listener
from holdfast.messaging.outbox import Outbox
from holdfast.messaging.publisher import Publisher
from holdfast.messaging.retry import RetryPolicy
from holdfast.messaging.tables import HISTORY as MESSAGING_HISTORY
from holdfast.messaging.toolkit import Messaging, open_messaging
from holdfast.messaging.transports.sql.transport import SqlTransport
from holdfast.services.contracts.events import TYPES
from holdfast.services.contracts.topology import topology
from holdfast.services.orders import listeners as order_listeners
from holdfast.services.orders.place import PlaceOrders
from holdfast.services.orders.service import OrderService
from holdfast.services.orders.transitions import Transitions
from holdfast.services.payments import listeners as payment_listeners
from holdfast.services.payments.actions import Payments
from holdfast.services.payments.sandbox import Sandbox
from holdfast.services.payments.service import PaymentService
from holdfast.services.schema import HISTORY as SERVICES_HISTORY
from holdfast.services.stock import listeners as stock_listeners
from holdfast.services.stock.actions import Stock
from holdfast.services.stock.service import ShelfService, StockService
from holdfast.services.stock.shelves import Shelves
from holdfast.services.sweeper import Sweeper
from holdfast.settings import DatabaseSettings, MessagingSettings, Settings

HISTORIES = (MESSAGING_HISTORY, SERVICES_HISTORY)

log = observe.logger("bootstrap")


class System(msgspec.Struct, frozen=True, kw_only=True):
    """The running parts."""

    settings: Settings
    clock: Clock
    database: Database
    messaging: Messaging
    orders: OrderService
    stock: StockService
    payments: PaymentService
    sandbox: Sandbox
    listens: tuple[Listen, ...]
    sweepers: list[Sweeper]

    def listen(self, listen: Listen) -> Listener:
        """Start one more listener; it stops with the system."""
        return self.messaging.listen(listen)

    def work(self) -> None:
        """Start the services' listeners and sweepers."""
        for listen in self.listens:
            self.listen(listen)
        for sweeper in self.sweepers:
            sweeper.start()

    @property
    def group(self) -> GroupCommit:
        return self.messaging.group

    @property
    def ids(self) -> IdSource:
        return self.messaging.ids

    @property
    def transport(self) -> SqlTransport:
        return self.messaging.transport

    @property
    def outbox(self) -> Outbox:
        return self.messaging.outbox

    @property
    def publisher(self) -> Publisher:
        return self.messaging.publisher

    @property
    def inbox(self) -> Inbox:
        return self.messaging.inbox

    @property
    def codec(self) -> Codec:
        return self.messaging.codec

    @property
    def listeners(self) -> list[Listener]:
        return self.messaging.listeners

    async def check(self) -> None:
        """Ask the database for a sign of life; raises `Unavailable`."""
        async with self.database.read() as tx:
            await tx.execute(text("SELECT 1"))

    async def stop_work(self) -> None:
        """Stop sweepers and listeners: running handlers finish, the rest goes back to the queues."""
        await asyncio.gather(*(sweeper.stop() for sweeper in self.sweepers))
        await self.messaging.stop_listeners()


@asynccontextmanager
async def running(settings: Settings, *, clock: Clock | None = None) -> AsyncIterator[System]:
    """Build everything and take it down in reverse order; workers start with `System.work`.

    Raises what opening the database raises, `SchemaOutdated` before the first `holdfast migrate`, `InvalidSettings`
    for a secret that is missing.
    """
    clock = clock or SystemClock()
    async with AsyncExitStack() as stack:
        database = await connect(settings.database, create=False)
        stack.push_async_callback(database.close)
        await require_current(database, HISTORIES)
        bus = await stack.enter_async_context(
            open_messaging(
                database,
                TYPES,
                topology(settings.stock.guard_ms),
                clock=clock,
                settings=settings.messaging,
                database_settings=settings.database,
            )
        )
        group, ids, outbox = bus.group, bus.ids, bus.outbox
        stock_group = await stack.enter_async_context(_stock_writer(database, group, clock, settings.database))
        sandbox = _sandbox(settings, group, clock)
        payments = Payments(clock, ids, outbox, sandbox, settings.payments.merchant_id)
        payment_service = PaymentService(database, group, payments, sandbox, clock)
        stock = Stock(clock, ids, outbox)
        place = PlaceOrders(clock, ids, outbox, settings.orders, catalogue=stock, stock=stock, payments=payments)
        transitions = Transitions(clock, ids, outbox, payments)
        orders = OrderService(database, stock_group, group, place, transitions, payment_service, clock, settings.orders)
        stock_service = StockService(database, stock_group, Shelves(clock, ids), stock, orders, clock, settings.stock)
        listens = (
            *order_listeners.listeners(orders, transitions),
            *stock_listeners.listeners(stock_service, stock, stock_group, settings.stock),
            *payment_listeners.listeners(payments, payment_service),
        )
        system = System(
            settings=settings,
            clock=clock,
            database=database,
            messaging=bus,
            orders=orders,
            stock=stock_service,
            payments=payment_service,
            sandbox=sandbox,
            listens=tuple(_tuned(listen, settings.messaging) for listen in listens),
            sweepers=_sweepers(orders, stock_service, payment_service, settings, clock),
        )
        stack.push_async_callback(system.stop_work)
        yield system


@asynccontextmanager
async def shelves_of(database: Database) -> AsyncIterator[ShelfService]:
    """The shelves alone, over a migrated database: for commands, without listeners and without a payment provider."""
    clock = SystemClock()
    group = GroupCommit(database, clock, name="shelves")
    group.start()
    try:
        yield ShelfService(database, group, Shelves(clock, IdSource(clock)))
    finally:
        await group.close()


async def migrate_all(settings: Settings) -> dict[str, tuple[str | None, str | None]]:
    """Bring the database to the newest schema; answers room -> (revision before, revision after)."""
    database = await connect(settings.database)
    try:
        return await migrate(database, HISTORIES)
    finally:
        await database.close()


@asynccontextmanager
async def _stock_writer(
    database: Database, group: GroupCommit, clock: Clock, settings: DatabaseSettings
) -> AsyncIterator[GroupCommit]:
    """Where the database takes two writers: one for all that locks stock rows, so neither waits for the other's locks.

    While PostgreSQL works for the one, this process works for the other.
    """
    if database.dialect == "sqlite":
        yield group
        return
    writer = GroupCommit(database, clock, name="stock", batch_max=settings.batch_max, queue_max=settings.queue_max)
    writer.start()
    try:
        yield writer
    finally:
        await writer.close()


def _sandbox(settings: Settings, group: GroupCommit, clock: Clock) -> Sandbox:
    secret = settings.payments.sandbox_secret.reveal()
    if not settings.payments.sandbox:
        raise InvalidSettings(
            "no payment provider is configured; this version has the sandbox only: set "
            "HOLDFAST_PAYMENTS__SANDBOX=true and HOLDFAST_PAYMENTS__SANDBOX_SECRET"
        )
    if len(secret) < 16:
        raise InvalidSettings("HOLDFAST_PAYMENTS__SANDBOX_SECRET needs at least 16 characters")
    return Sandbox(group, clock, secret, settings.payments.merchant_id, settings.payments.notice_tolerance_ms)


def _tuned(listen: Listen, settings: MessagingSettings) -> Listen:
    return msgspec.structs.replace(
        listen,
        prefetch=settings.prefetch,
        local=RetryPolicy(tries=settings.local_tries, interval_ms=settings.local_interval_ms),
        durable=RetryPolicy(
            tries=settings.durable_tries,
            interval_ms=settings.durable_interval_ms,
            interval_ms_max=settings.durable_interval_ms_max,
            multiplier=2.0,
            jitter=0.1,
        ),
    )


def _sweepers(
    orders: OrderService, stock: StockService, payments: PaymentService, settings: Settings, clock: Clock
) -> list[Sweeper]:
    """The guards; each looks for what is late by one of its intervals, since messages should have come by then."""
    of_orders, of_payments = settings.orders.sweep_ms, settings.payments.sweep_ms
    return [
        Sweeper("orders", of_orders, lambda: orders.sweep(of_orders), clock),
        Sweeper("stock", of_orders, lambda: stock.sweep(of_orders), clock),
        Sweeper("payments", of_payments, lambda: payments.sweep(of_payments), clock),
    ]
