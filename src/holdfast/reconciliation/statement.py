"""The provider's statement against the book of payments: captures and refunds, both ways.

Three ended days are taken together, since a provider cuts its days by its own clock. What the book has and the
statement has not is asked of the provider before it counts, where it can be asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime, time, timedelta
from typing import Any, TypeVar

import msgspec
from sqlalchemy import select

from holdfast.clock import US_PER_S, microseconds
from holdfast.db.database import Database
from holdfast.errors import HoldfastError
from holdfast.reconciliation.model import Found, found_row
from holdfast.services.contracts.values import TradeEnd
from holdfast.services.payments import refund_store, store
from holdfast.services.payments.model import SUCCEEDED, PaymentOrder, Refund
from holdfast.services.payments.needs import Provider, StatementLine

DAYS = 3
CHUNK = 500
QUERIES_MAX = 100

T = TypeVar("T")


class Compared(msgspec.Struct, frozen=True, kw_only=True):
    """What a comparison with all providers found; without `complete` nothing may be taken as gone."""

    found: list[Found]
    notes: list[str]
    complete: bool


class Book:
    """The local book, as far as a statement asks for it."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def payments(self, ids: Iterable[int]) -> dict[int, PaymentOrder]:
        """Payment orders by id."""
        known: dict[int, PaymentOrder] = {}
        for chunk in _chunks(sorted(set(ids))):
            async with self._database.read() as tx:
                for payment_id in chunk:
                    if (payment := await store.by_id(tx, payment_id)) is not None:
                        known[payment_id] = payment
        return known

    async def refunds(self, ids: Iterable[int]) -> dict[int, Refund]:
        """Refunds by id."""
        known: dict[int, Refund] = {}
        for chunk in _chunks(sorted(set(ids))):
            async with self._database.read() as tx:
                known |= await refund_store.by_ids(tx, chunk)
        return known

    async def captured(self, provider: str, from_us: int, to_us: int) -> list[PaymentOrder]:
        """Payments whose money came from a provider in this span."""
        table = store.payments
        fields = [table.c[name] for name in PaymentOrder.__struct_fields__]
        wanted = select(*fields).where(
            table.c.provider == provider, table.c.status == SUCCEEDED, table.c.captured_us.between(from_us, to_us - 1)
        )
        async with self._database.read() as tx:
            return [PaymentOrder(**row._mapping) for row in await tx.execute(wanted.order_by(table.c.id))]

    async def given_back(self, provider: str, from_us: int, to_us: int) -> list[Refund]:
        """Refunds that a provider confirmed in this span."""
        table, payments = store.refunds, store.payments
        wanted = (
            select(table)
            .join(payments, payments.c.id == table.c.payment_id)
            .where(
                payments.c.provider == provider,
                table.c.status == "done",
                table.c.changed_us.between(from_us, to_us - 1),
            )
        )
        async with self._database.read() as tx:
            return [Refund(**row._mapping) for row in await tx.execute(wanted.order_by(table.c.id))]


async def compare(database: Database, providers: Mapping[str, Provider], now_us: int, slack_us: int) -> Compared:
    """Compare the last ended days of every provider with the book; reads only."""
    all_found: list[Found] = []
    notes: list[str] = []
    complete = True
    today = datetime.fromtimestamp(now_us // US_PER_S, UTC).date()
    for name, provider in sorted(providers.items()):
        days = [today - timedelta(days=back) for back in range(DAYS, 0, -1)]
        lines: list[StatementLine] = []
        known_days = []
        for day in days:
            try:
                lines += await provider.statement(day)
            except HoldfastError as error:
                notes.append(f"no statement of {name} for {day}: {error.detail}"[:300])
            else:
                known_days.append(day)
        complete = complete and known_days == days
        book = Book(database)
        settled = [line for line in lines if line.at_us < now_us - slack_us]
        all_found += await _not_in_book(book, name, settled)
        if known_days == days:
            all_found += await _captures_missing(book, provider, lines, days[1], days[2])
            all_found += await _refunds_missing(book, name, lines, days[1])
    unique = {(each.kind, each.subject): each for each in all_found}
    return Compared(found=list(unique.values()), notes=notes, complete=complete)


async def _not_in_book(book: Book, name: str, lines: Sequence[StatementLine]) -> list[Found]:
    payments = await book.payments(line.payment_id for line in lines)
    refunds = await book.refunds(line.refund_id for line in lines if line.refund_id is not None)
    found = []
    for line in lines:
        if line.kind == "capture":
            payment = payments.get(line.payment_id)
            kind = _capture_kind(line, payment if payment and payment.provider == name else None)
        else:
            kind = _refund_kind(line, refunds.get(line.refund_id) if line.refund_id is not None else None)
        if kind is not None:
            found.append(_found(kind, name, line))
    return found


def _capture_kind(line: StatementLine, payment: PaymentOrder | None) -> str | None:
    if payment is None:
        return "provider.capture_unknown"
    if payment.status != SUCCEEDED:
        same = (line.amount_minor, line.currency) == (payment.amount_minor, payment.currency)
        return "provider.capture_not_booked" if same else "provider.amount_differs"
    booked = (payment.captured_minor, payment.currency, payment.trade_no)
    return None if (line.amount_minor, line.currency, line.trade_no) == booked else "provider.amount_differs"


def _refund_kind(line: StatementLine, refund: Refund | None) -> str | None:
    if refund is None or refund.payment_id != line.payment_id:
        return "provider.refund_unknown"
    if (line.amount_minor, line.currency) != (refund.amount_minor, refund.currency):
        return "provider.refund_differs"
    return None if refund.status == "done" else "provider.refund_not_booked"


async def _captures_missing(
    book: Book, provider: Provider, lines: Sequence[StatementLine], first: date, last: date
) -> list[Found]:
    """Captures in the book that neither the statement nor the provider, asked again, knows."""
    told = {line.payment_id for line in lines if line.kind == "capture"}
    booked = await book.captured(provider.name, _start_us(first), _start_us(last + timedelta(days=1)))
    found = []
    for payment in [each for each in booked if each.id not in told][:QUERIES_MAX]:
        answer = await provider.query(payment)
        if answer.end in (TradeEnd.OPEN, TradeEnd.CLOSED):
            facts = {"captured_minor": payment.captured_minor, "trade_no": payment.trade_no}
            row = {"provider": provider.name, "payment_id": payment.id, "order_id": payment.order_id, **facts}
            found.append(found_row("provider.capture_missing", row))
    return found


async def _refunds_missing(book: Book, name: str, lines: Sequence[StatementLine], day: date) -> list[Found]:
    """Refunds in the book that no statement tells of; of the middle day, whose neighbours are known."""
    told = {line.refund_id for line in lines if line.kind == "refund"}
    booked = await book.given_back(name, _start_us(day), _start_us(day + timedelta(days=1)))
    return [
        found_row(
            "provider.refund_missing",
            {
                "provider": name,
                "refund_id": refund.id,
                "payment_id": refund.payment_id,
                "order_id": refund.order_id,
                "amount_minor": refund.amount_minor,
            },
        )
        for refund in booked
        if refund.id not in told
    ]


def _found(kind: str, name: str, line: StatementLine) -> Found:
    row: dict[str, Any] = {"provider": name, **msgspec.structs.asdict(line)}
    return found_row(kind, row)


def _start_us(day: date) -> int:
    return microseconds(datetime.combine(day, time(), UTC))


def _chunks(values: Sequence[T]) -> Iterable[Sequence[T]]:
    for start in range(0, len(values), CHUNK):
        yield values[start : start + CHUNK]
