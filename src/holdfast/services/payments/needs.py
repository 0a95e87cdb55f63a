"""What payments asks of others: a provider of payments, and orders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from enum import StrEnum
from typing import Literal, Protocol

import msgspec

from holdfast.db.database import Tx
from holdfast.errors import InvalidInput
from holdfast.services.contracts.events import PaymentSucceeded
from holdfast.services.contracts.values import TradeEnd
from holdfast.services.payments.model import Capture, PaymentOrder


class ForgedNotice(InvalidInput):
    """A notice whose signature, age or form is wrong; it is answered with a refusal and changes nothing."""

    code = "forged_notice"


class TradeAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What the provider says of a trade; `capture` is there when it was paid."""

    end: TradeEnd
    capture: Capture | None = None


class RefundEnd(StrEnum):
    """What became of a wish to give money back."""

    DONE = "done"  # now, or by an earlier call with the same refund id
    REFUSED = "refused"  # known not to have happened; asking again with the same facts cannot help
    UNKNOWN = "unknown"  # nobody knows; ask again with the same refund id


class RefundAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What the provider says of a refund; `reason` is its word for a refusal."""

    end: RefundEnd
    reason: str = ""


class StatementLine(msgspec.Struct, frozen=True, kw_only=True):
    """One movement of money in the provider's own book."""

    trade_no: str
    payment_id: int
    refund_id: int | None = None  # ours, where the movement is a refund
    kind: Literal["capture", "refund"]
    amount_minor: int  # positive for both kinds
    currency: str
    at_us: int


class Provider(Protocol):
    """A payment provider.

    The asynchronous calls leave the process: each has a deadline of its own and ends `UNKNOWN` rather than late, never
    with an error of the network. They are never made within a transaction, and may be repeated.
    """

    name: str
    """By which its payment orders name it and its notices come in: `/v1/notices/{name}`."""

    merchant_id: str
    """Whom its captures must name (`Capture.merchant_id`); account and app as one text where there are both."""

    notice_answer: bytes
    """The plain body that tells the provider that its notice is stored and applied."""

    def pay_url(self, payment: PaymentOrder) -> str:
        """Where the buyer pays this payment order, until its `pay_by_us`; made within the transaction that places.

        It does not leave the process, and answers the same whenever it is asked.
        """
        ...

    def verify_notice(self, headers: Mapping[str, str], raw: bytes) -> Capture | None:
        """Check signature, age and form over the raw bytes; raises `ForgedNotice`.

        Header names are in lower case. None is a genuine notice that tells of no captured money. Amount, currency and
        merchant are not judged here: they are reported as they stand there.
        """
        ...

    async def query(self, payment: PaymentOrder) -> TradeAnswer:
        """Ask what became of a trade and change nothing: `PAID` with its capture, `CLOSED`, `OPEN` or `UNKNOWN`."""
        ...

    async def close(self, payment: PaymentOrder) -> TradeAnswer:
        """Make a trade unpayable, unless it is paid: `CLOSED` (also one never opened), `PAID` or `UNKNOWN`."""
        ...

    async def refund(self, payment: PaymentOrder, refund_id: int, amount_minor: int) -> RefundAnswer:
        """Give money back, once for each refund id."""
        ...

    async def statement(self, day: date) -> Sequence[StatementLine]:
        """The movements of a day as the provider cuts its days.

        Raises `Unavailable` when they are not known, as for a day that has not ended.
        """
        ...


class Orders(Protocol):
    """The orders that payments pay for, in the caller's transaction; messages are the usual way, this the guard."""

    async def pay(self, tx: Tx, events: Sequence[PaymentSucceeded]) -> None:
        """Mark orders paid whose money came in time, and ask for refunds of the rest; again does no harm."""
        ...
