"""Payments' counter: notices from outside, closing trades before orders close, refunds asked of the provider."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import msgspec
from sqlalchemy import select

from holdfast import observe
from holdfast.clock import US_PER_MS, Clock
from holdfast.db.database import Database, Tx
from holdfast.db.group_commit import GroupCommit
from holdfast.errors import HoldfastError, Refused, Unavailable
from holdfast.services.contracts.events import PaymentSucceeded
from holdfast.services.contracts.values import TradeEnd
from holdfast.services.payments import store
from holdfast.services.payments.actions import Payments, succeeded
from holdfast.services.payments.model import SUCCEEDED, WAITING, PaymentDetails, PaymentOrder, Verdict
from holdfast.services.payments.needs import Orders, Provider, RefundEnd

SWEEP_PAGE = 500
ASK_AT_ONCE = 32  # questions to providers

log = observe.logger("payments")


class UnknownProvider(Refused):
    """There is no such payment provider."""

    code = "unknown_provider"


class PaymentNotFound(Refused):
    """There is no such payment order of this buyer."""

    code = "payment_not_found"


class PaymentService:
    """One call per notice or question; calls to the provider are made outside of any transaction."""

    def __init__(
        self,
        database: Database,
        group: GroupCommit,
        payments: Payments,
        providers: Mapping[str, Provider],
        orders: Orders,
        clock: Clock,
    ) -> None:
        self._database = database
        self._group = group
        self._payments = payments
        self._providers = providers
        self._orders = orders
        self._clock = clock

    async def notice(self, provider: str, headers: Mapping[str, str], raw: bytes) -> Verdict | None:
        """Take a provider's notice: verify, store, apply once; returning means that it is committed.

        One whose judging fails is stored alone and judged again by `sweep`. None says that it is genuine and tells of
        no captured money. Raises `UnknownProvider` or `ForgedNotice`; nothing is changed then.
        """
        if provider not in self._providers:
            raise UnknownProvider(f"there is no payment provider {provider!r} here")
        capture = self._providers[provider].verify_notice(headers, raw)
        if capture is None:
            return None
        try:
            return await self._group.submit(self._payments.apply, capture)
        except HoldfastError:
            raise  # nothing is known to have happened; the provider sends it again
        except Exception:
            log.exception("notice_not_judged", provider=provider, event_id=capture.event_id)
            return await self._group.submit(self._payments.keep, capture)

    async def of_order(self, order_id: int, buyer: str | None) -> PaymentDetails:
        """The payment order of an order, of this buyer unless that is None; raises `PaymentNotFound`."""
        async with self._database.read() as tx:
            found = await store.details(tx, store.payments.c.order_id == order_id, buyer)
        return self._shown(found)

    async def get(self, payment_id: int, buyer: str) -> PaymentDetails:
        """A buyer's own payment order; raises `PaymentNotFound`, also for another's."""
        async with self._database.read() as tx:
            found = await store.details(tx, store.payments.c.id == payment_id, buyer)
        return self._shown(found)

    async def captured(self, order_id: int) -> bool:
        """Whether money was captured for an order."""
        async with self._database.read() as tx:
            payment = await store.of_order(tx, order_id)
        return payment is not None and payment.status == SUCCEEDED

    def _shown(self, found: PaymentDetails | None) -> PaymentDetails:
        if found is None:
            raise PaymentNotFound()
        provider = self._providers.get(found.order.provider)
        if provider is None or found.order.status != WAITING or found.order.pay_by_us <= self._clock.now_us():
            return found
        return msgspec.structs.replace(found, pay_url=provider.pay_url(found.order))

    async def settle_before_close(self, order_id: int) -> TradeEnd:
        """Make an order's trade unpayable at the provider, or learn that it is paid (then that is applied).

        `UNKNOWN` means that nobody knows yet: the order must stay open and be asked about again.
        """
        async with self._database.read() as tx:
            payment = await store.of_order(tx, order_id)
        if payment is None:
            return TradeEnd.CLOSED
        if payment.status == SUCCEEDED:
            # Its order should know by now. Telling it again does no harm, and mends a message that was lost.
            await self._group.submit(self._payments.tell_again, payment)
            return TradeEnd.PAID
        provider = self._provider_of(payment)
        if provider is None:
            return TradeEnd.UNKNOWN
        answer = await provider.close(payment)
        if answer.capture is not None:
            await self._group.submit(self._payments.apply, answer.capture)
        return TradeEnd.UNKNOWN if answer.end is TradeEnd.OPEN else answer.end

    async def refund(self, refund_id: int) -> bool:
        """Ask the provider for a pending refund and book it; False when it has to be asked again."""
        async with self._database.read() as tx:
            row = (await tx.execute(select(store.refunds).where(store.refunds.c.id == refund_id))).first()
            payment = await store.by_id(tx, row.payment_id) if row else None
        if row is None or payment is None or row.status == "done":
            return True
        provider = self._provider_of(payment)
        if provider is None:
            return False
        answer = await provider.refund(payment, refund_id, row.amount_minor)
        if answer.end is RefundEnd.REFUSED:
            log.error("refund_refused", refund_id=refund_id, payment_id=payment.id, reason=answer.reason)
        if answer.end is not RefundEnd.DONE:
            return False
        await self._group.submit(self._payments.mark_refunded, refund_id)
        return True

    async def sweep(self, older_than_ms: int) -> int:
        """Tell again of captured money that nobody took charge of, judge notices again, and wake up refunds that wait.

        Answers how many of these there were.
        """
        before_us = self._clock.now_us() - older_than_ms * US_PER_MS
        async with self._database.read() as tx:
            waiting = await store.pending_refunds(tx, before_us, SWEEP_PAGE)
        for refund_id in waiting:
            await self._group.submit(self._payments.remind_refunds, refund_id)
        return len(waiting) + await self._tell_unaccepted(before_us) + await self._judge_again()

    async def poll(self, older_than_ms: int) -> int:
        """Ask the providers about each unpaid payment order of that age, and pay the orders of all captured money.

        It needs neither a notice nor a message to have arrived. An unknown answer is asked for again by the next call.
        Answers how many orders it found paid.
        """
        before_us = self._clock.now_us() - older_than_ms * US_PER_MS
        after = 0
        while True:
            async with self._database.read() as tx:
                page = await store.unpaid(tx, before_us, after, SWEEP_PAGE)
            if not page:
                return await self._pay_unaccepted()
            after = page[-1].id
            for start in range(0, len(page), ASK_AT_ONCE):
                await self._ask_all(page[start : start + ASK_AT_ONCE])

    async def _ask_all(self, payments: Sequence[PaymentOrder]) -> None:
        outcomes = await asyncio.gather(*map(self._ask, payments), return_exceptions=True)
        for payment, outcome in zip(payments, outcomes, strict=True):
            if isinstance(outcome, Unavailable):
                raise outcome  # of the database, not of this payment: the next poll tries again
            if isinstance(outcome, Exception):
                log.error("query_failed", payment_id=payment.id, error=repr(outcome)[:300])

    async def _ask(self, payment: PaymentOrder) -> None:
        provider = self._provider_of(payment)
        answer = None if provider is None else await provider.query(payment)
        if answer is not None and answer.capture is not None:
            await self._group.submit(self._payments.apply, answer.capture)

    async def _pay_unaccepted(self) -> int:
        found = after = 0
        while True:
            async with self._database.read() as tx:
                page = await store.unaccepted(tx, self._clock.now_us() + 1, after, SWEEP_PAGE)
            if not page:
                return found
            found, after = found + len(page), page[-1].id
            _log_failures(await self._group.submit_all(self._pay_orders, [succeeded(payment) for payment in page]))

    async def _pay_orders(self, tx: Tx, events: Sequence[PaymentSucceeded]) -> list[HoldfastError | None]:
        await self._orders.pay(tx, events)
        return [None for _ in events]

    async def _judge_again(self) -> int:
        found, after = 0, ("", "")
        while True:
            async with self._database.read() as tx:
                page = await store.undecided(tx, after, SWEEP_PAGE)
            if not page:
                return found
            found, after = found + len(page), (page[-1].provider, page[-1].event_id)
            _log_failures(await self._group.submit_all(self._payments.apply, page))

    async def _tell_unaccepted(self, before_us: int) -> int:
        found = after = 0
        while True:
            async with self._database.read() as tx:
                page = await store.unaccepted(tx, before_us, after, SWEEP_PAGE)
            if not page:
                return found
            found, after = found + len(page), page[-1].id
            await asyncio.gather(*(self._group.submit(self._payments.tell_again, payment) for payment in page))

    def _provider_of(self, payment: PaymentOrder) -> Provider | None:
        """The provider that took a payment order on; None, with an alarm, when it is not configured any more."""
        provider = self._providers.get(payment.provider)
        if provider is None:
            log.error("provider_missing", provider=payment.provider, payment_id=payment.id)
        return provider


def _log_failures(outcomes: Sequence[object]) -> None:
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            log.error("sweep_failed", error=repr(outcome)[:300])
