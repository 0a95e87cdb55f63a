"""What orders asks of other services, in its own words."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from holdfast.db.database import Tx
from holdfast.services.contracts.values import Bill, Line, PaymentRef, Price, Shortage, TradeEnd, Wanted


class Catalogue(Protocol):
    """Prices."""

    async def prices(self, tx: Tx, wanted: Collection[str]) -> Mapping[str, Price]:
        """The prices of those SKUs that exist."""
        ...


class Stock(Protocol):
    """Units."""

    async def lock(self, tx: Tx, skus: Collection[str]) -> None:
        """Let no other transaction hold units of these SKUs before this one has ended."""
        ...

    async def reserve(self, tx: Tx, orders: Sequence[Wanted]) -> Sequence[Shortage | None]:
        """Hold stock for orders in the given order, each all or nothing; None says that it is held."""
        ...


class Payments(Protocol):
    """Money, in the caller's transaction."""

    async def open(self, tx: Tx, bills: Sequence[Bill]) -> Sequence[PaymentRef]:
        """Open a payment order for each bill."""
        ...

    async def end(self, tx: Tx, order_ids: Collection[int]) -> set[int]:
        """End unpaid payment orders; answers the orders that can close, not those paid meanwhile."""
        ...

    async def extend(self, tx: Tx, deadlines: Mapping[int, int]) -> Mapping[int, PaymentRef]:
        """Let the payment orders of these orders be paid until another instant; answers where they are paid now."""
        ...

    async def accept(self, tx: Tx, payment_ids: Collection[int]) -> None:
        """Take note that these payments have paid their orders."""
        ...


class Carts(Protocol):
    """What buyers have put together."""

    async def contents(self, tx: Tx, buyers: Collection[str]) -> Mapping[str, Sequence[Line]]:
        """The lines in these buyers' carts; who has none is missing."""
        ...


class Cashier(Protocol):
    """Money, where the provider has to be asked first; never within a transaction."""

    async def settle_before_close(self, order_id: int) -> TradeEnd:
        """Make an order's trade unpayable, or learn that it is paid; unknown never means either."""
        ...
