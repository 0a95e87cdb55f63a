"""Orders' counter: what the edge, the listeners and the sweeper may ask."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from enum import StrEnum

from holdfast import observe
from holdfast.clock import US_PER_MS, Clock
from holdfast.db.database import Database, Tx
from holdfast.db.group_commit import GroupCommit
from holdfast.errors import Unavailable
from holdfast.services.contracts.values import Fate, TradeEnd
from holdfast.services.orders import store
from holdfast.services.orders.fulfilment import Fulfilment
from holdfast.services.orders.model import (
    ENDED_UNPAID,
    PAID_FOR,
    CancelRequest,
    CompleteRequest,
    Entry,
    ExtendRequest,
    NotCancellable,
    OrderNotFound,
    OrderStatus,
    OrderView,
    Placed,
    PlaceRequest,
    ShipRequest,
    as_buyer_sees,
    check_lines,
)
from holdfast.services.orders.needs import Cashier
from holdfast.services.orders.place import PlaceOrders
from holdfast.services.orders.transitions import Transitions
from holdfast.settings import OrdersSettings

SWEEP_PAGE = 500
EXPIRE_AT_ONCE = 32

_FATES = {
    OrderStatus.PENDING_PAYMENT: Fate.OPEN,
    **dict.fromkeys(PAID_FOR, Fate.PAID),
    **dict.fromkeys(ENDED_UNPAID, Fate.ENDED),
}

log = observe.logger("orders")


class Expiry(StrEnum):
    """What became of an attempt to close an order at its deadline."""

    DONE = "done"  # closed now, or there was nothing left to close
    EARLY = "early"  # its time is not over
    UNKNOWN = "unknown"  # the payment side does not know; ask again later


class OrderService:
    """One call per wish or question; verbs go through the group commit, reads outside of it."""

    def __init__(
        self,
        database: Database,
        stock_group: GroupCommit,
        group: GroupCommit,
        place: PlaceOrders,
        transitions: Transitions,
        fulfilment: Fulfilment,
        cashier: Cashier,
        clock: Clock,
        settings: OrdersSettings,
    ) -> None:
        self._database = database
        self._stock_group = stock_group  # placing holds stock
        self._group = group
        self._place = place
        self.transitions = transitions
        self.fulfilment = fulfilment
        self._cashier = cashier
        self._clock = clock
        self._settings = settings

    async def place(self, request: PlaceRequest) -> Placed:
        """Place an order; returning means that it is committed.

        Raises `InvalidInput`, a refusal (`SoldOut`, `UnknownSku`, `MixedCurrencies`, `KeyReused`), or one of
        `Overloaded`, `Unavailable`, `OutcomeUnknown`: then the same request with the same key may be sent again.
        """
        if not request.from_cart:
            check_lines(request.lines, self._settings.lines_max, self._settings.quantity_max)
        return await self._stock_group.submit(self._place, request)

    async def get(self, order_id: int, buyer: str | None) -> OrderView:
        """A buyer's own order, or anybody's for staff (`buyer` is None); raises `OrderNotFound`, also for another's."""
        async with self._database.read() as tx:
            found = await store.read_views(tx, [order_id], buyer)
        if order_id not in found:
            raise OrderNotFound()
        return found[order_id]

    async def page(self, *, buyer: str | None, status: OrderStatus | None, before: int, limit: int) -> list[OrderView]:
        """Orders with an id below `before`, the newest first, at most `limit`: a buyer's own, or all (None)."""
        async with self._database.read(snapshot=True) as tx:
            page = await store.page_of_ids(tx, buyer=buyer, status=status, before=before, limit=limit)
            views = await store.read_views(tx, page, buyer)
        return [views[order_id] for order_id in page]

    async def timeline(self, order_id: int, buyer: str | None) -> list[Entry]:
        """What happened to an order, the oldest first; raises `OrderNotFound`, also for another buyer's.

        A buyer does not learn the names of employees.
        """
        await self.get(order_id, buyer)
        async with self._database.read() as tx:
            entries = await store.read_log(tx, order_id)
        return entries if buyer is None else [as_buyer_sees(entry, buyer) for entry in entries]

    async def ship(self, request: ShipRequest) -> OrderView:
        """Note that a paid order has left the house; raises `OrderNotFound` or `NotShippable`."""
        return await self._group.submit(self.fulfilment.ship, request)

    async def complete(self, request: CompleteRequest) -> OrderView:
        """Note that a shipped order has arrived; raises `OrderNotFound` or `NotCompletable`."""
        return await self._group.submit(self.fulfilment.complete, request)

    async def arrive(self, order_id: int) -> bool:
        """Complete a shipped order whose delivery time is over; False when it is too early."""
        return await self._group.submit(self.fulfilment.arrive, order_id)

    async def extend(self, request: ExtendRequest) -> OrderView:
        """Give an unpaid order a later deadline; raises `OrderNotFound` or `NotExtendable`."""
        return await self._group.submit(self.transitions.extend, request)

    async def cancel(self, order_id: int, buyer: str | None, actor: str = "buyer") -> OrderView:
        """Cancel an unpaid order, a buyer's own or any for staff (`buyer` is None), its trade at the provider first.

        Raises `OrderNotFound`, `NotCancellable`, or `Unavailable` when the provider's answer is unknown.
        """
        order = await self.get(order_id, buyer)
        if order.status is OrderStatus.PENDING_PAYMENT:
            match await self._cashier.settle_before_close(order_id):
                case TradeEnd.PAID:
                    raise NotCancellable("the order is being paid; it cannot be cancelled any more")
                case TradeEnd.UNKNOWN:
                    raise Unavailable("the payment provider did not answer; the order is unchanged, try again")
        return await self._group.submit(
            self.transitions.cancel, CancelRequest(order_id=order_id, buyer=buyer, actor=actor)
        )

    async def expire(self, order_id: int) -> Expiry:
        """Close an order if its deadline has passed and nobody paid; safe to call at any time, any number of times."""
        async with self._database.read() as tx:
            found = await store.deadline(tx, order_id)
        if found is None or found[0] is not OrderStatus.PENDING_PAYMENT:
            return Expiry.DONE
        if found[1] > self._clock.now_us():
            return Expiry.EARLY
        match await self._cashier.settle_before_close(order_id):
            case TradeEnd.UNKNOWN:
                return Expiry.UNKNOWN
            case TradeEnd.PAID:
                return Expiry.DONE  # `payment.succeeded` is on its way and decides
        closed = await self._group.submit(self.transitions.close, order_id)
        return Expiry.DONE if closed else Expiry.UNKNOWN

    async def sweep(self, older_than_ms: int) -> int:
        """Expire the orders that are overdue by so much, all of them, page by page; answers how many there were.

        One that fails or stays unknown holds up no other: it is logged and comes again with the next sweep.
        """
        before_us = self._clock.now_us() - older_than_ms * US_PER_MS
        found, after = 0, (0, 0)
        while True:
            async with self._database.read() as tx:
                page = await store.overdue(tx, before_us, after, SWEEP_PAGE)
            if not page:
                return found
            found, after = found + len(page), page[-1]
            for start in range(0, len(page), EXPIRE_AT_ONCE):
                chunk = [order_id for _, order_id in page[start : start + EXPIRE_AT_ONCE]]
                outcomes = await asyncio.gather(*map(self.expire, chunk), return_exceptions=True)
                for order_id, outcome in zip(chunk, outcomes, strict=True):
                    if isinstance(outcome, Unavailable):
                        raise outcome  # of the database or provider, not of this order: the next sweep tries again
                    if isinstance(outcome, Exception):
                        log.error("expire_failed", order_id=order_id, error=repr(outcome)[:300])

    async def sweep_arriving(self) -> int:
        """Complete shipped orders that no message came for; answers how many there were."""
        found = 0
        while True:
            async with self._database.read() as tx:
                page = await store.arriving(tx, self._clock.now_us(), SWEEP_PAGE)
            if not page:
                return found
            found += len(page)
            await asyncio.gather(*map(self.arrive, page))

    async def fates(self, order_ids: Collection[int]) -> Mapping[int, Fate]:
        """What those orders that exist mean to those who hold something for them."""
        async with self._database.read() as tx:
            states = await store.states(tx, order_ids)
        return {order_id: _FATES[status] for order_id, status in states.items()}

    async def buyers(self, tx: Tx, order_ids: Collection[int]) -> Mapping[int, str]:
        """Whose those orders are that exist, read in the caller's transaction."""
        return await store.buyers(tx, order_ids)
