"""The book of the sandbox provider: which trades are paid or closed, and what was given back."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from datetime import UTC, date, datetime, time, timedelta

import msgspec
from sqlalchemy import BigInteger, CheckConstraint, Column, Table, Text, func, select

from holdfast.clock import Clock, microseconds
from holdfast.db.database import Database, Tx
from holdfast.db.group_commit import GroupCommit
from holdfast.db.prepared import insert
from holdfast.errors import HoldfastError, Refused, Unavailable
from holdfast.services.contracts.values import Currency, MinorUnits
from holdfast.services.payments.model import RowId
from holdfast.services.payments.needs import RefundAnswer, RefundEnd, StatementLine
from holdfast.services.schema import metadata

trades = Table(
    "sandbox_trade",
    metadata,
    Column("payment_id", BigInteger, primary_key=True, autoincrement=False),
    Column("status", Text, nullable=False),
    Column("trade_no", Text, nullable=False),
    Column("amount_minor", BigInteger, nullable=False),
    Column("currency", Text, nullable=False),
    Column("changed_us", BigInteger, nullable=False),
    CheckConstraint("status IN ('paid', 'closed')", name="status"),
)

given_back = Table(
    "sandbox_refund",
    metadata,
    Column("refund_id", BigInteger, primary_key=True, autoincrement=False),
    Column("payment_id", BigInteger, nullable=False),
    Column("trade_no", Text, nullable=False),
    Column("amount_minor", BigInteger, nullable=False),
    Column("currency", Text, nullable=False),
    Column("changed_us", BigInteger, nullable=False),
)


class TradeClosed(Refused):
    """This trade was closed or its time is over; it cannot be paid."""

    code = "trade_closed"


class Asked(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """Which trade is meant, and over how much."""

    payment_id: RowId
    amount_minor: MinorUnits
    currency: Currency


class PayLink(Asked, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """What a pay link says, signed: whoever holds it can pay exactly this, until then."""

    pay_by_us: int


class RefundWish(Asked, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """Money to give back, once for each refund id."""

    refund_id: RowId
    trade_no: str


class Trade(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A trade as it stands in the book: paid or closed, since when."""

    payment_id: int
    status: str
    trade_no: str
    amount_minor: int
    currency: str
    changed_us: int


