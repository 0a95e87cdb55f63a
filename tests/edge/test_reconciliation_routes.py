"""Reconciliation over HTTP and from a terminal."""

from __future__ import annotations

from typing import Any

import pytest

from holdfast.bootstrap import System
from holdfast.edge.http.reconciliations import RECONCILIATIONS
from holdfast.settings import Settings
from tests.edge.counter import Counter, refused
from tests.edge.desk import Desk, misused, ok
from tests.edge.desk import refused as refused_by
from tests.shop import change, lose, order, pay, rows, stock_up

MORE = "UPDATE stock_level SET available = available + 1, total = total + 1 WHERE sku = 'SKU-1'"


async def stranded(system: System, quantity: int = 1) -> str:
    """An order that is cancelled and still held, long ago."""
    view = await order(system, quantity=quantity)
    await system.orders.cancel(int(view.id), "ann")
    await lose(system, "order.closed")
    await change(system, "UPDATE order_order SET changed_us = 1")
    return view.id


async def test_staff_sees_repairs_and_dismisses_differences(idle: Counter) -> None:
    order_id = await stranded(idle.system)
    await change(idle.system, MORE)
    await idle.system.reconciliation.run("tests", "a look")
    who = idle.bearer("boss", RECONCILIATIONS)
    items = (await idle.ask("GET", "/v1/reconciliations", who)).json()["items"]
    assert {each["kind"]: each["repair"] for each in items} == {
        "stock.stranded": "settle_stock",
        "stock.ledger_sums": None,
    }
    by_kind: dict[str, Any] = {each["kind"]: each for each in items}
    held, counter = by_kind["stock.stranded"], by_kind["stock.ledger_sums"]
    assert held["detail"]["order_id"] == order_id
    assert (held["state"], held["safe"], bool(counter["advice"])) == ("open", True, True)
    only = await idle.ask("GET", "/v1/reconciliations?kind=stock.stranded&limit=1", who)
    assert (len(only.json()["items"]), only.json()["next"]) == (1, held["id"])

    async with idle.unchanged():
        path = f"/v1/reconciliations/{held['id']}/repair"
        told = await idle.ask("POST", path, who, body={"reason": "looking", "dryRun": True})
        assert told.json() == {
            "id": held["id"],
            "dryRun": True,
            "repair": "settle_stock",
            "what": held["advice"],
            "state": "open",
        }
        refused(
            await idle.ask("POST", f"/v1/reconciliations/{counter['id']}/repair", who, body={"reason": "x"}),
            409,
            "no_safe_repair",
        )
        for body in ({}, {"reason": ""}, {"reason": 5}, {"reason": "x", "dryRun": 1}, {"reason": "x", "state": "open"}):
            refused(await idle.ask("POST", path, who, body=body), 400, "invalid_input")
        for odd in ("77", "x", "0", str(2**63)):
            for deed in ("repair", "dismiss"):
                told = await idle.ask("POST", f"/v1/reconciliations/{odd}/{deed}", who, body={"reason": "x"})
                refused(told, 404, "difference_not_found")
        for query in ("state=lost", "limit=0", "limit=x", "after=-1"):
            refused(await idle.ask("GET", f"/v1/reconciliations?{query}", who), 400, "invalid_input")
        refused(await idle.ask("GET", "/v1/reconciliations", idle.bearer("boss", "stock:write")), 403, "forbidden")

    mended = await idle.ask("POST", path, who, body={"reason": "case 17"})
    assert (mended.status_code, mended.json()["state"]) == (200, "repaired")
    refused(await idle.ask("POST", path, who, body={"reason": "again"}), 409, "difference_not_open")
    left = await idle.ask("POST", f"/v1/reconciliations/{counter['id']}/dismiss", who, body={"reason": "known"})
    assert (left.status_code, left.json()["state"]) == (200, "dismissed")
    gone = await idle.ask("GET", "/v1/reconciliations?state=dismissed", who)
    assert [each["id"] for each in gone.json()["items"]] == [counter["id"]]
    log = await rows(idle.system, "SELECT action, actor, reason FROM reconciliation_log ORDER BY id")
    assert [tuple(each.values()) for each in log] == [
        ("run", "tests", "a look"),
        ("repair", "boss", "case 17"),
        ("dismiss", "boss", "known"),
    ]


@pytest.fixture
def desk(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.setenv("HOLDFAST_PAYMENTS__SANDBOX", "true")
    monkeypatch.setenv("HOLDFAST_PAYMENTS__SANDBOX_SECRET", settings.payments.sandbox_secret.reveal())
    return Desk(settings, monkeypatch)


def test_reconciling_from_a_terminal(desk: Desk) -> None:
    async def sell(system: System) -> None:
        await stock_up(system, "SKU-1", 5)

    async def break_it(system: System) -> None:
        await stranded(system)
        await change(system, MORE)

    desk.within(sell)
    assert "0 differences" in ok(desk.run("reconcile", "run")).out
    desk.within(break_it)
    dry = desk.run("reconcile", "run", "--dry-run", "--json")
    assert (dry.code, dry.json["found"], dry.json["new"]) == (1, 2, 2)
    assert ok(desk.run("reconcile", "list", "--json")).json == []
    assert desk.run("reconcile", "run", "--actor", "chief", "--reason", "nightly").code == 1
    listed = {each["kind"]: each["id"] for each in ok(desk.run("reconcile", "list", "--json")).json}
    held, counter = listed["stock.stranded"], listed["stock.ledger_sums"]
    assert len(ok(desk.run("reconcile", "list", "--kind", "stock.stranded")).out.splitlines()) == 2
    would = ok(desk.run("reconcile", "repair", held, "--dry-run", "--reason", "looking")).out
    assert would.startswith("would ask what became")
    refused_by(desk.run("reconcile", "repair", counter, "--reason", "try"), "adjustment")
    refused_by(desk.run("reconcile", "repair", 77, "--reason", "try"), "no difference 77")
    refused_by(desk.run("reconcile", "list", "--state", "lost"), "lost")
    misused(desk.run("reconcile", "repair", held))
    assert "is repaired" in ok(desk.run("reconcile", "repair", held, "--reason", "case 17")).out
    assert "is dismissed" in ok(desk.run("reconcile", "dismiss", counter, "--reason", "known")).out
    assert [each["id"] for each in ok(desk.run("reconcile", "list", "--state", "repaired", "--json")).json] == [held]
    assert ok(desk.run("reconcile", "dismiss", counter, "--reason", "again", "--json")).json["state"] == "dismissed"


async def test_a_sold_shop_over_http_has_none(idle: Counter) -> None:
    await pay(idle.system, await order(idle.system))
    assert (await idle.system.reconciliation.run("tests")).found == 0
