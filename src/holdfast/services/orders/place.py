"""The verb *place*: a batch of wishes becomes orders, with stock held, payments opened and messages written."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from holdfast import observe
from holdfast.clock import US_PER_MS, Clock
from holdfast.db.database import Tx
from holdfast.errors import HoldfastError, InvalidInput
from holdfast.ids import IdSource
from holdfast.messaging.draft import Draft
from holdfast.messaging.outbox import Outbox
from holdfast.services.contracts import topology
from holdfast.services.contracts.events import CartOrdered, OrderCreated, OrderDue, OrderPaid
from holdfast.services.contracts.refusals import KeyReused
from holdfast.services.contracts.values import Bill, PaymentRef, Wanted
from holdfast.services.orders import store
from holdfast.services.orders.model import (
    CartEmpty,
    LimitReached,
    OrderLine,
    OrderStatus,
    Placed,
    PlaceRequest,
    PricedLine,
    SoldOut,
    check_lines,
    price_lines,
    unpriced,
    view,
)
from holdfast.services.orders.needs import Carts, Catalogue, Payments, Stock
from holdfast.settings import OrdersSettings

Answer = Placed | HoldfastError
NOTHING_TO_PAY = PaymentRef(id="0", provider="none")
NOBODY_PAYS = "nothing to pay"  # the actor that pays an order of amount 0


class _Draft(msgspec.Struct, kw_only=True):
    """An order in the making."""

    order_id: int
    request: PlaceRequest
    lines: tuple[PricedLine, ...]
    amount_minor: int
    currency: str
    time_out_ms: int
    capped: dict[str, int]  # SKU -> units of one buyer at most

    @property
    def is_free(self) -> bool:
        """Nothing is to be paid: it is placed and paid in one."""
        return self.amount_minor == 0


class PlaceOrders:
    """Places orders; one instance is shared by all callers, since group commit tells verbs apart by their identity."""

    def __init__(
        self,
        clock: Clock,
        ids: IdSource,
        outbox: Outbox,
        settings: OrdersSettings,
        *,
        catalogue: Catalogue,
        stock: Stock,
        payments: Payments,
        carts: Carts,
    ) -> None:
        self._clock = clock
        self._ids = ids
        self._outbox = outbox
        self._settings = settings
        self._catalogue = catalogue
        self._stock = stock
        self._payments = payments
        self._carts = carts

    async def __call__(self, tx: Tx, requests: Sequence[PlaceRequest]) -> list[Answer]:
        """Decide wishes in order of arrival; a refused one changes nothing and leaves its idempotency key unused.

        A key that was used before, earlier or in this very batch, gives the stored answer again if the lines are the
        same, `KeyReused` if not. Two processes that place the same new key at once meet at its unique row: the later
        one loses with `Conflict`, which group commit decides again and then finds the stored answer.
        """
        answers = _replays(await store.stored_replies(tx, requests), requests)
        while len(answers) < len(requests):
            first: dict[tuple[str, str], int] = {}
            for index, request in enumerate(requests):
                if index not in answers:
                    first.setdefault((request.buyer, request.idempotency_key), index)
            fresh = sorted(first.values())
            placed = await self._place_fresh(tx, [requests[index] for index in fresh])
            answers.update(zip(fresh, placed, strict=True))
            for index, request in enumerate(requests):
                if index not in answers:
                    original = first[request.buyer, request.idempotency_key]
                    answer = _repeated(requests[original], answers[original], request)
                    if answer is not None:
                        answers[index] = answer
        return [answers[index] for index in range(len(requests))]

    async def _place_fresh(self, tx: Tx, requests: Sequence[PlaceRequest]) -> list[Answer]:
        drafts = await self._within_limits(tx, await self._price(tx, await self._filled(tx, requests)))
        wanted = [draft for draft in drafts if isinstance(draft, _Draft)]
        orders = [Wanted(order_id=draft.order_id, lines=unpriced(draft.lines)) for draft in wanted]
        for order, cause in zip(orders, wanted, strict=True):
            tx.caused(order, tx.trace_of(cause.request))
        shortages = iter(await self._stock.reserve(tx, orders) if orders else ())
        held: list[_Draft] = []
        answers: list[Answer | None] = []
        for draft in drafts:
            if not isinstance(draft, _Draft):
                answers.append(draft)
            elif (short := next(shortages)) is not None:
                answers.append(SoldOut(f"of SKU {short.sku!r} {short.available} are left, {short.wanted} were wanted"))
            else:
                held.append(draft)
                answers.append(None)
        placed = iter(await self._write(tx, held) if held else ())
        decided = [next(placed) if answer is None else answer for answer in answers]
        return await self._placed_meanwhile(tx, requests, decided)

    async def _placed_meanwhile(self, tx: Tx, requests: Sequence[PlaceRequest], decided: list[Answer]) -> list[Answer]:
        """A wish that is sold out here may be one that another process placed while we waited for the stock."""
        refused = [index for index, answer in enumerate(decided) if isinstance(answer, SoldOut)]
        if refused:
            again = [requests[index] for index in refused]
            for at, answer in _replays(await store.stored_replies(tx, again), again).items():
                decided[refused[at]] = answer
        return decided

    async def _filled(self, tx: Tx, requests: Sequence[PlaceRequest]) -> list[tuple[PlaceRequest, Sequence[OrderLine]]]:
        """Each wish with its lines: those it came with, or what is in the buyer's cart now."""
        buyers = {request.buyer for request in requests if request.from_cart}
        carts = await self._carts.contents(tx, buyers) if buyers else {}
        return [
            (
                request,
                [OrderLine(sku=line.sku, quantity=line.quantity) for line in carts.get(request.buyer, ())]
                if request.from_cart
                else request.lines,
            )
            for request in requests
        ]

    async def _within_limits(
        self, tx: Tx, drafts: Sequence[_Draft | HoldfastError]
    ) -> Sequence[_Draft | HoldfastError]:
        """Refuse who would have more of a SKU than one buyer may; those of one batch count in order of arrival.

        What a buyer has is counted with the SKU's levels locked, so no other process can place for him meanwhile.
        """
        capped = [draft for draft in drafts if isinstance(draft, _Draft) and draft.capped]
        if not capped:
            return drafts
        skus = {sku for draft in capped for sku in draft.capped}
        await self._stock.lock(tx, {line.sku for draft in drafts if isinstance(draft, _Draft) for line in draft.lines})
        has = dict(await store.bought(tx, {draft.request.buyer for draft in capped}, skus))
        return [_refused(draft, has) or draft if isinstance(draft, _Draft) else draft for draft in drafts]

    async def _price(
        self, tx: Tx, wishes: Sequence[tuple[PlaceRequest, Sequence[OrderLine]]]
    ) -> list[_Draft | HoldfastError]:
        skus = {line.sku for _, lines in wishes for line in lines}
        prices = await self._catalogue.prices(tx, skus) if skus else {}
        drafts: list[_Draft | HoldfastError] = []
        for request, wished in wishes:
            if request.from_cart and not wished:
                drafts.append(CartEmpty())
                continue
            try:
                check_lines(wished, self._settings.lines_max, self._settings.quantity_max)
            except InvalidInput as error:
                drafts.append(error)
                continue
            priced = price_lines(wished, prices)
            if isinstance(priced, HoldfastError):
                drafts.append(priced)
                continue
            lines, amount_minor, currency = priced
            offers = {line.sku: prices[line.sku] for line in lines}
            times = [offer.time_out_ms for offer in offers.values() if offer.time_out_ms is not None]
            drafts.append(
                _Draft(
                    order_id=self._ids.next(),
                    request=request,
                    lines=lines,
                    amount_minor=amount_minor,
                    currency=currency,
                    time_out_ms=min(times, default=self._settings.time_out_ms),
                    capped={sku: offer.buyer_max for sku, offer in offers.items() if offer.buyer_max is not None},
                )
            )
        return drafts

    async def _write(self, tx: Tx, drafts: Sequence[_Draft]) -> list[Placed]:
        now_us = self._clock.now_us()
        due = {draft.order_id: now_us + draft.time_out_ms * US_PER_MS for draft in drafts}
        bills = [
            Bill(
                order_id=draft.order_id,
                buyer=draft.request.buyer,
                amount_minor=draft.amount_minor,
                currency=draft.currency,
                pay_by_us=due[draft.order_id],
            )
            for draft in drafts
            if not draft.is_free
        ]
        opened = iter(await self._payments.open(tx, bills) if bills else ())
        payments = [NOTHING_TO_PAY if draft.is_free else next(opened) for draft in drafts]
        await self._write_rows(tx, drafts, payments, now_us, due)
        placed = [
            _placed(draft, payment, now_us, due[draft.order_id])
            for draft, payment in zip(drafts, payments, strict=True)
        ]
        replies = [
            {
                "key": draft.request.idempotency_key,
                "buyer": draft.request.buyer,
                "fingerprint": draft.request.fingerprint,
                "order_id": draft.order_id,
                "body": answer.body,
                "created_us": now_us,
            }
            for draft, answer in zip(drafts, placed, strict=True)
        ]
        await store.insert_replies.many(tx, replies)
        await self._outbox.add_all(
            tx,
            [
                message
                for draft in drafts
                for message in _messages(draft, due[draft.order_id], tx.trace_of(draft.request))
            ],
        )
        tx.on_commit(lambda: observe.orders_moved.labels(OrderStatus.PENDING_PAYMENT.value).inc(len(drafts)))
        return placed

    async def _write_rows(
        self, tx: Tx, drafts: Sequence[_Draft], payments: Sequence[PaymentRef], now_us: int, due: Mapping[int, int]
    ) -> None:
        orders = [
            {
                "id": draft.order_id,
                "buyer": draft.request.buyer,
                "status": _first_state(draft).value,
                "amount_minor": draft.amount_minor,
                "currency": draft.currency,
                "payment": msgspec.json.encode(payment).decode(),
                "pay_by_us": due[draft.order_id],
                "refunded_minor": 0,
                "tracking": None,
                "complete_by_us": None,
                "created_us": now_us,
                "changed_us": now_us,
            }
            for draft, payment in zip(drafts, payments, strict=True)
        ]
        lines = [
            {
                "order_id": draft.order_id,
                "line_no": number,
                "sku": line.sku,
                "quantity": line.quantity,
                "price_minor": line.price_minor,
            }
            for draft in drafts
            for number, line in enumerate(draft.lines, start=1)
        ]
        steps = [(draft, None, OrderStatus.PENDING_PAYMENT, draft.request.buyer) for draft in drafts] + [
            (draft, OrderStatus.PENDING_PAYMENT.value, OrderStatus.PAID, NOBODY_PAYS)
            for draft in drafts
            if draft.is_free
        ]
        entries = [
            {
                "id": self._ids.next(),
                "order_id": draft.order_id,
                "from_status": came,
                "to_status": to.value,
                "actor": actor,
                "note": "",
                "at_us": now_us,
            }
            for draft, came, to, actor in steps
        ]
        await store.insert_orders.many(tx, orders)
        await store.insert_lines.many(tx, lines)
        await store.insert_entries.many(tx, entries)


