"""Refunds' counter: what staff may ask, the provider asked outside of any transaction, and the guard behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from holdfast import observe
from holdfast.clock import US_PER_MS, Clock
from holdfast.db.database import Database
from holdfast.db.group_commit import GroupCommit
from holdfast.errors import InvalidInput
from holdfast.services.payments import refund_store, store
from holdfast.services.payments.model import (
    Refund,
    RefundNotFound,
    RefundView,
    RefundWish,
    check_wish,
    refund_view,
)
from holdfast.services.payments.needs import Provider, RefundEnd
from holdfast.services.payments.refund_store import DONE, PENDING
from holdfast.services.payments.refunds import Again, Booked, Refunds, Refusal

LIST_MAX = 200
SWEEP_PAGE = 500

log = observe.logger("refunds")


class RefundDesk:
    """Questions about refunds; reads only, so it also serves beside a running server."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, refund_id: int) -> RefundView:
        """One refund; raises `RefundNotFound`."""
        return refund_view(await self._known(refund_id))

    async def list(self, *, after: int = 0, limit: int = 50, payment_id: int | None = None) -> Sequence[RefundView]:
        """Refunds in order of their ids from the one behind `after`, of one payment or of all."""
        if not 1 <= limit <= LIST_MAX:
            raise InvalidInput(f"limit must be in 1..{LIST_MAX}, not {limit}; page on with after=<the last id>")
        async with self._database.read() as tx:
            return [refund_view(refund) for refund in await refund_store.page(tx, after, limit, payment_id)]

    async def steps(self, refund_id: int) -> Sequence[Mapping[str, Any]]:
        """What happened to a refund: from, to, who, why, when; in order."""
        async with self._database.read() as tx:
            return await refund_store.steps(tx, refund_id)

    async def _known(self, refund_id: int) -> Refund:
        async with self._database.read() as tx:
            found = await refund_store.by_ids(tx, [refund_id])
        if refund_id not in found:
            raise RefundNotFound(f"there is no refund {refund_id}")
        return found[refund_id]


class RefundService(RefundDesk):
    """One call per wish or question; calls to the provider are made outside of any transaction."""

    def __init__(
        self,
        database: Database,
        group: GroupCommit,
        refunds: Refunds,
        providers: Mapping[str, Provider],
        clock: Clock,
    ) -> None:
        super().__init__(database)
        self._group = group
        self._refunds = refunds
        self._providers = providers
        self._clock = clock

    async def request(self, wish: RefundWish) -> Booked:
        """Put a refund on the books and reserve its amount; returning means that it is committed.

        The provider is asked by a message. Raises `InvalidInput`, `PaymentNotFound`, `NothingToRefund`,
        `RefundTooLarge`, or `KeyReused` for a key that stands for another wish.
        """
        check_wish(wish)
        return await self._group.submit(self._refunds.request, wish)

    async def retry(self, refund_id: int, actor: str) -> RefundView:
        """Have the provider asked once more; raises `RefundNotFound`, `RefundDone` or `RefundTooLarge`."""
        await self._group.submit(self._refunds.retry, Again(refund_id=refund_id, actor=actor))
        return await self.get(refund_id)

    async def give_back(self, payment_id: int) -> None:
        """Give back all that is kept of a payment whose order ended; once, however often it is called."""
        await self._group.submit(self._refunds.give_back, payment_id)

    async def ask(self, refund_id: int, *, also_done: bool = False) -> RefundEnd:
        """Ask the provider for a refund and book its answer; safe at any time, any number of times.

        With `also_done` the provider is asked for one that is done in our books too, in case it lost its own entry.
        """
        async with self._database.read() as tx:
            refund = (await refund_store.by_ids(tx, [refund_id])).get(refund_id)
            payment = await store.by_id(tx, refund.payment_id) if refund else None
        if refund is None or payment is None:
            return RefundEnd.DONE
        if refund.status != PENDING and not (also_done and refund.status == DONE):
            return RefundEnd.DONE if refund.status == DONE else RefundEnd.REFUSED
        provider = self._providers.get(payment.provider)
        if provider is None:
            log.error("provider_missing", provider=payment.provider, refund_id=refund_id)
            await self._group.submit(self._refunds.postpone, refund_id)
            return RefundEnd.UNKNOWN
        answer = await provider.refund(payment, refund_id, refund.amount_minor)
        if refund.status == DONE:
            return answer.end
        match answer.end:
            case RefundEnd.DONE:
                await self._group.submit(self._refunds.finish, refund_id)
            case RefundEnd.REFUSED:
                await self._group.submit(self._refunds.refuse, Refusal(refund_id=refund_id, reason=answer.reason))
            case RefundEnd.UNKNOWN:
                await self._group.submit(self._refunds.postpone, refund_id)
        return answer.end

    async def remind(self, refund_id: int) -> None:
        """Have a pending refund asked about at once."""
        await self._group.submit(self._refunds.remind, refund_id)

    async def sweep(self, older_than_ms: int) -> int:
        """Wake up refunds whose message did not come; answers how many."""
        before_us = self._clock.now_us() - older_than_ms * US_PER_MS
        async with self._database.read() as tx:
            waiting = await refund_store.waiting(tx, before_us, SWEEP_PAGE)
        for refund_id in waiting:
            await self.remind(refund_id)
        return len(waiting)
