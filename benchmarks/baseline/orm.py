"""The baseline's transactions on the SQLAlchemy ORM, as most services are written: place, pay, close the overdue, read.

Every transaction that touches several rows locks the order first and then stock in SKU order, so no
two of them can wait for each other.  Stock changes by conditional UPDATE only, as the last statement
of its transaction: a hot SKU is then locked for one statement and the commit.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, cast

from sqlalchemy import CursorResult, Update, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, joinedload, relationship, selectinload

from benchmarks.baseline import tables
from benchmarks.baseline.tables import CURRENCY, Database
from benchmarks.baseline.values import OVERDUE_BATCH, PENDING, PROVIDER, Cart, Line, Order, PaidNotice, Refused


class Base(DeclarativeBase):
    """Base of all mapped classes."""

    metadata = tables.metadata


class Stock(Base):
    """Units of one SKU: free to sell, and held by unpaid orders."""

    __table__ = tables.stock
    sku: Mapped[str]
    price_minor: Mapped[int]
    available: Mapped[int]
    held: Mapped[int]


class StoredLine(Base):
    """One SKU of an order, at the price of the moment of ordering."""

    __table__ = tables.order_lines
    order_id: Mapped[int]
    sku: Mapped[str]
    quantity: Mapped[int]
    unit_price_minor: Mapped[int]


class Payment(Base):
    """What the provider is asked to collect for an order, and the notice that says it did."""

    __table__ = tables.payments
    id: Mapped[int]
    order_id: Mapped[int]
    status: Mapped[str]
    amount_minor: Mapped[int]


class StoredOrder(Base):
    """One order; its status moves from pending_payment to paid or closed, once."""

    __table__ = tables.orders
    id: Mapped[int]
    buyer: Mapped[str]
    status: Mapped[str]
    amount_minor: Mapped[int]
    currency: Mapped[str]
    pay_by: Mapped[datetime]
    lines: Mapped[list[StoredLine]] = relationship(order_by=tables.order_lines.c.sku)
    payment: Mapped[Payment] = relationship()


class IdempotencyKey(Base):
    """The order that a buyer's key stands for; the primary key lets one of two racing requests win."""

    __table__ = tables.idempotency_keys
    request_hash: Mapped[str]
    order_id: Mapped[int]


class OrmOrders:
    """The order service over one database."""

    def __init__(self, database: Database, pay_window: timedelta) -> None:
        self._write = async_sessionmaker(database.write, expire_on_commit=False)
        self._read = async_sessionmaker(database.read, expire_on_commit=False)
        self._pay_window = pay_window

    async def place(self, cart: Cart) -> Order:
        """Hold the stock and store the order, or return the order this key has already made."""
        try:
            async with self._write.begin() as session:
                order = await self._new_order(session, cart)
                await session.flush()
                session.add(
                    IdempotencyKey(buyer=cart.buyer, key=cart.key, request_hash=cart.request_hash, order_id=order.id)
                )
                await session.flush()
                for sku, quantity in sorted(cart.quantities.items()):
                    await _hold(session, sku, quantity)
                return _seen(order)
        except IntegrityError:
            return await self._replay(cart)

    async def _new_order(self, session: AsyncSession, cart: Cart) -> StoredOrder:
        found = await session.execute(select(Stock.sku, Stock.price_minor).where(Stock.sku.in_(cart.quantities)))
        prices = {row.sku: row.price_minor for row in found}
        if unknown := cart.quantities.keys() - prices.keys():
            raise Refused(422, "unknown_sku", f"no such SKU: {', '.join(sorted(unknown))}")
        lines = [
            StoredLine(sku=sku, quantity=quantity, unit_price_minor=prices[sku])
            for sku, quantity in cart.quantities.items()
        ]
        amount = sum(line.quantity * line.unit_price_minor for line in lines)
        now = datetime.now(UTC)
        order = StoredOrder(
            buyer=cart.buyer,
            status=PENDING,
            amount_minor=amount,
            currency=CURRENCY,
            created_at=now,
            pay_by=now + self._pay_window,
            lines=lines,
            payment=Payment(provider=PROVIDER, status="pending", amount_minor=amount),
        )
        session.add(order)
        return order

    async def _replay(self, cart: Cart) -> Order:
        async with self._read() as session:
            known = await session.get(IdempotencyKey, (cart.buyer, cart.key))
        if known is None:
            raise Refused(503, "try_again", "the request collided with another one")
        if known.request_hash != cart.request_hash:
            raise Refused(422, "idempotency_key_reused", "this key was used for a different request")
        return await self.get(cart.buyer, known.order_id)

    async def get(self, buyer: str, order_id: int) -> Order:
        """Return the buyer's own order."""
        query = (
            select(StoredOrder)
            .where(StoredOrder.id == order_id, StoredOrder.buyer == buyer)
            .options(selectinload(StoredOrder.lines), joinedload(StoredOrder.payment))
        )
        async with self._read() as session:
            order = await session.scalar(query)
        if order is None:
            raise Refused(404, "order_not_found", "no such order")
        return _seen(order)

    async def pay(self, notice: PaidNotice) -> None:
        """Mark the order paid and take its held units out of stock; a repeated notice changes nothing."""
        async with self._write.begin() as session:
            bought = (
                await session.execute(
                    select(Payment.order_id, Payment.amount_minor, StoredLine.sku, StoredLine.quantity)
                    .join(StoredLine, StoredLine.order_id == Payment.order_id)
                    .where(Payment.id == notice.payment_id)
                    .order_by(StoredLine.sku)
                )
            ).all()
            if not bought:
                raise Refused(404, "payment_not_found", "no such payment")
            if (notice.amount_minor, notice.currency) != (bought[0].amount_minor, CURRENCY):
                raise Refused(409, "amount_mismatch", "the notice is about a different amount")
            in_time = await _end_pending(session, bought[0].order_id, "paid")
            # Money for a closed order is kept on record for a refund; its units are back on sale.
            is_news = await _collect(session, notice, "paid" if in_time else "refund_due")
            if in_time and is_news:
                for line in bought:
                    await _release(session, line.sku, line.quantity, back_on_sale=False)

    async def close_overdue(self) -> int:
        """Close orders whose time to pay has passed, each in its own transaction; return how many."""
        query = (
            select(StoredOrder.id)
            .where(StoredOrder.status == PENDING, StoredOrder.pay_by <= datetime.now(UTC))
            .order_by(StoredOrder.pay_by)
            .limit(OVERDUE_BATCH)
        )
        async with self._read() as session:
            overdue = (await session.scalars(query)).all()
        return sum([await self._close(order_id) for order_id in overdue])

    async def _close(self, order_id: int) -> bool:
        async with self._write.begin() as session:
            if not await _end_pending(session, order_id, "closed"):
                return False
            query = select(StoredLine).where(StoredLine.order_id == order_id).order_by(StoredLine.sku)
            for line in (await session.scalars(query)).all():
                await _release(session, line.sku, line.quantity, back_on_sale=True)
            return True


