"""The sandbox provider: a provider's book and its signed notices, for demos and tests; never for a real sale.

It behaves as a real provider does where it matters: a trade exists only once the buyer opens the pay page, a closed
trade cannot be paid, a paid one cannot be closed, and the notice is signed over its raw bytes with an age.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from typing import Annotated

import msgspec
from msgspec import Meta

from holdfast.clock import US_PER_MS, US_PER_S, Clock, microseconds, rfc3339
from holdfast.errors import HoldfastError, InvalidInput
from holdfast.services.contracts.values import Currency, MinorUnits, TradeEnd
from holdfast.services.payments.model import Capture, PaymentOrder, Token
from holdfast.services.payments.needs import ForgedNotice, RefundAnswer, RefundEnd, StatementLine, TradeAnswer
from holdfast.services.payments.sandbox_book import Asked, PayLink, RefundWish, SandboxBook, Trade

NAME = "sandbox"
SIGNATURE_HEADER = "sandbox-signature"
SECRET_CHARS_MIN = 16
Merchant = Annotated[str, Meta(max_length=128, pattern=r"^[^\x00-\x1f]*\Z")]  # what any database stores
_SIGNATURE = re.compile(r"t=(\d{1,12}),v1=([0-9a-f]{64})")


class Notice(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """The body of a notice."""

    event_id: Token
    merchant_id: Merchant
    payment_id: str
    trade_no: Token
    amount_minor: MinorUnits
    currency: Currency
    paid_at: datetime


class SignedNotice(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A notice ready to be posted."""

    body: str
    signature: str


