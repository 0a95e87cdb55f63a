"""`holdfast refunds`: looking and giving back from a terminal."""

from __future__ import annotations

import pytest

from holdfast.bootstrap import System
from holdfast.settings import Settings
from tests.edge.desk import Desk, misused, ok
from tests.edge.desk import refused as refused_by
from tests.shop import PRICE_MINOR, order, pay, stock_up


@pytest.fixture
def desk(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.setenv("HOLDFAST_PAYMENTS__SANDBOX", "true")
    monkeypatch.setenv("HOLDFAST_PAYMENTS__SANDBOX_SECRET", settings.payments.sandbox_secret.reveal())
    return Desk(settings, monkeypatch)


def test_refunds_from_a_terminal(desk: Desk) -> None:
    async def sell(system: System) -> tuple[str, str]:
        await stock_up(system, "SKU-1", 3)
        view = await order(system, quantity=3)
        await pay(system, view)
        return view.id, view.payment.id

    order_id, payment_id = desk.within(sell)
    first = ("create", "--order", order_id, "--amount", PRICE_MINOR, "--reason", "a scratch", "--key", "case-1")
    booked = ok(desk.run("refunds", *first, "--actor", "chief", "--json")).json
    assert (booked["status"], booked["amountMinor"], booked["actor"]) == ("pending", PRICE_MINOR, "chief")
    assert "as before" in ok(desk.run("refunds", *first)).out
    rest = ok(desk.run("refunds", "create", "--payment", payment_id, "--reason", "the rest", "--key", "case-2")).out
    assert f" of {2 * PRICE_MINOR} CNY" in rest
    listed = ok(desk.run("refunds", "list", "--json")).json
    assert [each["amountMinor"] for each in listed] == [PRICE_MINOR, 2 * PRICE_MINOR]
    assert len(ok(desk.run("refunds", "list", "--payment", payment_id, "--limit", 1)).out.splitlines()) == 2
    assert ok(desk.run("refunds", "list", "--after", booked["id"], "--json")).json == listed[1:]
    shown = ok(desk.run("refunds", "show", booked["id"])).out
    assert "chief pending: a scratch" in shown
    assert len(ok(desk.run("refunds", "show", booked["id"], "--json")).json["steps"]) == 1
    assert "is pending" in ok(desk.run("refunds", "retry", booked["id"])).out
    assert ok(desk.run("refunds", "retry", booked["id"], "--json")).json["id"] == booked["id"]

    refused_by(desk.run("refunds", "create", "--payment", payment_id, "--reason", "more", "--key", "x"), "captured")
    refused_by(desk.run("refunds", "create", "--reason", "of what", "--key", "x"), "paymentId")
    refused_by(desk.run("refunds", "create", "--payment", 5, "--reason", "", "--key", "x"), "reason")
    refused_by(desk.run("refunds", "show", 12345), "no refund 12345")
    refused_by(desk.run("refunds", "retry", 12345))
    misused(desk.run("refunds", "list", "--limit", 201))
    misused(desk.run("refunds", "show", 0))