def deadline_key(order_id: int) -> str:
    """The cancel key of an order's time-out message."""
    return f"order.due:{order_id}"


def _replays(stored: Mapping[tuple[str, str], Any], requests: Sequence[PlaceRequest]) -> dict[int, Answer]:
    """The answers to requests whose key has a stored one, by index."""
    answers = {}
    for index, request in enumerate(requests):
        row = stored.get((request.buyer, request.idempotency_key))
        if row is not None:
            answers[index] = _replay(row.fingerprint, row.order_id, row.body, request)
    return answers


def _replay(fingerprint: bytes, order_id: int, body: bytes, request: PlaceRequest) -> Answer:
    if fingerprint != request.fingerprint:
        return KeyReused()
    return Placed(order_id=order_id, body=body, replayed=True)


def _repeated(first: PlaceRequest, answer: Answer, request: PlaceRequest) -> Answer | None:
    """The answer to a request whose key came earlier in the batch; None when that one left the key unused."""
    if isinstance(answer, Placed):
        return _replay(first.fingerprint, answer.order_id, answer.body, request)
    return copy.copy(answer) if first.fingerprint == request.fingerprint else None


def _placed(draft: _Draft, payment: PaymentRef, created_us: int, pay_by_us: int) -> Placed:
    seen = view(
        draft.order_id,
        _first_state(draft),
        draft.lines,
        draft.amount_minor,
        draft.currency,
        created_us,
        pay_by_us,
        payment,
    )
    return Placed(order_id=draft.order_id, body=msgspec.json.encode(seen), replayed=False)


