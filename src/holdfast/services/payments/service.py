"""Payments' counter: notices from outside, closing trades before orders close."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from holdfast import observe
from holdfast.clock import US_PER_MS, Clock
from holdfast.db.database import Database
from holdfast.db.group_commit import GroupCommit
from holdfast.errors import Refused
from holdfast.services.contracts.values import TradeEnd
from holdfast.services.payments import store
from holdfast.services.payments.actions import Payments
from holdfast.services.payments.model import SUCCEEDED, PaymentNotFound, PaymentOrder, Verdict
from holdfast.services.payments.needs import Provider

SWEEP_PAGE = 500

log = observe.logger("payments")


class UnknownProvider(Refused):
    """There is no such payment provider."""

    code = "unknown_provider"


class PaymentService:
    """One call per notice or question; calls to the provider are made outside of any transaction."""

    def __init__(
        self,
        database: Database,
        group: GroupCommit,
        payments: Payments,
        providers: Mapping[str, Provider],
        clock: Clock,
    ) -> None:
        self._database = database
        self._group = group
        self._payments = payments
        self._providers = providers
        self._clock = clock

    async def notice(self, provider: str, headers: Mapping[str, str], raw: bytes) -> Verdict | None:
        """Take a provider's notice: verify, store, apply once; returning means that it is committed.

        None says that it is genuine and tells of no captured money. Raises `UnknownProvider` or `ForgedNotice`;
        nothing is changed then.
        """
        if provider not in self._providers:
            raise UnknownProvider(f"there is no payment provider {provider!r} here")
        capture = self._providers[provider].verify_notice(headers, raw)
        return None if capture is None else await self._group.submit(self._payments.apply, capture)

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

    async def tell_again(self, payment_id: int) -> None:
        """Tell orders once more of a payment that succeeded; does nothing for any other."""
        payment = await self._known(payment_id)
        if payment.status == SUCCEEDED:
            await self._group.submit(self._payments.tell_again, payment)

    async def learn(self, payment_id: int) -> TradeEnd:
        """Ask the provider what became of a trade and apply its capture, if there is one; changes nothing else.

        Raises `PaymentNotFound`.
        """
        payment = await self._known(payment_id)
        provider = self._provider_of(payment)
        if provider is None:
            return TradeEnd.UNKNOWN
        answer = await provider.query(payment)
        if answer.capture is not None:
            await self._group.submit(self._payments.apply, answer.capture)
        return answer.end

    async def _known(self, payment_id: int) -> PaymentOrder:
        async with self._database.read() as tx:
            payment = await store.by_id(tx, payment_id)
        if payment is None:
            raise PaymentNotFound(f"there is no payment {payment_id}")
        return payment

    async def sweep(self, older_than_ms: int) -> int:
        """Tell again of captured money that nobody took charge of; answers of how many payments."""
        return await self._tell_unaccepted(self._clock.now_us() - older_than_ms * US_PER_MS)

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