class Signing:
    """What both sides of the sandbox know: the secret, and so the signatures of links, notices and questions."""

    name = NAME
    notice_answer = b"success"

    def __init__(self, clock: Clock, secret: str, merchant_id: str, tolerance_ms: int, page: str) -> None:
        self.merchant_id = merchant_id
        self._clock = clock
        self._secret = secret.encode()
        self._tolerance_us = tolerance_ms * US_PER_MS
        self._page = page  # where the pay page stands; a link is it and a token

    def pay_url(self, payment: PaymentOrder) -> str:
        link = PayLink(
            payment_id=payment.id,
            amount_minor=payment.amount_minor,
            currency=payment.currency,
            pay_by_us=payment.pay_by_us,
        )
        body = base64.urlsafe_b64encode(msgspec.json.encode(link)).rstrip(b"=")
        return f"{self._page}/{body.decode()}.{self._mac(b'link.' + body)}"

    def read_link(self, token: str) -> PayLink:
        """What a pay link says; raises `InvalidInput` for a forged one."""
        body, _, signature = token.partition(".")
        if not token.isascii() or not hmac.compare_digest(signature, self._mac(b"link." + body.encode())):
            raise InvalidInput("this pay link is forged or cut off")
        try:
            return msgspec.json.decode(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)), type=PayLink)
        except (msgspec.DecodeError, ValueError):  # signed by us, but not by this version
            raise InvalidInput("this pay link makes no sense here; take the one of the order as it is now") from None

    def signature(self, content: bytes) -> str:
        """The signature of some content as of now."""
        sent = str(self._clock.now_us() // US_PER_S)
        return f"t={sent},v1={self._mac(sent.encode() + b'.' + content)}"

    def verify(self, signature: str, content: bytes) -> None:
        """Raises `ForgedNotice` for a signature that is malformed, wrong or too old."""
        match = _SIGNATURE.fullmatch(signature)
        if match is None:
            raise ForgedNotice("the header Sandbox-Signature must read t=<unix seconds>,v1=<64 hex digits>")
        sent, mac = match.groups()
        if not hmac.compare_digest(mac, self._mac(sent.encode() + b"." + content)):
            raise ForgedNotice("the signature does not fit the body")
        if abs(self._clock.now_us() - int(sent) * US_PER_S) > self._tolerance_us:
            raise ForgedNotice("the notice is too old or from the future; it may be a replay")

    def sign(self, notice: Notice) -> SignedNotice:
        """Sign a notice as of now."""
        body = msgspec.json.encode(notice)
        return SignedNotice(body=body.decode(), signature=self.signature(body))

    def notice_of(self, trade: Trade) -> Notice:
        """What a notice says of a paid trade; the same trade has the same event id."""
        return Notice(
            event_id=f"evt-{trade.trade_no}",
            merchant_id=self.merchant_id,
            payment_id=str(trade.payment_id),
            trade_no=trade.trade_no,
            amount_minor=trade.amount_minor,
            currency=trade.currency,
            paid_at=datetime.fromisoformat(rfc3339(trade.changed_us)),
        )

    def verify_notice(self, headers: Mapping[str, str], raw: bytes) -> Capture | None:
        self.verify(headers.get(SIGNATURE_HEADER, ""), raw)
        try:
            notice = msgspec.json.decode(raw, type=Notice)
            return Capture(
                provider=self.name,
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

    def answer_of(self, trade: Trade | None) -> TradeAnswer:
        """What a trade as the book has it means."""
        if trade is None:
            return TradeAnswer(end=TradeEnd.OPEN)
        if trade.status == "closed":
            return TradeAnswer(end=TradeEnd.CLOSED)
        capture = Capture(
            provider=self.name,
            event_id=f"query-{trade.trade_no}",
            merchant_id=self.merchant_id,
            payment_id=trade.payment_id,
            trade_no=trade.trade_no,
            amount_minor=trade.amount_minor,
            currency=trade.currency,
            captured_us=trade.changed_us,
            raw=b"",
        )
        return TradeAnswer(end=TradeEnd.PAID, capture=capture)

    def _mac(self, content: bytes) -> str:
        return hmac.new(self._secret, content, hashlib.sha256).hexdigest()


class Sandbox(Signing):
    """The sandbox within the shop: the provider protocol over a book in the shop's database, and its till (`pay`)."""

    def __init__(self, book: SandboxBook, clock: Clock, secret: str, merchant_id: str, tolerance_ms: int) -> None:
        super().__init__(clock, secret, merchant_id, tolerance_ms, page="/sandbox/pay")
        self._book = book

    async def query(self, payment: PaymentOrder) -> TradeAnswer:
        try:
            return self.answer_of(await self._book.find(payment.id))
        except HoldfastError as error:
            return _unknown(error)

    async def close(self, payment: PaymentOrder) -> TradeAnswer:
        try:
            return self.answer_of(await self._book.close(asked_of(payment)))
        except HoldfastError as error:
            return _unknown(error)

    async def refund(self, payment: PaymentOrder, refund_id: int, amount_minor: int) -> RefundAnswer:
        try:
            return await self._book.refund(refund_wish(payment, refund_id, amount_minor))
        except HoldfastError as error:
            if not error.retryable:
                raise
            return RefundAnswer(end=RefundEnd.UNKNOWN)

    async def statement(self, day: date) -> Sequence[StatementLine]:
        return await self._book.statement(day)

    async def pay(self, token: str) -> SignedNotice:
        """The buyer pays by link: the trade is booked and its notice signed; paying again gives the same trade.

        Raises `InvalidInput` for a forged link and `TradeClosed` when the trade was closed or its time is over.
        """
        return self.sign(self.notice_of(await self._book.pay(self.read_link(token))))


def asked_of(payment: PaymentOrder) -> Asked:
    """Which trade is meant."""
    return Asked(payment_id=payment.id, amount_minor=payment.amount_minor, currency=payment.currency)


def refund_wish(payment: PaymentOrder, refund_id: int, amount_minor: int) -> RefundWish:
    """What is to be given back."""
    return RefundWish(
        payment_id=payment.id,
        amount_minor=amount_minor,
        currency=payment.currency,
        refund_id=refund_id,
        trade_no=payment.trade_no or "",
    )


def _unknown(error: HoldfastError) -> TradeAnswer:
    if not error.retryable:
        raise error
    return TradeAnswer(end=TradeEnd.UNKNOWN)


def _row_id(text: str) -> int:
    if not re.fullmatch(r"\d{1,18}|[1-8]\d{18}", text, re.ASCII):
        raise ValueError("paymentId is no id")
    return int(text)
