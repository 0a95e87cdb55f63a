"""A shop to test in: SKUs on the shelf, buyers who order and pay, and a look at what became of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any, TypeVar

import msgspec
from sqlalchemy import BigInteger, Text, TextClause, bindparam, select, text

from holdfast.audit import audit
from holdfast.bootstrap import System
from holdfast.clock import US_PER_S, ManualClock, rfc3339
from holdfast.messaging.tables import messages
from holdfast.messaging.topology import Binding, Exchange, ExchangeKind, Queue, Topology
from holdfast.services.contracts import topology
from holdfast.services.orders.model import OrderLine, OrderStatus, OrderView, Placed, PlaceRequest
from holdfast.services.payments.model import Verdict
from holdfast.services.payments.sandbox import SIGNATURE_HEADER, Notice, SignedNotice
from holdfast.services.stock import store as stock_store
from holdfast.services.stock.model import Level, Receipt, Sku
from holdfast.settings import Settings
from tests.conftest import StartSystem, eventually

PRICE_MINOR = 1_000
NOON_US = 1_800_000_000 * US_PER_S  # where a shop's manual clock starts: a whole second, later than the ids' epoch

B = TypeVar("B", bound=msgspec.Struct)


async def stock_up(system: System, sku: str, quantity: int, warehouse: str = "main") -> None:
    """Put units of a SKU on the shelf, creating the SKU."""
    await system.stock.keep_sku(Sku(sku=sku, title=sku, price_minor=PRICE_MINOR, currency="CNY"))
    key = f"receipt-{sku}-{warehouse}-{system.ids.next()}"
    await system.stock.receive(Receipt(key=key, sku=sku, warehouse=warehouse, quantity=quantity, actor="tests"))


def wish(buyer: str, sku: str = "SKU-1", quantity: int = 1, key: str | None = None) -> PlaceRequest:
    """A buyer's wish for some units of one SKU."""
    line = OrderLine(sku=sku, quantity=quantity)
    return PlaceRequest(buyer=buyer, idempotency_key=key or f"key-of-{buyer}", lines=(line,))


async def order(system: System, buyer: str = "ann", sku: str = "SKU-1", quantity: int = 1) -> OrderView:
    """Place an order for some units of one SKU."""
    return placed_view(await system.orders.place(wish(buyer, sku, quantity)))


def placed_view(placed: Placed) -> OrderView:
    return msgspec.json.decode(placed.body, type=OrderView)


async def pay_at_sandbox(system: System, view: OrderView) -> SignedNotice:
    """The buyer pays by the order's link; the notice is not delivered yet."""
    return await system.sandbox.pay(token_of(view))


async def deliver(system: System, notice: SignedNotice) -> Verdict:
    """The provider's notice arrives."""
    headers = {SIGNATURE_HEADER: notice.signature}
    verdict = await system.payments.notice("sandbox", headers, notice.body.encode())
    assert verdict is not None
    return verdict


async def pay(system: System, view: OrderView) -> None:
    """Pay and deliver the notice."""
    await deliver(system, await pay_at_sandbox(system, view))


async def status(system: System, view: OrderView, buyer: str = "ann") -> OrderStatus:
    return (await system.orders.get(int(view.id), buyer)).status


async def becomes(system: System, view: OrderView, wanted: OrderStatus, buyer: str = "ann") -> None:
    """Wait until the order is in that state."""

    async def reached() -> bool:
        return await status(system, view, buyer) is wanted

    await eventually(reached, f"order {view.id} becomes {wanted}")


async def level(system: System, sku: str = "SKU-1", warehouse: str = "main") -> Level:
    return next(level for level in await system.stock.levels(sku) if level.warehouse == warehouse)


async def level_becomes(system: System, sku: str = "SKU-1", **wanted: int) -> None:
    """Wait until the SKU's counters are as wanted, e.g. `held=0, sold=3`."""

    async def reached() -> bool:
        now = await level(system, sku)
        return all(getattr(now, name) == value for name, value in wanted.items())

    await eventually(reached, f"level of {sku} becomes {wanted}")


async def detail_states(system: System, order_id: str) -> list[int]:
    """The states of an order's work order details: 1 held, 2 released, 3 deducted."""
    table = stock_store.details
    async with system.database.read() as tx:
        states = await tx.execute(select(table.c.status).where(table.c.order_id == int(order_id)).order_by(table.c.id))
        return list(states.scalars())


async def deafen_feed(system: System) -> None:
    """Tell the event feed nothing: for shops that are looked at row by row, or have no workers."""
    await change(system, "DELETE FROM hf_binding WHERE queue = :queue", queue=topology.FEED_QUEUE)


async def _forget_the_feed(system: System) -> None:
    """Where no worker runs nobody takes what is told to the event feed; that is no finding then."""
    if not system.listeners:
        await change(system, "DELETE FROM hf_message WHERE queue = :queue", queue=topology.FEED_QUEUE)


