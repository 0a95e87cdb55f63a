"""What the feed asks of others: whose an order is, and who is to be told of an event."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from holdfast.db.database import Tx
from holdfast.services.contracts.feed import Happened


class Owners(Protocol):
    """Knows the buyers of orders."""

    async def buyers(self, tx: Tx, order_ids: Collection[int]) -> Mapping[int, str]:
        """The buyer of each of these orders that exists."""
        ...


class Followers(Protocol):
    """Those who are sent every event."""

    async def fan_out(self, tx: Tx, events: Sequence[Happened]) -> None:
        """Take note of events in the transaction that records them."""
        ...
