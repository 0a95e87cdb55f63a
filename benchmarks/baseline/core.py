"""The tuned baseline on SQLAlchemy Core, every statement built once: place, pay, close the overdue, read.

Every transaction that touches several rows locks the order first and then stock in SKU order, so no
two of them can wait for each other.  Stock changes by conditional UPDATE only, as the last statement
of its transaction: a hot SKU is then locked for one statement and the commit.

Few services are written like this; it is here to show what the same design can be brought to (see the README).
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from sqlalchemy import bindparam, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from benchmarks.baseline.tables import CURRENCY, Database, idempotency_keys, order_lines, orders, payments, stock
from benchmarks.baseline.values import OVERDUE_BATCH, PENDING, PROVIDER, Cart, Line, Order, PaidNotice, Refused

PRICES = select(stock.c.sku, stock.c.price_minor).where(stock.c.sku.in_(bindparam("skus", expanding=True)))
ADD_ORDER = insert(orders).returning(orders.c.id)
ADD_LINES = insert(order_lines)
ADD_PAYMENT = insert(payments).returning(payments.c.id)
ADD_KEY = insert(idempotency_keys)
KNOWN_KEY = select(idempotency_keys.c.request_hash, idempotency_keys.c.order_id).where(
    idempotency_keys.c.buyer == bindparam("buyer"), idempotency_keys.c.key == bindparam("key")
)
ORDER_OF_BUYER = (
    select(orders, payments.c.id.label("payment_id"), payments.c.status.label("payment_status"))
    .join(payments, payments.c.order_id == orders.c.id)
    .where(orders.c.id == bindparam("order"), orders.c.buyer == bindparam("buyer"))
)
LINES = select(order_lines).where(order_lines.c.order_id == bindparam("order")).order_by(order_lines.c.sku)
BOUGHT = (
    select(payments.c.amount_minor, order_lines.c.order_id, order_lines.c.sku, order_lines.c.quantity)
    .join(order_lines, order_lines.c.order_id == payments.c.order_id)
    .where(payments.c.id == bindparam("payment"))
    .order_by(order_lines.c.sku)
)
OVERDUE = (
    select(orders.c.id)
    .where(orders.c.status == PENDING, orders.c.pay_by <= bindparam("now"))
    .order_by(orders.c.pay_by)
    .limit(OVERDUE_BATCH)
)

# Parameters of an UPDATE are named apart from the columns: a column's name would mean a value to set.
END_PENDING = (
    update(orders).where(orders.c.id == bindparam("order"), orders.c.status == PENDING).values(status=bindparam("to"))
)
COLLECT = (
    update(payments)
    .where(payments.c.id == bindparam("payment"), payments.c.status == "pending")
    .values(status=bindparam("to"), event_id=bindparam("event"), trade_no=bindparam("trade"), paid_at=bindparam("paid"))
)
HOLD = (
    update(stock)
    .where(stock.c.sku == bindparam("of"), stock.c.available >= bindparam("units"))
    .values(available=stock.c.available - bindparam("units"), held=stock.c.held + bindparam("units"))
)
SELL = (
    update(stock)
    .where(stock.c.sku == bindparam("of"), stock.c.held >= bindparam("units"))
    .values(held=stock.c.held - bindparam("units"))
)
PUT_BACK = (
    update(stock)
    .where(stock.c.sku == bindparam("of"), stock.c.held >= bindparam("units"))
    .values(held=stock.c.held - bindparam("units"), available=stock.c.available + bindparam("units"))
)


class CoreOrders:
    """The order service over one database."""

    def __init__(self, database: Database, pay_window: timedelta) -> None:
        self._database = database
        self._pay_window = pay_window

    async def place(self, cart: Cart) -> Order:
        """Hold the stock and store the order, or return the order this key has already made."""
        try:
            async with self._database.write.begin() as connection:
                order = await self._add_order(connection, cart, await _priced_lines(connection, cart))
                for sku, quantity in sorted(cart.quantities.items()):
                    held = await connection.execute(HOLD, {"of": sku, "units": quantity})
                    if not held.rowcount:
                        raise Refused(409, "sold_out", f"not enough units of {sku} left")
                return order
        except IntegrityError:
            return await self._replay(cart)

    async def _add_order(self, connection: AsyncConnection, cart: Cart, lines: list[Line]) -> Order:
        now = datetime.now(UTC)
        pay_by = now + self._pay_window
        amount = sum(line.quantity * line.unit_price_minor for line in lines)
        row: dict[str, object] = {"buyer": cart.buyer, "status": PENDING, "amount_minor": amount}
        row |= {"currency": CURRENCY, "created_at": now, "pay_by": pay_by}
        order_id = (await connection.execute(ADD_ORDER, row)).scalar_one()
        key = {"buyer": cart.buyer, "key": cart.key, "request_hash": cart.request_hash, "order_id": order_id}
        await connection.execute(ADD_KEY, key)
        await connection.execute(
            ADD_LINES,
            [
                {
                    "order_id": order_id,
                    "sku": line.sku,
                    "quantity": line.quantity,
                    "unit_price_minor": line.unit_price_minor,
                }
                for line in lines
            ],
        )
        payment = {"order_id": order_id, "provider": PROVIDER, "status": "pending", "amount_minor": amount}
        payment_id = (await connection.execute(ADD_PAYMENT, payment)).scalar_one()
        return Order(order_id, PENDING, amount, CURRENCY, pay_by, lines, payment_id, "pending")

    async def _replay(self, cart: Cart) -> Order:
        async with self._database.read.connect() as connection:
            known = (await connection.execute(KNOWN_KEY, {"buyer": cart.buyer, "key": cart.key})).one_or_none()
        if known is None:
            raise Refused(503, "try_again", "the request collided with another one")
        if known.request_hash != cart.request_hash:
            raise Refused(422, "idempotency_key_reused", "this key was used for a different request")
        return await self.get(cart.buyer, known.order_id)

    async def get(self, buyer: str, order_id: int) -> Order:
        """Return the buyer's own order."""
        async with self._database.read.connect() as connection:
            row = (await connection.execute(ORDER_OF_BUYER, {"order": order_id, "buyer": buyer})).one_or_none()
            if row is None:
                raise Refused(404, "order_not_found", "no such order")
            lines = [
                Line(line.sku, line.quantity, line.unit_price_minor)
                for line in await connection.execute(LINES, {"order": order_id})
            ]
        # SQLite hands times back without a zone; they were written in UTC.
        pay_by = row.pay_by if row.pay_by.tzinfo else row.pay_by.replace(tzinfo=UTC)
        return Order(
            row.id, row.status, row.amount_minor, row.currency, pay_by, lines, row.payment_id, row.payment_status
        )

    async def pay(self, notice: PaidNotice) -> None:
        """Mark the order paid and take its held units out of stock; a repeated notice changes nothing."""
        async with self._database.write.begin() as connection:
            bought = (await connection.execute(BOUGHT, {"payment": notice.payment_id})).all()
            if not bought:
                raise Refused(404, "payment_not_found", "no such payment")
            if (notice.amount_minor, notice.currency) != (bought[0].amount_minor, CURRENCY):
                raise Refused(409, "amount_mismatch", "the notice is about a different amount")
            in_time = await _end_pending(connection, bought[0].order_id, "paid")
            # Money for a closed order is kept on record for a refund; its units are back on sale.
            is_news = await _collect(connection, notice, "paid" if in_time else "refund_due")
            if in_time and is_news:
                for line in bought:
                    await connection.execute(SELL, {"of": line.sku, "units": line.quantity})

    async def close_overdue(self) -> int:
        """Close orders whose time to pay has passed, each in its own transaction; return how many."""
        async with self._database.read.connect() as connection:
            overdue = (await connection.execute(OVERDUE, {"now": datetime.now(UTC)})).scalars().all()
        return sum([await self._close(order_id) for order_id in overdue])

    async def _close(self, order_id: int) -> bool:
        async with self._database.write.begin() as connection:
            if not await _end_pending(connection, order_id, "closed"):
                return False
            for line in (await connection.execute(LINES, {"order": order_id})).all():
                await connection.execute(PUT_BACK, {"of": line.sku, "units": line.quantity})
            return True


async def _priced_lines(connection: AsyncConnection, cart: Cart) -> list[Line]:
    prices = {row.sku: row.price_minor for row in await connection.execute(PRICES, {"skus": list(cart.quantities)})}
    if unknown := cart.quantities.keys() - prices.keys():
        raise Refused(422, "unknown_sku", f"no such SKU: {', '.join(sorted(unknown))}")
    return [Line(sku, quantity, prices[sku]) for sku, quantity in cart.quantities.items()]


async def _end_pending(connection: AsyncConnection, order_id: int, status: str) -> bool:
    """Move the order out of pending_payment, and say whether it was still there."""
    moved = await connection.execute(END_PENDING, {"order": order_id, "to": status})
    return moved.rowcount > 0


async def _collect(connection: AsyncConnection, notice: PaidNotice, status: str) -> bool:
    """Record the money on the payment, and say whether it is news."""
    recorded = await connection.execute(
        COLLECT,
        {
            "payment": notice.payment_id,
            "to": status,
            "event": notice.event_id,
            "trade": notice.trade_no,
            "paid": notice.paid_at,
        },
    )
    return recorded.rowcount > 0
