"""The sandbox provider: a provider's book and its signed notices, for demos and tests; never for a real sale.

It behaves as a real provider does where it matters: a trade exists only once the buyer opens the pay page, a closed
trade cannot be paid, a paid one cannot be closed, and the notice is signed over its raw bytes with an age.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, timedelta

import msgspec
from sqlalchemy import BigInteger, CheckConstraint, Column, Table, Text, select

from holdfast.clock import US_PER_MS, US_PER_S, Clock, microseconds, rfc3339
from holdfast.db.database import Database, Tx
from holdfast.db.group_commit import GroupCommit
from holdfast.db.prepared import insert
from holdfast.errors import HoldfastError, InvalidInput, Refused
from holdfast.services.contracts.values import Currency, MinorUnits, TradeEnd
from holdfast.services.payments.model import Capture, PaymentOrder, RowId, Token
from holdfast.services.payments.needs import ForgedNotice, RefundAnswer, RefundEnd, StatementLine, TradeAnswer
from holdfast.services.schema import metadata

NAME = "sandbox"
SIGNATURE_HEADER = "sandbox-signature"
_SIGNATURE = re.compile(r"t=(\d{1,12}),v1=([0-9a-f]{64})")

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
    Column("amount_minor", BigInteger, nullable=False),
    Column("changed_us", BigInteger, nullable=False),
)


class TradeClosed(Refused):
    """This trade was closed or its time is over; it cannot be paid."""

    code = "trade_closed"


class Notice(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """The body of a notice."""

    event_id: Token
    merchant_id: str
    payment_id: str
    trade_no: Token
    amount_minor: MinorUnits
    currency: Currency
    paid_at: datetime


class PayLink(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """What a pay link says, signed: whoever holds it can pay exactly this, until then."""

    payment_id: RowId
    amount_minor: MinorUnits
    currency: Currency
    pay_by_us: int


class SignedNotice(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A notice ready to be posted."""

    body: str
    signature: str


