"""Routes of refunds: what staff may ask, and what is refused before any money moves."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from holdfast.edge.http.refunds import REFUNDS
from tests.conftest import eventually
from tests.edge.counter import Counter, refused, view_of
from tests.shop import PRICE_MINOR, pay


async def paid(counter: Counter, quantity: int = 2) -> Any:
    view = view_of(await counter.place(quantity=quantity))
    await pay(counter.system, view)
    return view


async def ask(counter: Counter, body: Any, key: str = "key", scope: str = REFUNDS) -> httpx.Response:
    headers = counter.bearer("boss", scope) | {"idempotency-key": key}
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return await counter.ask("POST", "/v1/refunds", headers, content=content)


async def test_staff_gives_money_back_and_sees_what_becomes_of_it(counter: Counter) -> None:
    view = await paid(counter)
    body = {"orderId": view.id, "amountMinor": 500, "reason": "a scratch"}
    answer = await ask(counter, body)
    assert answer.status_code == 201
    booked = answer.json()
    assert answer.headers["location"] == f"/v1/refunds/{booked['id']}"
    assert "idempotent-replayed" not in answer.headers
    assert booked == booked | {
        "paymentId": view.payment.id,
        "orderId": view.id,
        "status": "pending",
        "kind": "staff",
        "amountMinor": 500,
        "currency": "CNY",
        "reason": "a scratch",
        "actor": "boss",
    }
    who = counter.bearer("boss", REFUNDS)

    async def done() -> bool:
        now = await counter.ask("GET", f"/v1/refunds/{booked['id']}", who)
        return now.status_code == 200 and now.json()["status"] == "done"

    await eventually(done, "the refund is done")
    again = await ask(counter, body)
    assert (again.status_code, again.content) == (201, answer.content)
    assert again.headers["idempotent-replayed"] == "true"
    refused(await ask(counter, body | {"amountMinor": 501}), 422, "idempotency_key_reused")
    rest = {"paymentId": view.payment.id, "reason": "all of it"}
    assert (await ask(counter, rest, "rest")).json()["amountMinor"] == 2 * PRICE_MINOR - 500
    refused(await ask(counter, rest, "more"), 409, "nothing_to_refund")


async def test_refunds_come_page_by_page(counter: Counter) -> None:
    view = await paid(counter)
    who = counter.bearer("boss", REFUNDS)
    for number in range(3):
        await ask(counter, {"paymentId": view.payment.id, "amountMinor": 1, "reason": "bits"}, f"key-{number}")
    first = (await counter.ask("GET", "/v1/refunds?limit=2", who)).json()
    assert len(first["items"]) == 2
    assert first["next"] == first["items"][-1]["id"]
    rest = (await counter.ask("GET", f"/v1/refunds?limit=2&after={first['next']}", who)).json()
    assert (len(rest["items"]), rest["next"]) == (1, None)
    of_payment = await counter.ask("GET", f"/v1/refunds?paymentId={view.payment.id}", who)
    assert len(of_payment.json()["items"]) == 3
    assert (await counter.ask("GET", "/v1/refunds?paymentId=12", who)).json()["items"] == []
    for query in ("limit=0", "limit=201", "limit=x", "after=-1", "after=%00", "paymentId=x", "paymentId=01"):
        refused(await counter.ask("GET", f"/v1/refunds?{query}", who), 400, "invalid_input")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"reason": "no payment"}, 400, "invalid_input"),
        ({"paymentId": "1", "orderId": "1", "reason": "both"}, 400, "invalid_input"),
        ({"paymentId": 1, "reason": "a number"}, 400, "invalid_input"),
        ({"paymentId": "x", "reason": "no id"}, 400, "invalid_input"),
        ({"paymentId": str(2**63), "reason": "too long"}, 400, "invalid_input"),
        ({"paymentId": "1"}, 400, "invalid_input"),
        ({"paymentId": "1", "reason": ""}, 400, "invalid_input"),
        ({"paymentId": "1", "reason": "a\nb"}, 400, "invalid_input"),
        ({"paymentId": "1", "reason": "r", "amountMinor": 0}, 400, "invalid_input"),
        ({"paymentId": "1", "reason": "r", "amountMinor": -5}, 400, "invalid_input"),
        ({"paymentId": "1", "reason": "r", "amountMinor": 1.5}, 400, "invalid_input"),
        ({"paymentId": "1", "reason": "r", "amountMinor": 10**13}, 400, "invalid_input"),
        ({"paymentId": "1", "reason": "r", "status": "done"}, 400, "invalid_input"),
        ({"paymentId": "12345", "reason": "r"}, 404, "payment_not_found"),
        ({"orderId": "12345", "reason": "r"}, 404, "payment_not_found"),
        (b"[", 400, "invalid_input"),
    ],
    ids=str,
)
async def test_a_bad_wish_changes_nothing(idle: Counter, body: Any, status: int, code: str) -> None:
    async with idle.unchanged():
        refused(await ask(idle, body), status, code)


async def test_only_the_scope_of_refunds_gets_in(idle: Counter) -> None:
    async with idle.unchanged():
        for scope in ("", "stock:write", "refunds", "refunds:read"):
            refused(await ask(idle, {}, scope=scope), 403, "forbidden")
            for path in ("/v1/refunds", "/v1/refunds/1"):
                refused(await idle.ask("GET", path, idle.bearer("boss", scope)), 403, "forbidden")
        who = idle.bearer("boss", REFUNDS)
        refused(await idle.ask("POST", "/v1/refunds", who, body={}), 400, "invalid_input")  # no key
        for odd in ("77", "0", "x", "-1", str(2**63)):
            refused(await idle.ask("GET", f"/v1/refunds/{odd}", who), 404, "refund_not_found")
