"""Rules of payments: what a notice means for a payment order. Pure: no await, no clock, no I/O."""

from __future__ import annotations

import hashlib
from enum import StrEnum
from typing import Annotated

import msgspec
from msgspec import Meta

from holdfast.clock import rfc3339
from holdfast.errors import InvalidInput, Refused
from holdfast.services.contracts.values import AMOUNT_MINOR_MAX, Currency, MinorUnits

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
    refunding_minor: int = 0  # reserved by refunds that the provider has not answered yet

    @property
    def left_minor(self) -> int:
        """What can still be given back."""
        return self.captured_minor - self.refunded_minor - self.refunding_minor


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


# -- refunds ----------------------------------------------------------------------------------------------------------

LATE = "late"  # money that no order owes goes back by itself, once for each payment
STAFF = "staff"

Reason = Annotated[str, Meta(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f-\x9f]+\Z")]
RefundAmount = Annotated[int, Meta(ge=1, le=AMOUNT_MINOR_MAX)]

ASK_AGAIN_MS = 5_000
ASK_AGAIN_MS_MAX = 900_000


class RefundStatus(StrEnum):
    """Where a refund is; an unknown answer of the provider leaves it pending."""

    PENDING = "pending"  # its amount is reserved, the provider is asked until it answers
    DONE = "done"
    REFUSED = "refused"  # by the provider; its amount is free again


class Refund(msgspec.Struct, frozen=True, kw_only=True):
    """Money on its way back to a buyer."""

    id: int
    payment_id: int
    order_id: int
    key: str
    kind: str
    reason: str
    actor: str
    fingerprint: bytes
    amount_minor: int
    currency: str
    status: str
    attempts: int
    ask_us: int
    detail: str
    created_us: int
    changed_us: int


class RefundView(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A refund as staff see it; `detail` is what the provider said when it refused."""

    id: str
    payment_id: str
    order_id: str
    status: RefundStatus
    kind: str
    amount_minor: int
    currency: str
    reason: str
    actor: str
    attempts: int
    detail: str
    created_at: str
    changed_at: str


class RefundWish(msgspec.Struct, frozen=True, kw_only=True):
    """A wish of staff to give money back, once for each key; no amount means all that is left."""

    key: str
    actor: str
    reason: Reason
    payment_id: RowId | None = None
    order_id: RowId | None = None
    amount_minor: RefundAmount | None = None

    @property
    def fingerprint(self) -> bytes:
        """What the key stands for."""
        wanted = [self.payment_id, self.order_id, self.amount_minor, self.reason]
        return hashlib.sha256(msgspec.json.encode(wanted)).digest()


class PaymentNotFound(Refused):
    """There is no such payment."""

    code = "payment_not_found"


class RefundNotFound(Refused):
    """There is no such refund."""

    code = "refund_not_found"


class NothingToRefund(Refused):
    """No captured money is left that could be given back."""

    code = "nothing_to_refund"


class RefundTooLarge(Refused):
    """The amount is more than what is left of the captured money."""

    code = "refund_too_large"


class RefundDone(Refused):
    """The refund is done; there is nothing to try again."""

    code = "refund_done"


def check_wish(wish: RefundWish) -> None:
    """Refuse a wish that names no payment, two, or an amount or reason out of range: `InvalidInput`."""
    if (wish.payment_id is None) == (wish.order_id is None):
        raise InvalidInput("name either paymentId or orderId")
    try:
        msgspec.convert(msgspec.structs.asdict(wish), RefundWish)
    except msgspec.ValidationError as error:
        raise InvalidInput(f"the refund is wrong: {error}") from None


def refund_amount(wish: RefundWish, payment: PaymentOrder) -> int | Refused:
    """How much a wish gives back of a payment, or why it cannot."""
    if payment.left_minor <= 0:
        return NothingToRefund(
            f"of {payment.captured_minor} captured, {payment.refunded_minor} are given back "
            f"and {payment.refunding_minor} are on their way"
        )
    amount_minor = wish.amount_minor or payment.left_minor
    if amount_minor > payment.left_minor:
        return RefundTooLarge(f"{payment.left_minor} can be given back, {amount_minor} are wanted")
    return amount_minor


def ask_again_ms(attempts: int) -> int:
    """How long to wait after so many answers that said nothing."""
    return int(min(ASK_AGAIN_MS * 2 ** min(attempts - 1, 30), ASK_AGAIN_MS_MAX))


def refund_view(refund: Refund) -> RefundView:
    """A refund as staff see it."""
    return RefundView(
        id=str(refund.id),
        payment_id=str(refund.payment_id),
        order_id=str(refund.order_id),
        status=RefundStatus(refund.status),
        kind=refund.kind,
        amount_minor=refund.amount_minor,
        currency=refund.currency,
        reason=refund.reason,
        actor=refund.actor,
        attempts=refund.attempts,
        detail=refund.detail,
        created_at=rfc3339(refund.created_us),
        changed_at=rfc3339(refund.changed_us),
    )


def as_booked(refund: Refund) -> RefundView:
    """A refund as it was put on the books: what every request under its key is answered."""
    pending = RefundStatus.PENDING
    first = msgspec.structs.replace(refund, status=pending, attempts=0, detail="", changed_us=refund.created_us)
    return refund_view(first)