class Sandbox:
    """The provider protocol, and the provider's side of the counter (`pay`)."""

    name = NAME
    notice_answer = b"success"

    def __init__(
        self,
        database: Database,
        group: GroupCommit,
        clock: Clock,
        secret: str,
        merchant_id: str,
        tolerance_ms: int,
    ) -> None:
        self._database = database
        self._group = group
        self._clock = clock
        self._secret = secret.encode()
        self.merchant_id = self._merchant_id = merchant_id
        self._tolerance_us = tolerance_ms * US_PER_MS

    def pay_url(self, payment: PaymentOrder) -> str:
        link = PayLink(
            payment_id=payment.id,
            amount_minor=payment.amount_minor,
            currency=payment.currency,
            pay_by_us=payment.pay_by_us,
        )
        body = base64.urlsafe_b64encode(msgspec.json.encode(link)).rstrip(b"=")
        return f"/sandbox/pay/{body.decode()}.{self._mac(b'link.' + body)}"

    def verify_notice(self, headers: Mapping[str, str], raw: bytes) -> Capture:
        match = _SIGNATURE.fullmatch(headers.get(SIGNATURE_HEADER, ""))
        if match is None:
            raise ForgedNotice("the header Sandbox-Signature must read t=<unix seconds>,v1=<64 hex digits>")
        sent, signature = match.groups()
        if not hmac.compare_digest(signature, self._mac(sent.encode() + b"." + raw)):
            raise ForgedNotice("the signature does not fit the body")
        if abs(self._clock.now_us() - int(sent) * US_PER_S) > self._tolerance_us:
            raise ForgedNotice("the notice is too old or from the future; it may be a replay")
        try:
            notice = msgspec.json.decode(raw, type=Notice)
            return Capture(
                provider=NAME,
                event_id=notice.event_id,
                merchant_id=notice.merchant_id,
                payment_id=_row_id(notice.payment_id),
                trade_no=notice.trade_no,
                amount_minor=notice.amount_minor,
                currency=notice.currency,
                captured_us=microseconds(notice.paid_at),
                raw=raw,
            )
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise ForgedNotice(f"the notice is malformed: {error}") from None

    async def query(self, payment: PaymentOrder) -> TradeAnswer:
        async with self._database.read() as tx:
            found = (await tx.execute(select(trades).where(trades.c.payment_id == payment.id))).first()
            return TradeAnswer(end=TradeEnd.OPEN) if found is None else await self._answer(tx, payment)

    async def statement(self, day: date) -> Sequence[StatementLine]:
        begin = datetime(day.year, day.month, day.day, tzinfo=UTC)
        since_us, until_us = microseconds(begin), microseconds(begin + timedelta(days=1))
        async with self._database.read() as tx:
            paid = (await tx.execute(select(trades).where(trades.c.status == "paid"))).all()
            back = (await tx.execute(select(given_back))).all()
        by_payment = {row.payment_id: row for row in paid}
        lines = [
            StatementLine(
                trade_no=row.trade_no,
                payment_id=row.payment_id,
                kind="capture",
                amount_minor=row.amount_minor,
                currency=row.currency,
                at_us=row.changed_us,
            )
            for row in paid
        ]
        for row in back:
            trade = by_payment.get(row.payment_id)
            lines.append(
                StatementLine(
                    trade_no=trade.trade_no if trade else "",
                    payment_id=row.payment_id,
                    refund_id=row.refund_id,
                    kind="refund",
                    amount_minor=row.amount_minor,
                    currency=trade.currency if trade else "",
                    at_us=row.changed_us,
                )
            )
        return [line for line in lines if since_us <= line.at_us < until_us]

    async def close(self, payment: PaymentOrder) -> TradeAnswer:
        try:
            return await self._group.submit(self._close, payment)
        except HoldfastError as error:
            if not error.retryable:
                raise
            return TradeAnswer(end=TradeEnd.UNKNOWN)

    async def refund(self, payment: PaymentOrder, refund_id: int, amount_minor: int) -> RefundAnswer:
        row = {"refund_id": refund_id, "payment_id": payment.id, "amount_minor": amount_minor}
        try:
            await self._group.submit(self._refund, row)
        except HoldfastError as error:
            if not error.retryable:
                raise
            return RefundAnswer(end=RefundEnd.UNKNOWN)
        return RefundAnswer(end=RefundEnd.DONE)

    async def pay(self, token: str) -> SignedNotice:
        """The buyer pays by link: the trade is booked and its notice signed; paying again gives the same trade.

        Raises `InvalidInput` for a forged link and `TradeClosed` when the trade was closed or its time is over.
        """
        link = self._read_link(token)
        trade_no, paid_us = await self._group.submit(self._pay, link)
        return self.sign(
            Notice(
                event_id=f"evt-{trade_no}",
                merchant_id=self._merchant_id,
                payment_id=str(link.payment_id),
                trade_no=trade_no,
                amount_minor=link.amount_minor,
                currency=link.currency,
                paid_at=datetime.fromisoformat(rfc3339(paid_us)),
            )
        )

    def sign(self, notice: Notice) -> SignedNotice:
        """Sign a notice as of now."""
        body = msgspec.json.encode(notice)
        sent = str(self._clock.now_us() // US_PER_S)
        return SignedNotice(body=body.decode(), signature=f"t={sent},v1={self._mac(sent.encode() + b'.' + body)}")

    def _read_link(self, token: str) -> PayLink:
        body, _, signature = token.partition(".")
        if not token.isascii() or not hmac.compare_digest(signature, self._mac(b"link." + body.encode())):
            raise InvalidInput("this pay link is forged or cut off")
        try:
            return msgspec.json.decode(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)), type=PayLink)
        except (msgspec.DecodeError, ValueError):  # signed by us, but not by this version
            raise InvalidInput("this pay link makes no sense here; take the one of the order as it is now") from None

    def _mac(self, content: bytes) -> str:
        return hmac.new(self._secret, content, hashlib.sha256).hexdigest()

    async def _pay(self, tx: Tx, links: Sequence[PayLink]) -> list[tuple[str, int] | HoldfastError]:
        return [await self._pay_one(tx, link) for link in links]

    async def _pay_one(self, tx: Tx, link: PayLink) -> tuple[str, int] | HoldfastError:
        now_us = self._clock.now_us()
        if now_us < link.pay_by_us:
            await self._book(tx, "paid", link.payment_id, link.amount_minor, link.currency)
        found = await tx.execute(select(trades).where(trades.c.payment_id == link.payment_id))
        trade = found.first()
        if trade is None or trade.status != "paid":
            return TradeClosed("the time to pay is over" if trade is None else "this trade was closed")
        return str(trade.trade_no), int(trade.changed_us)

    async def _close(self, tx: Tx, payments: Sequence[PaymentOrder]) -> list[TradeAnswer | HoldfastError]:
        for payment in payments:
            await self._book(tx, "closed", payment.id, payment.amount_minor, payment.currency)
        return [await self._answer(tx, payment) for payment in payments]

    async def _answer(self, tx: Tx, payment: PaymentOrder) -> TradeAnswer:
        trade = (await tx.execute(select(trades).where(trades.c.payment_id == payment.id))).one()
        if trade.status == "closed":
            return TradeAnswer(end=TradeEnd.CLOSED)
        capture = Capture(
            provider=NAME,
            event_id=f"query-{trade.trade_no}",
            merchant_id=self._merchant_id,
            payment_id=payment.id,
            trade_no=trade.trade_no,
            amount_minor=trade.amount_minor,
            currency=trade.currency,
            captured_us=trade.changed_us,
            raw=b"",
        )
        return TradeAnswer(end=TradeEnd.PAID, capture=capture)

    async def _book(self, tx: Tx, status: str, payment_id: int, amount_minor: int, currency: str) -> None:
        # Whoever comes first decides the trade; the loser reads what it became.
        row = {
            "payment_id": payment_id,
            "status": status,
            "trade_no": f"sb{payment_id:x}{secrets.token_hex(4)}",
            "amount_minor": amount_minor,
            "currency": currency,
            "changed_us": self._clock.now_us(),
        }
        await tx.execute(insert(tx.dialect, trades).values(**row).on_conflict_do_nothing())

    async def _refund(self, tx: Tx, rows: Sequence[dict[str, int]]) -> list[HoldfastError | None]:
        now_us = self._clock.now_us()
        booked = [row | {"changed_us": now_us} for row in rows]
        await tx.execute(insert(tx.dialect, given_back).on_conflict_do_nothing(), booked)
        return [None for _ in rows]


def _row_id(text: str) -> int:
    if not re.fullmatch(r"\d{1,18}|[1-8]\d{18}", text, re.ASCII):
        raise ValueError("paymentId is no id")
    return int(text)