async def _hold(session: AsyncSession, sku: str, quantity: int) -> None:
    held = await _changes(
        session,
        update(Stock)
        .where(Stock.sku == sku, Stock.available >= quantity)
        .values(available=Stock.available - quantity, held=Stock.held + quantity),
    )
    if not held:
        raise Refused(409, "sold_out", f"not enough units of {sku} left")


async def _release(session: AsyncSession, sku: str, quantity: int, *, back_on_sale: bool) -> None:
    """End the hold on units: they are sold, or go back on sale."""
    released = await _changes(
        session,
        update(Stock)
        .where(Stock.sku == sku, Stock.held >= quantity)
        .values(held=Stock.held - quantity, available=Stock.available + (quantity if back_on_sale else 0)),
    )
    if not released:
        raise RuntimeError(f"{sku}: fewer than {quantity} units are held; the books are wrong")


async def _end_pending(session: AsyncSession, order_id: int, status: str) -> bool:
    """Move the order out of pending_payment, and say whether it was still there."""
    return await _changes(
        session,
        update(StoredOrder).where(StoredOrder.id == order_id, StoredOrder.status == PENDING).values(status=status),
    )


async def _collect(session: AsyncSession, notice: PaidNotice, status: str) -> bool:
    """Record the money on the payment, and say whether it is news."""
    return await _changes(
        session,
        update(Payment)
        .where(Payment.id == notice.payment_id, Payment.status == "pending")
        .values(status=status, event_id=notice.event_id, trade_no=notice.trade_no, paid_at=notice.paid_at),
    )


async def _changes(session: AsyncSession, statement: Update) -> bool:
    """Run a conditional UPDATE and say whether its condition held.

    No loaded object is read again after it, so the session need not be brought up to date.
    """
    result = await session.execute(statement, execution_options={"synchronize_session": False})
    return cast(CursorResult[Any], result).rowcount > 0


def _seen(order: StoredOrder) -> Order:
    # SQLite hands times back without a zone; they were written in UTC.
    pay_by = order.pay_by if order.pay_by.tzinfo else order.pay_by.replace(tzinfo=UTC)
    lines = [Line(line.sku, line.quantity, line.unit_price_minor) for line in order.lines]
    payment = order.payment
    return Order(order.id, order.status, order.amount_minor, order.currency, pay_by, lines, payment.id, payment.status)
