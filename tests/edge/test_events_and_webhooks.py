"""The routes of the event feed and of webhooks: who sees what, what is refused, and what is told."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from holdfast.bootstrap import migrate_all, running
from holdfast.edge.http.events import EVENTS
from holdfast.edge.http.webhooks import WEBHOOKS
from holdfast.services.orders.model import OrderStatus
from holdfast.settings import WebhooksSettings
from tests.conftest import eventually
from tests.edge.counter import Counter, facing, fill, refused, settings_on
from tests.receiver import answering, receiving
from tests.shop import becomes, order, pay


@pytest_asyncio.fixture
async def counter(database_url: str) -> AsyncIterator[Counter]:
    """A shop at work that may send to this machine."""
    webhooks = WebhooksSettings(allow_http=True, allow_private=True, endpoints_max=3)
    settings = msgspec.structs.replace(settings_on(database_url), webhooks=webhooks)
    await migrate_all(settings)
    async with running(settings) as system, facing(system) as counter:
        await fill(system)
        system.work()
        yield counter


async def told(counter: Counter, many: int, headers: dict[str, str]) -> list[dict[str, Any]]:
    """Wait until so many events can be read with these headers."""

    async def there() -> bool:
        return len((await counter.ask("GET", "/v1/events", headers)).json()["events"]) == many

    await eventually(there, f"{many} events")
    found: list[dict[str, Any]] = (await counter.ask("GET", "/v1/events", headers)).json()["events"]
    return found


async def test_a_buyer_reads_his_own_events_and_staff_all(counter: Counter) -> None:
    system = counter.system
    anns, _ = await order(system, "ann"), await order(system, "bob", quantity=2)
    await pay(system, anns)
    await becomes(system, anns, OrderStatus.PAID)
    staff = counter.bearer("boss", f"{EVENTS} stock:write")
    everything = await told(counter, 4, staff)
    mine = await told(counter, 3, counter.bearer("ann"))
    assert {each["data"]["orderId"] for each in mine} == {anns.id}
    assert [each["type"] for each in await told(counter, 1, counter.bearer("bob"))] == ["order.created"]
    assert await told(counter, 0, counter.bearer("ANN")) == []
    assert await told(counter, 0, counter.bearer("boss", "stock:write orders:write")) == []
    assert [int(each["id"]) for each in everything] == sorted(int(each["id"]) for each in everything)
    assert set(everything[0]) == {"id", "type", "timestamp", "data"}

    page = (await counter.ask("GET", "/v1/events?limit=3&types=order.created,order.paid", staff)).json()
    assert [each["type"] for each in page["events"]].count("order.created") == 2
    assert page["more"] is False
    page = (await counter.ask("GET", f"/v1/events?after={everything[1]['id']}&limit=1", staff)).json()
    assert (page["events"], page["next"], page["more"]) == ([everything[2]], everything[2]["id"], True)


@pytest.mark.parametrize(
    "query",
    [
        *("after=-1", "after=x", f"after={2**63}", "after=", "after=1&after=2"),
        *("limit=0", "limit=501", "limit=1e2", "types=order", "types=order.due", "owner=bob"),
    ],
)
async def test_an_odd_question_is_refused(counter: Counter, query: str) -> None:
    async with counter.unchanged():
        refused(await counter.ask("GET", f"/v1/events?{query}", counter.bearer("ann")), 400, "invalid_input")


async def test_nobody_reads_without_a_token(counter: Counter) -> None:
    refused(await counter.ask("GET", "/v1/events"), 401, "unauthorized")
    refused(await counter.ask("GET", "/v1/webhooks"), 401, "unauthorized")
    refused(await counter.ask("GET", "/v1/webhooks", counter.bearer("boss", EVENTS)), 403, "forbidden")


async def test_a_webhook_from_its_making_to_its_removal(counter: Counter) -> None:
    staff = counter.bearer("boss", WEBHOOKS)
    async with receiving() as receiver:
        made = await counter.ask("POST", "/v1/webhooks", staff, body={"url": receiver.url(), "description": "till"})
        assert made.status_code == 201
        hook = made.json()
        path, secret = f"/v1/webhooks/{hook['id']}", hook.pop("secret")
        assert secret.startswith("whsec_")
        assert (await counter.ask("GET", path, staff)).json() == hook
        assert (await counter.ask("GET", "/v1/webhooks", staff)).json() == [hook]

        receiver.reply = answering(410)
        await order(counter.system)

        async def sent(status: str) -> bool:
            found = (await counter.ask("GET", f"{path}/deliveries?status={status}", staff)).json()
            return len(found) == 1

        await eventually(lambda: sent("failed"), "it is refused")
        assert (await counter.ask("GET", path, staff)).json()["disabledReason"] == "it answered 410 Gone"
        changed = await counter.ask("PATCH", path, staff, body={"enabled": True, "types": ["order.paid"]})
        assert (changed.json()["enabled"], changed.json()["types"]) == (True, ["order.paid"])

        receiver.reply = answering(200)
        rotated = (await counter.ask("POST", f"{path}/rotate", staff)).json()
        assert rotated["secret"] not in {secret, ""}
        assert rotated["previousSecretUntil"] is not None
        again = await counter.ask("POST", f"{path}/replay", staff, body={"failedSince": "2020-01-01T00:00:00Z"})
        assert (again.status_code, again.json()) == (200, {"replayed": 1})
        await eventually(lambda: sent("done"), "it is sent again")
        (delivery,) = (await counter.ask("GET", f"{path}/deliveries?limit=5", staff)).json()
        log = (await counter.ask("GET", f"{path}/deliveries/{delivery['id']}", staff)).json()
        assert [each["status"] for each in log["log"]] == [410, 200]
        assert log["body"]["type"] == "order.created"
        assert secret not in str(log)
        one = await counter.ask("POST", f"{path}/replay", staff, body={"delivery": delivery["id"]})
        assert one.json() == {"replayed": 1}

        assert (await counter.ask("DELETE", path, staff)).status_code == 204
        refused(await counter.ask("GET", path, staff), 404, "webhook_not_found")
        refused(await counter.ask("DELETE", path, staff), 404, "webhook_not_found")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({}, 400, "invalid_input"),
        ({"url": 1}, 400, "invalid_input"),
        ({"url": "x", "secret": "whsec_AAAA"}, 400, "invalid_input"),
        ({"url": "https://example.com/" + "x" * 2_000}, 400, "invalid_input"),
        ({"url": "ftp://127.0.0.1/"}, 400, "forbidden_url"),
        ({"url": "http://user:word@127.0.0.1/"}, 400, "forbidden_url"),
        ({"url": "http://no-such-host.invalid/"}, 400, "forbidden_url"),
        ({"url": "http://127.0.0.1/", "types": ["order.due"]}, 400, "invalid_input"),
        ({"url": "http://127.0.0.1/", "types": "order.paid"}, 400, "invalid_input"),
        ({"url": "http://127.0.0.1/", "description": "x" * 201}, 400, "invalid_input"),
    ],
)
async def test_a_wrong_webhook_is_refused(counter: Counter, body: Any, status: int, code: str) -> None:
    staff = counter.bearer("boss", WEBHOOKS)
    async with counter.unchanged():
        refused(await counter.ask("POST", "/v1/webhooks", staff, body=body), status, code)


async def test_what_cannot_be_done_is_refused(counter: Counter) -> None:
    staff = counter.bearer("boss", WEBHOOKS)
    for number in range(3):
        made = await counter.ask("POST", "/v1/webhooks", staff, body={"url": f"http://127.0.0.1:9/{number}"})
        assert made.status_code == 201
    path = f"/v1/webhooks/{made.json()['id']}"
    async with counter.unchanged():
        again = await counter.ask("POST", "/v1/webhooks", staff, body={"url": "http://127.0.0.1:9/1"})
        refused(again, 409, "webhook_exists")
        one_more = await counter.ask("POST", "/v1/webhooks", staff, body={"url": "http://127.0.0.1:9/3"})
        refused(one_more, 409, "too_many_webhooks")
        taken = await counter.ask("PATCH", path, staff, body={"url": "http://127.0.0.1:9/1"})
        refused(taken, 409, "webhook_exists")
        for odd in ({"enabled": 1}, {"url": None}, {"id": "7"}, {"types": ["x"]}):
            refused(await counter.ask("PATCH", path, staff, body=odd), 400, "invalid_input")
        for odd in (
            {},
            {"delivery": "1", "failedSince": "2026-01-01T00:00:00Z"},
            {"failedSince": "2026-01-01T00:00:00"},
        ):
            refused(await counter.ask("POST", f"{path}/replay", staff, body=odd), 400, "invalid_input")
        for odd_id in ("0", "x", "-1", "1" * 20, "7"):
            refused(await counter.ask("GET", f"/v1/webhooks/{odd_id}", staff), 404, "webhook_not_found")
            refused(await counter.ask("POST", f"/v1/webhooks/{odd_id}/rotate", staff), 404, "webhook_not_found")
            refused(await counter.ask("GET", f"{path}/deliveries/{odd_id}", staff), 404, "webhook_not_found")
        refused(await counter.ask("GET", f"{path}/deliveries?status=lost", staff), 400, "invalid_input")
        refused(await counter.ask("GET", f"{path}/deliveries?limit=0", staff), 400, "invalid_input")