async def clean(system: System) -> None:
    """Wait until the audit finds nothing, with no slack; fails naming what it found."""
    await _forget_the_feed(system)
    report = await audit(system.database, system.clock, 0)

    async def is_clean() -> bool:
        nonlocal report
        report = await audit(system.database, system.clock, 0)
        return report.clean

    try:
        await eventually(is_clean, "the audit is clean")
    except AssertionError:
        raise AssertionError(f"the audit is not clean: {report.findings}") from None


def token_of(view: OrderView) -> str:
    """What stands at the end of an order's pay link."""
    assert view.payment.pay_url is not None
    return view.payment.pay_url.rsplit("/", 1)[1]


def signed_notice(system: System, view: OrderView, captured_us: int, **changed: Any) -> SignedNotice:
    """A genuine notice of the provider that it captured the order's money at that instant, or says something else."""
    facts: dict[str, Any] = {
        "event_id": f"evt-of-{view.id}",
        "merchant_id": system.settings.payments.merchant_id,
        "payment_id": view.payment.id,
        "trade_no": f"trade-of-{view.id}",
        "amount_minor": view.amount_minor,
        "currency": view.currency,
        "paid_at": datetime.fromisoformat(rfc3339(captured_us)),
    }
    return system.sandbox.sign(Notice(**facts | changed))


def one_by_one(settings: Settings, prefetch: int = 4) -> Settings:
    """The settings with few deliveries at once, so that duplicates meet in different transactions."""
    return msgspec.structs.replace(settings, messaging=msgspec.structs.replace(settings.messaging, prefetch=prefetch))


async def two_systems(start_system: StartSystem, settings: Settings, *, work: bool = True) -> list[System]:
    """Two systems on the test's database where several processes may work on it, one on SQLite."""
    first = await start_system(settings, work=work)
    if not first.transport.features.several_processes:
        return [first]
    return [first, await start_system(settings, work=work)]


async def rows(system: System, query: str, **values: int | str) -> list[dict[str, Any]]:
    """What a query finds."""
    async with system.database.read() as tx:
        return [dict(row._mapping) for row in await tx.execute(bound(query, values))]


async def change(system: System, statement: str, **values: int | str) -> int:
    """Change the database behind the services' backs; answers how many rows."""
    async with system.database.transaction() as tx:
        return (await tx.execute(bound(statement, values))).rowcount


async def count(system: System, query: str, **values: int | str) -> int:
    """How many rows a query finds."""
    return len(await rows(system, query, **values))


async def lose(system: System, type_id: str) -> int:
    """Lose all waiting messages of a type; answers how many, those for the event feed aside."""
    lost = "DELETE FROM hf_message WHERE type = :type_id AND queue = 'feed.events.queue'"
    await change(system, lost, type_id=type_id)
    return await change(system, "DELETE FROM hf_message WHERE type = :type_id", type_id=type_id)


async def probe(system: System, exchange: str, key: str, queue: str = "probe") -> None:
    """Bind a queue that nobody listens to, to see what is sent."""
    kind: ExchangeKind = "direct" if exchange == topology.PAY else "topic"
    await system.transport.declare(
        Topology(
            exchanges=[Exchange(name=exchange, kind=kind)],
            queues=[Queue(name=queue)],
            bindings=[Binding(exchange=exchange, queue=queue, routing_key=key)],
        )
    )


async def waiting(system: System, kind: type[B], queue: str = "probe") -> list[B]:
    """The bodies of the messages that wait in a queue, all of one type."""
    async with system.database.read() as tx:
        statement = select(messages.c.body).where(messages.c.queue == queue).order_by(messages.c.id)
        return [msgspec.json.decode(body, type=kind) for body in (await tx.execute(statement)).scalars()]


async def drained(system: System, queue: str) -> bool:
    """Whether nothing in the queue is ready or being handled."""
    stats = await system.transport.stats(queue)
    return stats.ready == 0 and stats.unacked == 0


async def in_time(
    clock: ManualClock,
    condition: Callable[[], Awaitable[bool]],
    what: str,
    *,
    within_s: float = 60.0,
    step_s: float = 0.1,
) -> None:
    """Let a manual clock run until the condition holds; fails with `what` when the clock passes `within_s` first."""
    until_us = clock.now_us() + round(within_s * US_PER_S)

    async def reached() -> bool:
        if await condition():
            return True
        assert clock.now_us() < until_us, f"not within {within_s} s of the shop's clock: {what}"
        clock.advance(step_s)
        return False

    await eventually(reached, what)


async def clean_in_time(system: System, clock: ManualClock) -> None:
    """Let a manual clock run until the audit finds nothing."""
    await _forget_the_feed(system)
    clock.advance(0.001)  # what happened at this very instant is not late yet
    report = await audit(system.database, clock, 0)

    async def is_clean() -> bool:
        nonlocal report
        report = await audit(system.database, clock, 0)
        return report.clean

    try:
        await in_time(clock, is_clean, "the audit is clean")
    except AssertionError:
        raise AssertionError(f"the audit is not clean: {report.findings}") from None


def bound(query: str, values: dict[str, int | str]) -> TextClause:
    """A statement with its values, typed for both databases."""
    return text(query).bindparams(
        *(bindparam(name, value, BigInteger() if isinstance(value, int) else Text()) for name, value in values.items())
    )