class SandboxBook:
    """What a provider keeps. Whoever comes first decides a trade, and it stays as it is then decided."""

    def __init__(self, database: Database, group: GroupCommit, clock: Clock) -> None:
        self._database = database
        self._group = group
        self._clock = clock

    async def create_tables(self) -> None:
        """Make the book's tables in a database of its own, where they are missing."""
        async with self._database.transaction() as tx:
            await tx.connection.run_sync(metadata.create_all, tables=[trades, given_back])

    async def pay(self, link: PayLink) -> Trade:
        """Pay; paying again gives the same trade. Raises `TradeClosed` if it was closed or its time is over."""
        return await self._group.submit(self._pay, link)

    async def close(self, asked: Asked) -> Trade:
        """Close a trade that is not paid; answers what it is now."""
        return await self._group.submit(self._close, asked)

    async def find(self, payment_id: int) -> Trade | None:
        """A trade, or None when nobody paid or closed it yet."""
        async with self._database.read() as tx:
            return await _trade(tx, payment_id)

    async def refund(self, wish: RefundWish) -> RefundAnswer:
        """Give money back: never more than was captured, once for each refund id."""
        return await self._group.submit(self._refund, wish)

    async def statement(self, day: date) -> list[StatementLine]:
        """The movements of a day in UTC, in order of time; raises `Unavailable` for a day that has not ended."""
        start_us = microseconds(datetime.combine(day, time(), UTC))
        end_us = microseconds(datetime.combine(day, time(), UTC) + timedelta(days=1))
        if self._clock.now_us() < end_us:
            raise Unavailable(f"the statement of {day} is made when that day has ended in UTC")
        async with self._database.read(snapshot=True) as tx:
            within = trades.c.changed_us.between(start_us, end_us - 1)
            paid = (await tx.execute(select(trades).where(trades.c.status == "paid", within))).all()
            within = given_back.c.changed_us.between(start_us, end_us - 1)
            returned = (await tx.execute(select(given_back).where(within))).all()
        captures = [_line(row, "capture", None) for row in paid]
        return sorted(captures + [_line(row, "refund", row.refund_id) for row in returned], key=lambda line: line.at_us)

    async def _pay(self, tx: Tx, links: Sequence[PayLink]) -> list[Trade | HoldfastError]:
        return [await self._pay_one(tx, link) for link in links]

    async def _pay_one(self, tx: Tx, link: PayLink) -> Trade | HoldfastError:
        if self._clock.now_us() < link.pay_by_us:
            await self._decide(tx, "paid", link)
        trade = await _trade(tx, link.payment_id)
        if trade is None or trade.status != "paid":
            return TradeClosed("the time to pay is over" if trade is None else "this trade was closed")
        return trade

    async def _close(self, tx: Tx, wishes: Sequence[Asked]) -> list[Trade | HoldfastError]:
        answers: list[Trade | HoldfastError] = []
        for asked in wishes:
            await self._decide(tx, "closed", asked)
            trade = await _trade(tx, asked.payment_id)
            assert trade is not None
            answers.append(trade)
        return answers

    async def _decide(self, tx: Tx, status: str, asked: Asked) -> None:
        # Whoever comes first decides the trade; the loser reads what it became.
        row = {
            "payment_id": asked.payment_id,
            "status": status,
            "trade_no": f"sb{asked.payment_id:x}{secrets.token_hex(4)}",
            "amount_minor": asked.amount_minor,
            "currency": asked.currency,
            "changed_us": self._clock.now_us(),
        }
        await tx.execute(insert(tx.dialect, trades).values(**row).on_conflict_do_nothing())

    async def _refund(self, tx: Tx, wishes: Sequence[RefundWish]) -> list[RefundAnswer | HoldfastError]:
        return [await self._refund_one(tx, wish) for wish in wishes]

    async def _refund_one(self, tx: Tx, wish: RefundWish) -> RefundAnswer:
        row = msgspec.structs.asdict(wish) | {"changed_us": self._clock.now_us()}
        trade = await _trade(tx, wish.payment_id, lock=True)
        earlier = (await tx.execute(select(given_back).where(given_back.c.refund_id == wish.refund_id))).first()
        if earlier is not None:
            if (earlier.payment_id, earlier.amount_minor) == (wish.payment_id, wish.amount_minor):
                return RefundAnswer(end=RefundEnd.DONE)
            return RefundAnswer(end=RefundEnd.REFUSED, reason="this refund id was used for another refund")
        if trade is not None and trade.status == "paid":
            total = select(func.coalesce(func.sum(given_back.c.amount_minor), 0))
            before = (await tx.execute(total.where(given_back.c.payment_id == wish.payment_id))).scalar_one()
            if int(before) + wish.amount_minor > trade.amount_minor:
                return RefundAnswer(end=RefundEnd.REFUSED, reason="more than was captured")
        # A trade that is not in the book was captured by a notice that somebody signed without it, as tests do.
        await tx.execute(insert(tx.dialect, given_back).values(**row).on_conflict_do_nothing())
        return RefundAnswer(end=RefundEnd.DONE)


async def _trade(tx: Tx, payment_id: int, *, lock: bool = False) -> Trade | None:
    wanted = select(trades).where(trades.c.payment_id == payment_id)
    row = (await tx.execute(wanted.with_for_update() if lock else wanted)).first()
    return None if row is None else Trade(**row._mapping)


def _line(row: object, kind: str, refund_id: int | None) -> StatementLine:
    return msgspec.convert(
        {
            "trade_no": row.trade_no,  # type: ignore[attr-defined]  # a row of either table
            "payment_id": row.payment_id,  # type: ignore[attr-defined]
            "refund_id": refund_id,
            "kind": kind,
            "amount_minor": row.amount_minor,  # type: ignore[attr-defined]
            "currency": row.currency,  # type: ignore[attr-defined]
            "at_us": row.changed_us,  # type: ignore[attr-defined]
        },
        StatementLine,
    )
