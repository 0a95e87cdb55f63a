"""What payments asks of others: a provider of payments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import msgspec

from holdfast.errors import InvalidInput
from holdfast.services.contracts.values import TradeEnd
from holdfast.services.payments.model import Capture, PaymentOrder


class ForgedNotice(InvalidInput):
    """A notice whose signature, age or form is wrong; it is answered with a refusal and changes nothing."""

    code = "forged_notice"


class TradeAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What the provider says of a trade; `capture` is there when it was paid."""

    end: TradeEnd
    capture: Capture | None = None


class Provider(Protocol):
    """A payment provider. Its calls leave the process: they have a deadline and may end unknown."""

    name: str

    def pay_url(self, payment: PaymentOrder) -> str:
        """Where the buyer pays this payment order."""
        ...

    def verify_notice(self, headers: Mapping[str, str], raw: bytes) -> Capture:
        """Check signature, age and form over the raw bytes; raises `ForgedNotice`."""
        ...

    async def close(self, payment: PaymentOrder) -> TradeAnswer:
        """Make a trade unpayable, unless it is paid; a lost answer is `UNKNOWN`, never one of the others."""
        ...

    async def refund(self, payment: PaymentOrder, refund_id: int, amount_minor: int) -> bool:
        """Give money back, once for each refund id; False when nobody knows whether it happened."""
        ...