def _messages(draft: _Draft, pay_by_us: int, trace: Mapping[str, str]) -> list[Draft]:
    order_id, buyer = draft.order_id, draft.request.buyer
    created = OrderCreated(
        order_id=order_id,
        buyer=buyer,
        amount_minor=draft.amount_minor,
        currency=draft.currency,
        lines=unpriced(draft.lines),
        pay_by_us=pay_by_us,
    )
    told = [
        Draft(
            exchange=topology.ORDER_EVENTS,
            routing_key=topology.KEY_ORDER_CREATE,
            body=created,
            mandatory=False,  # a fact for whoever listens; nobody has to
            trace=trace,
        ),
        Draft(
            exchange=topology.ORDER_EVENTS,
            routing_key=topology.KEY_ORDER_PAID,
            body=OrderPaid(order_id=order_id, payment_id=0),
            trace=trace,
        )
        if draft.is_free
        else Draft(
            exchange=topology.ORDER_EVENTS,
            routing_key=topology.KEY_ORDER_DUE,
            body=OrderDue(order_id=order_id),
            due_us=pay_by_us,
            cancel_key=deadline_key(order_id),
            trace=trace,
        ),
    ]
    if draft.request.from_cart:
        told.append(
            Draft(
                exchange=topology.TRADE,
                routing_key=topology.KEY_CART_ORDERED,
                body=CartOrdered(order_id=order_id, skus=tuple(line.sku for line in draft.lines)),
                headers={topology.USER_HEADER: buyer},
                trace=trace,
            )
        )
    return told


def _first_state(draft: _Draft) -> OrderStatus:
    return OrderStatus.PAID if draft.is_free else OrderStatus.PENDING_PAYMENT


def _refused(draft: _Draft, has: dict[tuple[str, str], int]) -> LimitReached | None:
    """Why a buyer may not have what he wants; if he may, he has it from now on."""
    wanted = {line.sku: line.quantity for line in draft.lines if line.sku in draft.capped}
    for sku, quantity in wanted.items():
        owned = has.get((draft.request.buyer, sku), 0)
        if owned + quantity > draft.capped[sku]:
            return LimitReached(
                f"a buyer may have {draft.capped[sku]} of {sku!r}; you have {owned} and asked for {quantity} more"
            )
    for sku, quantity in wanted.items():
        has[draft.request.buyer, sku] = has.get((draft.request.buyer, sku), 0) + quantity
    return None
