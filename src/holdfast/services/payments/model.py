"""Rules of payments: what a notice means for a payment order. Pure: no await, no clock, no I/O."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec
from msgspec import Meta

from holdfast.services.contracts.values import Currency, MinorUnits

# Status of a payment order, with the numbers of the course notes.
NOT_SUBMITTED = 0
WAITING = 1
ENDED = 2  # timed out or cancelled
SUCCEEDED = 3

RowId = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Token = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[\x21-\x7e]+\Z")]


class Capture(msgspec.Struct, frozen=True, kw_only=True):
    """A provider's word, verified, that it took money for a payment order."""

    provider: str
    event_id: Token
    merchant_id: str
    payment_id: RowId
    trade_no: Token
    amount_minor: MinorUnits
    currency: Currency
    captured_us: int
    raw: bytes  # as it was received, kept as evidence


class PaymentOrder(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be paid for an order, and how far that got."""

    id: int
    order_id: int
    buyer: str
    provider: str
    amount_minor: int
    currency: str
    status: int
    trade_no: str | None
    captured_minor: int
    refunded_minor: int
    captured_us: int | None
    pay_by_us: int


class PaymentDetails(msgspec.Struct, frozen=True, kw_only=True):
    """A payment order with its times, and where it can be paid as long as it can."""

    order: PaymentOrder
    created_us: int
    changed_us: int
    pay_url: str | None = None


class Verdict(StrEnum):
    """What became of a notice; stored beside its raw text."""

    APPLIED = "applied"
    REPEATED = "repeated"  # the same trade told again under another event id
    RECEIVED = "received"  # kept, but judging it failed; it is judged again
    UNKNOWN_PAYMENT = "unknown_payment"  # parked: no such payment order; judged again when it appears
    WRONG_FACTS = "wrong_facts"  # parked: amount, currency or merchant differ
    SECOND_TRADE = "second_trade"  # parked: paid twice by two trades


UNDECIDED = frozenset({Verdict.RECEIVED, Verdict.UNKNOWN_PAYMENT})
PARKED = UNDECIDED | {Verdict.WRONG_FACTS, Verdict.SECOND_TRADE}


def judge(capture: Capture, payment: PaymentOrder | None, merchant_id: str | None) -> Verdict:
    """Say what a verified notice means; only `APPLIED` changes the payment order."""
    if payment is None:
        return Verdict.UNKNOWN_PAYMENT
    facts = (capture.amount_minor, capture.currency, capture.merchant_id, capture.provider)
    if facts != (payment.amount_minor, payment.currency, merchant_id, payment.provider):
        return Verdict.WRONG_FACTS
    if payment.status != SUCCEEDED:
        return Verdict.APPLIED
    return Verdict.REPEATED if capture.trade_no == payment.trade_no else Verdict.SECOND_TRADE
