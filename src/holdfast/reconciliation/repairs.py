"""Repairs: each one is a verb of the service whose books differ, never a change of its tables from here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from holdfast.messaging.error_store import ErrorStore
from holdfast.reconciliation.model import Repair
from holdfast.services.orders.service import OrderService
from holdfast.services.payments.model import RefundStatus
from holdfast.services.payments.refund_service import RefundService
from holdfast.services.payments.service import PaymentService
from holdfast.services.stock.service import StockService


class Repairs:
    """Runs a repair; every one of them is safe to run twice."""

    def __init__(
        self,
        orders: OrderService,
        stock: StockService,
        payments: PaymentService,
        refunds: RefundService,
        errors: ErrorStore,
    ) -> None:
        self._orders = orders
        self._stock = stock
        self._payments = payments
        self._refunds = refunds
        self._errors = errors

    async def run(self, repair: Repair, facts: Mapping[str, Any], actor: str, reason: str) -> None:
        """Mend what the facts of a difference name; raises what the verb raises, and then nothing was changed."""
        match repair:
            case Repair.EXPIRE_ORDER:
                await self._orders.expire(facts["order_id"])
            case Repair.SETTLE_STOCK:
                await self._stock.settle([facts["order_id"]])
            case Repair.RELEASE_STOCK:
                await self._stock.release([facts["order_id"]])
            case Repair.TELL_PAYMENT:
                await self._payments.tell_again(facts["payment_id"])
            case Repair.LEARN_PAYMENT:
                await self._payments.learn(facts["payment_id"])
            case Repair.GIVE_BACK:
                await self._refunds.give_back(facts["payment_id"])
            case Repair.REMIND_REFUND:
                await self._refunds.remind(facts["refund_id"])
            case Repair.ASK_REFUND:
                await self._ask_refund(facts["refund_id"], actor)
            case Repair.REPLAY_MESSAGE:
                await self._errors.replay([facts["row_id"]], actor=actor, reason=reason)

    async def _ask_refund(self, refund_id: int, actor: str) -> None:
        if (await self._refunds.get(refund_id)).status is RefundStatus.REFUSED:
            await self._refunds.retry(refund_id, actor)
        await self._refunds.ask(refund_id, also_done=True)
