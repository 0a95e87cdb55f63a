"""SWITCHBOARD: settings -> database, transport, services, listeners. Alone knows every part."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from importlib import import_module
from typing import Any, cast

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
from holdfast.reconciliation.repairs import Repairs
from holdfast.reconciliation.service import ReconciliationService
from holdfast.services.carts import listeners as cart_listeners
from holdfast.services.carts.actions import Carts
from holdfast.services.carts.service import CartService
from holdfast.services.contracts.events import TYPES
from holdfast.services.contracts.topology import topology
from holdfast.services.feed import listeners as feed_listeners
from holdfast.services.feed.actions import Feed
from holdfast.services.feed.service import FeedService
from holdfast.services.orders import listeners as order_listeners
from holdfast.services.orders.fulfilment import Fulfilment
from holdfast.services.orders.moves import Moves
from holdfast.services.orders.place import PlaceOrders
from holdfast.services.orders.service import OrderService
from holdfast.services.orders.transitions import Transitions
from holdfast.services.payments import listeners as payment_listeners
from holdfast.services.payments.actions import Payments
from holdfast.services.payments.needs import Provider
from holdfast.services.payments.refund_service import RefundService
from holdfast.services.payments.refunds import Refunds
from holdfast.services.payments.sandbox import NAME as SANDBOX
from holdfast.services.payments.sandbox import SECRET_CHARS_MIN, Sandbox
from holdfast.services.payments.sandbox_book import SandboxBook
from holdfast.services.payments.service import PaymentService, UnknownProvider
from holdfast.services.schema import HISTORY as SERVICES_HISTORY
from holdfast.services.stock import listeners as stock_listeners
from holdfast.services.stock.actions import Stock
from holdfast.services.stock.service import ShelfService, StockService
from holdfast.services.stock.shelves import Shelves
from holdfast.services.sweeper import Sweeper
from holdfast.services.webhooks import listeners as webhook_listeners
from holdfast.services.webhooks.actions import Webhooks
from holdfast.services.webhooks.addresses import SafeResolver
from holdfast.services.webhooks.lanes import Lanes
from holdfast.services.webhooks.service import WebhookDesk, WebhookService
from holdfast.settings import DatabaseSettings, MessagingSettings, OrdersSettings, PaymentsSettings, Settings

ALIPAY = "alipay"
HISTORIES = (MESSAGING_HISTORY, SERVICES_HISTORY)

log = observe.logger("bootstrap")


class System(msgspec.Struct, frozen=True, kw_only=True):
    """The running parts."""

    settings: Settings
    clock: Clock
    database: Database
    messaging: Messaging
    orders: OrderService
    carts: CartService
    stock: StockService
    payments: PaymentService
    refunds: RefundService
    reconciliation: ReconciliationService
    providers: Mapping[str, Provider]
    events: FeedService
    webhooks: WebhookService
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
    def sandbox(self) -> Sandbox:
        """The sandbox within this process; raises `UnknownProvider` when it is not switched on, or elsewhere."""
        provider = self.providers.get(SANDBOX)
        if not isinstance(provider, Sandbox):
            raise UnknownProvider("the sandbox is not within this process")
        return provider

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
        await self.webhooks.stop(self.messaging.drain_s)


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
        bus = await stack.enter_async_context(_bus(database, settings, clock))
        group, ids, outbox = bus.group, bus.ids, bus.outbox
        stock_group = await stack.enter_async_context(_own_writer("stock", database, group, clock, settings.database))
        providers = _providers(settings, database, group, clock, stack)
        payments = Payments(clock, ids, outbox, providers, settings.payments.provider)
        refunds = Refunds(clock, ids, outbox)
        refund_service = RefundService(database, group, refunds, providers, clock)
        stock = Stock(clock, ids, outbox)
        carts, moves = Carts(clock), Moves(clock, ids)
        transitions = Transitions(clock, moves, outbox, payments, settings.orders.extend_ms_max)
        payment_service = PaymentService(database, group, payments, providers, transitions, clock)
        orders = _orders(
            bus, database, stock_group, settings.orders, moves, transitions, payment_service, stock, payments, carts
        )
        stock_service = StockService(database, stock_group, Shelves(clock, ids), stock, orders, clock, settings.stock)
        repairs = Repairs(orders, stock_service, payment_service, refund_service, bus.error_store)
        reconciliation = ReconciliationService(database, group, clock, ids, settings.reconciliation, repairs, providers)
        told = await stack.enter_async_context(_telling(database, bus, orders, settings))
        listens = (
            *order_listeners.listeners(orders),
            *cart_listeners.listeners(carts),
            *stock_listeners.listeners(stock_service, stock, stock_group, settings.stock),
            *payment_listeners.listeners(refunds, refund_service),
            *told.listens,
        )
        system = System(
            settings=settings,
            clock=clock,
            database=database,
            messaging=bus,
            orders=orders,
            carts=CartService(database, group, carts),
            stock=stock_service,
            payments=payment_service,
            refunds=refund_service,
            reconciliation=reconciliation,
            providers=providers,
            events=told.events,
            webhooks=told.webhooks,
            listens=tuple(_tuned(listen, settings.messaging) for listen in listens),
            sweepers=[
                *_sweepers(orders, stock_service, payment_service, refund_service, reconciliation, settings, clock),
                *told.sweepers,
            ],
        )
        stack.push_async_callback(system.stop_work)
        yield system


def _orders(
    bus: Messaging,
    database: Database,
    stock_group: GroupCommit,
    rules: OrdersSettings,
    moves: Moves,
    transitions: Transitions,
    cashier: PaymentService,
    stock: Stock,
    payments: Payments,
    carts: Carts,
) -> OrderService:
    clock, outbox = bus.clock, bus.outbox
    place = PlaceOrders(clock, bus.ids, outbox, rules, catalogue=stock, stock=stock, payments=payments, carts=carts)
    fulfilment = Fulfilment(clock, outbox, moves, rules.complete_ms)
    return OrderService(database, stock_group, bus.group, place, transitions, fulfilment, cashier, clock, rules)


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
async def _own_writer(
    name: str, database: Database, group: GroupCommit, clock: Clock, settings: DatabaseSettings
) -> AsyncIterator[GroupCommit]:
    """Where the database takes several writers: one for all that locks stock rows or the feed's counter, so that
    nothing else waits for these locks.

    While PostgreSQL works for the one, this process works for the other.
    """
    if database.dialect == "sqlite":
        yield group
        return
    writer = GroupCommit(database, clock, name=name, batch_max=settings.batch_max, queue_max=settings.queue_max)
    writer.start()
    try:
        yield writer
    finally:
        await writer.close()


def _bus(database: Database, settings: Settings, clock: Clock) -> AbstractAsyncContextManager[Messaging]:
    return open_messaging(
        database,
        TYPES,
        topology(settings.stock.guard_ms),
        clock=clock,
        settings=settings.messaging,
        database_settings=settings.database,
    )


class Telling(msgspec.Struct, frozen=True, kw_only=True):
    """What tells the outside: the event feed, and the webhooks that follow it."""

    events: FeedService
    webhooks: WebhookService
    listens: list[Listen]
    sweepers: list[Sweeper]


@asynccontextmanager
async def _telling(
    database: Database, bus: Messaging, orders: OrderService, settings: Settings
) -> AsyncIterator[Telling]:
    """The feed with its own writer, and webhooks with their wire.

    The wire's library belongs to the `server` extra, which commands need not have.
    """
    clock, chosen = bus.clock, settings.webhooks
    hooks = Webhooks(clock, bus.ids, bus.outbox, chosen, random.Random())  # noqa: S311  # jitter
    resolver = SafeResolver(allow_private=chosen.allow_private)
    wire = import_module("holdfast.services.webhooks.wire").HttpWire(resolver, clock, chosen.timeout_ms)
    lanes = Lanes(bus.group, hooks, wire, clock, chosen)
    keep_days, old_ms = settings.events.keep_days, settings.events.sweep_ms
    webhooks = WebhookService(database, bus.group, hooks, resolver, lanes, clock, chosen, keep_days)
    feed = Feed(clock, orders, hooks)
    try:
        async with _own_writer("feed", database, bus.group, clock, settings.database) as feed_group:
            events = FeedService(database, feed_group, feed, clock, keep_days)
            yield Telling(
                events=events,
                webhooks=webhooks,
                listens=[*feed_listeners.listeners(feed, feed_group), *webhook_listeners.listeners(webhooks)],
                sweepers=[
                    Sweeper("webhooks", chosen.sweep_ms, lambda: webhooks.sweep(chosen.sweep_ms), clock),
                    Sweeper("events", old_ms, events.sweep, clock),
                    Sweeper("deliveries", old_ms, webhooks.clear, clock),
                ],
            )
    finally:
        await wire.close()
        resolver.close()


@asynccontextmanager
async def webhook_desk(settings: Settings) -> AsyncIterator[WebhookDesk]:
    """What changes webhooks and sends nothing; raises what `running` raises of the database."""
    clock = SystemClock()
    resolver = SafeResolver(allow_private=settings.webhooks.allow_private)
    database = await connect(settings.database, create=False)
    try:
        await require_current(database, HISTORIES)
        async with _bus(database, settings, clock) as bus:
            hooks = Webhooks(clock, bus.ids, bus.outbox, settings.webhooks, random.Random())  # noqa: S311  # jitter
            yield WebhookDesk(database, bus.group, hooks, resolver, clock, settings.webhooks)
    finally:
        resolver.close()
        await database.close()


def _providers(
    settings: Settings, database: Database, group: GroupCommit, clock: Clock, stack: AsyncExitStack
) -> dict[str, Provider]:
    """Every configured provider by its name, the chosen one among them."""
    providers: dict[str, Provider] = {}
    if settings.payments.sandbox:
        providers[SANDBOX] = _sandbox(settings.payments, database, group, clock, stack)
    if settings.payments.alipay_app_id or settings.payments.provider == ALIPAY:
        alipay = _over_http("alipay").open_alipay(settings.payments, settings.orders.time_out_ms, clock)
        stack.push_async_callback(alipay.aclose)
        providers[ALIPAY] = alipay
    if not providers:
        raise InvalidSettings(
            "no payment provider is configured; set HOLDFAST_PAYMENTS__PROVIDER and its keys or, to try things out, "
            "HOLDFAST_PAYMENTS__SANDBOX=true and HOLDFAST_PAYMENTS__SANDBOX_SECRET"
        )
    if settings.payments.provider not in providers:
        raise InvalidSettings(
            f"HOLDFAST_PAYMENTS__PROVIDER: {settings.payments.provider!r} is not configured; "
            f"configured: {', '.join(sorted(providers))}"
        )
    return providers


def _sandbox(
    settings: PaymentsSettings, database: Database, group: GroupCommit, clock: Clock, stack: AsyncExitStack
) -> Provider:
    secret = settings.sandbox_secret.reveal()
    if len(secret) < SECRET_CHARS_MIN:
        raise InvalidSettings(f"HOLDFAST_PAYMENTS__SANDBOX_SECRET needs at least {SECRET_CHARS_MIN} characters")
    if settings.sandbox_url:
        remote = _over_http("sandbox_remote").SandboxRemote(
            settings.sandbox_url,
            clock,
            secret,
            settings.merchant_id,
            settings.notice_tolerance_ms,
            settings.call_timeout_ms,
        )
        stack.push_async_callback(remote.aclose)
        return cast(Provider, remote)
    book = SandboxBook(database, group, clock)
    return Sandbox(book, clock, secret, settings.merchant_id, settings.notice_tolerance_ms)


def _over_http(module: str) -> Any:
    """A provider's module that needs libraries of the `server` extra; the bare install does without it."""
    try:
        return import_module(f"holdfast.services.payments.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("holdfast"):
            raise
        raise InvalidSettings(f"this payment provider needs {error.name}; pip install 'holdfast[server]'") from error


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
    orders: OrderService,
    stock: StockService,
    payments: PaymentService,
    refunds: RefundService,
    reconciliation: ReconciliationService,
    settings: Settings,
    clock: Clock,
) -> list[Sweeper]:
    """The guards; each looks for what is late by one of its intervals, since messages should have come by then."""
    of_orders, of_payments, poll_ms = settings.orders.sweep_ms, settings.payments.sweep_ms, settings.payments.poll_ms
    return [
        Sweeper("orders", of_orders, lambda: orders.sweep(of_orders), clock),
        Sweeper("arrivals", of_orders, orders.sweep_arriving, clock),
        Sweeper("stock", of_orders, lambda: stock.sweep(of_orders), clock),
        Sweeper("payments", of_payments, lambda: payments.sweep(of_payments), clock),
        Sweeper("poll", poll_ms, lambda: payments.poll(poll_ms), clock),
        Sweeper("refunds", of_payments, lambda: refunds.sweep(of_payments), clock),
        Sweeper("reconciliation", settings.reconciliation.every_ms, reconciliation.sweep, clock),
    ]
