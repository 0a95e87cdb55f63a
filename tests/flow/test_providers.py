"""Several payment providers at once: each payment order stays with the one that opened it."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

import msgspec
import pytest

from holdfast import bootstrap
from holdfast.bootstrap import System, migrate_all, running
from holdfast.clock import Clock
from holdfast.db.database import Database
from holdfast.db.group_commit import GroupCommit
from holdfast.edge.http.app import build_app
from holdfast.errors import InvalidSettings
from holdfast.services.contracts.values import TradeEnd
from holdfast.services.orders.model import OrderStatus, OrderView
from holdfast.services.payments.model import PaymentOrder, Verdict
from holdfast.services.payments.needs import Provider, RefundAnswer, TradeAnswer
from holdfast.services.payments.sandbox import SIGNATURE_HEADER, Notice, Sandbox
from holdfast.services.payments.sandbox_book import SandboxBook
from holdfast.settings import Settings
from tests.conftest import StartSystem
from tests.edge.counter import routes_of
from tests.shop import becomes, change, deliver, order, pay_at_sandbox, rows, status, stock_up

SECRET = "secret-of-the-other-provider"


class Other(Sandbox):
    """A second provider, which notes what it is asked."""

    name = "other"
    notice_answer = b"OK"

    def __init__(self, book: SandboxBook, clock: Clock) -> None:
        super().__init__(book, clock, SECRET, "other-merchant", 300_000)
        self.asked: list[tuple[str, int]] = []

    async def query(self, payment: PaymentOrder) -> TradeAnswer:
        self.asked.append(("query", payment.id))
        return await super().query(payment)

    async def close(self, payment: PaymentOrder) -> TradeAnswer:
        self.asked.append(("close", payment.id))
        return await super().close(payment)

    async def refund(self, payment: PaymentOrder, refund_id: int, amount_minor: int) -> RefundAnswer:
        self.asked.append(("refund", payment.id))
        return await super().refund(payment, refund_id, amount_minor)


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every system have two providers."""
    built = bootstrap._providers

    def two(settings: Settings, database: Database, group: GroupCommit, clock: Clock, stack: AsyncExitStack) -> Any:
        found: dict[str, Provider] = {"other": Other(SandboxBook(database, group, clock), clock)}
        chosen = settings.payments.provider
        sandbox = msgspec.structs.replace(settings.payments, provider="sandbox")
        found |= built(msgspec.structs.replace(settings, payments=sandbox), database, group, clock, stack)
        assert chosen in found
        return found

    monkeypatch.setattr(bootstrap, "_providers", two)


def choosing(settings: Settings, provider: str) -> Settings:
    return msgspec.structs.replace(settings, payments=msgspec.structs.replace(settings.payments, provider=provider))


def other_of(system: System) -> Other:
    other = system.providers["other"]
    assert isinstance(other, Other)
    return other


async def begun_at_sandbox(system: System, view: OrderView) -> None:
    """As if the shop had taken this payment on while the sandbox was chosen."""
    await change(system, "UPDATE payment_order SET provider = 'sandbox' WHERE id = :id", id=int(view.payment.id))


@pytest.mark.usefixtures("both")
async def test_new_payments_go_to_the_chosen_provider_and_old_ones_stay(
    start_system: StartSystem, settings: Settings
) -> None:
    system = await start_system(choosing(settings, "other"), work=False)
    await stock_up(system, "SKU-1", 2)
    new, old = await order(system, "ann"), await order(system, "bob")
    await begun_at_sandbox(system, old)
    assert new.payment.provider == "other"

    await system.payments.poll(-1)
    assert await system.payments.settle_before_close(int(old.id)) is TradeEnd.CLOSED
    assert await system.payments.settle_before_close(int(new.id)) is TradeEnd.CLOSED

    assert other_of(system).asked == [(verb, int(new.payment.id)) for verb in ("query", "close")]


@pytest.mark.usefixtures("both")
async def test_a_notice_counts_only_from_the_provider_of_its_payment(
    start_system: StartSystem, settings: Settings
) -> None:
    system = await start_system(choosing(settings, "other"))
    await stock_up(system, "SKU-1", 1)
    view = await order(system)
    other = other_of(system)
    notice = await other.pay((view.payment.pay_url or "").rsplit("/", 1)[1])
    assert (
        await deliver(system, system.sandbox.sign(msgspec.json.decode(notice.body, type=Notice))) is Verdict.WRONG_FACTS
    )
    assert await status(system, view) is OrderStatus.PENDING_PAYMENT

    told = await system.payments.notice("other", {SIGNATURE_HEADER: notice.signature}, notice.body.encode())

    assert told is Verdict.APPLIED
    await becomes(system, view, OrderStatus.PAID)
    kept = await rows(system, "SELECT provider, verdict FROM payment_notice ORDER BY provider")
    assert [(row["provider"], row["verdict"]) for row in kept] == [("other", "applied"), ("sandbox", "wrong_facts")]


@pytest.mark.usefixtures("both")
async def test_every_configured_provider_has_a_route_for_its_notices(start_system: StartSystem) -> None:
    system = await start_system(work=False)
    paths = {path for method, path in routes_of(build_app(system)) if method == "POST" and "notices" in path}
    assert paths == {"/v1/notices/other", "/v1/notices/sandbox"}


async def test_a_payment_whose_provider_is_gone_is_unknown_and_its_order_stays_open(start_system: StartSystem) -> None:
    system = await start_system(work=False)
    await stock_up(system, "SKU-1", 1)
    view = await order(system)
    await pay_at_sandbox(system, view)
    await change(system, "UPDATE payment_order SET provider = 'gone' WHERE id = :id", id=int(view.payment.id))

    assert await system.payments.settle_before_close(int(view.id)) is TradeEnd.UNKNOWN
    assert await system.payments.poll(-1) == 0
    assert await status(system, view) is OrderStatus.PENDING_PAYMENT

    await begun_at_sandbox(system, view)
    assert await system.payments.poll(-1) == 1
    assert await status(system, view) is OrderStatus.PAID


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"provider": "alibaba"}, "'alibaba' is not configured; configured: sandbox"),
        ({"sandbox": False}, "no payment provider is configured"),
        ({"sandbox_url": "not an address"}, "HOLDFAST_PAYMENTS__SANDBOX_URL"),
        ({"sandbox_url": "ftp://there"}, "HOLDFAST_PAYMENTS__SANDBOX_URL"),
        ({"sandbox_url": "http://[::1"}, "HOLDFAST_PAYMENTS__SANDBOX_URL"),
    ],
)
async def test_what_cannot_work_is_refused_at_the_start(settings: Settings, changed: dict[str, Any], says: str) -> None:
    await migrate_all(settings)
    payments = msgspec.structs.replace(settings.payments, **changed)
    with pytest.raises(InvalidSettings) as refused:
        async with running(msgspec.structs.replace(settings, payments=payments)):
            pass
    assert says in refused.value.detail
