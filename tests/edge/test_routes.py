"""Every route as its users see it: what it answers, with which headers, and what is true afterwards."""

from __future__ import annotations

import asyncio
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import jwt
import msgspec
import pytest
from opentelemetry.trace import SpanKind
from prometheus_client import CONTENT_TYPE_LATEST
from prometheus_client.parser import text_string_to_metric_families

from holdfast import observe
from holdfast.edge.http.app import build_app
from holdfast.services.contracts import topology
from holdfast.services.orders.model import OrderStatus
from holdfast.services.payments.sandbox import SIGNATURE_HEADER
from tests.conftest import StartSystem, eventually
from tests.edge.counter import (
    PROBLEM,
    SANDBOX_SECRET,
    TOKEN_SECRET,
    Counter,
    facing,
    fill,
    refused,
    requests_counted,
    routes_of,
    serving,
    settings_on,
    view_of,
)
from tests.servers.postgres import PostgresServer, require_postgres
from tests.shop import PRICE_MINOR, becomes, clean, count, level, level_becomes, probe, rows
from tests.spans import carried, id_of, parent_of, watched_by_an_sdk

on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)

TRACE = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE}-b7ad6b7169203331-01"


# --- Orders -----------------------------------------------------------------------------------------------------------


async def test_placing_answers_201_with_the_order_and_where_it_is(counter: Counter) -> None:
    answer = await counter.place("ann", quantity=2)
    assert answer.status_code == 201
    assert answer.headers["content-type"] == "application/json"
    assert "idempotent-replayed" not in answer.headers
    body = answer.json()
    assert list(body) == [
        *("id", "status", "amountMinor", "currency", "lines", "createdAt", "payBy", "payment"),
        *("refundedMinor", "tracking", "completeBy"),
    ]
    assert answer.headers["location"] == f"/v1/orders/{body['id']}"
    assert (body["status"], body["amountMinor"], body["currency"]) == ("pending_payment", 2 * PRICE_MINOR, "CNY")
    assert body["lines"] == [{"sku": "SKU-1", "quantity": 2, "priceMinor": PRICE_MINOR}]
    assert list(body["payment"]) == ["id", "provider", "payUrl"]
    instant = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
    assert instant.fullmatch(body["createdAt"])
    assert instant.fullmatch(body["payBy"])
    read = await counter.ask("GET", answer.headers["location"], counter.bearer("ann"))
    assert (read.status_code, read.headers["content-type"]) == (200, "application/json")
    assert read.content == answer.content


async def test_the_same_key_gives_the_same_bytes_marked_as_replayed_whatever_became_of_the_order(
    counter: Counter,
) -> None:
    first = await counter.place("ann")
    for _ in range(2):
        again = await counter.place("ann")
        assert (again.status_code, again.content) == (201, first.content)
        assert (again.headers["location"], again.headers["idempotent-replayed"]) == (first.headers["location"], "true")
    await counter.ask("POST", f"{first.headers['location']}/cancel", counter.bearer("ann"))
    assert (await counter.place("ann")).content == first.content
    assert await count(counter.system, "SELECT id FROM order_order") == 1


async def test_a_double_click_places_one_order(counter: Counter) -> None:
    answers = await asyncio.gather(*(counter.place("ann") for _ in range(8)))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.content for answer in answers}) == 1
    assert sum("idempotent-replayed" not in answer.headers for answer in answers) == 1
    assert (await level(counter.system)).held == 1


@on_sqlite
async def test_two_buyers_may_choose_the_same_key(counter: Counter) -> None:
    answers = [await counter.place(buyer) for buyer in ("ann", "bob")]
    assert [answer.status_code for answer in answers] == [201, 201]
    assert ["idempotent-replayed" in answer.headers for answer in answers] == [False, False]
    assert len({answer.headers["location"] for answer in answers}) == 2


@on_sqlite
async def test_any_printable_key_of_1_to_128_characters_is_taken(counter: Counter) -> None:
    for key in ("k", "~" * 128, "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", '"quoted"'):
        assert (await counter.place("ann", key=key)).status_code == 201
        assert (await counter.place("ann", key=key)).headers["idempotent-replayed"] == "true"


@on_sqlite
async def test_a_body_in_chunks_is_taken(counter: Counter) -> None:
    async def pieces() -> Any:
        for byte in b'{"lines":[{"sku":"SKU-1","quantity":1}]}':
            yield bytes([byte])

    headers = counter.bearer("ann") | {"idempotency-key": "key-1"}
    answer = await counter.client.post("/v1/orders", headers=headers, content=pieces())
    assert answer.status_code == 201


@on_sqlite
async def test_of_a_doubled_field_the_last_one_counts_and_the_answer_says_so(counter: Counter) -> None:
    body = b'{"lines":[{"sku":"SKU-1","quantity":1}],"lines":[{"sku":"SKU-2","quantity":3,"quantity":2}]}'
    headers = counter.bearer("ann") | {"idempotency-key": "key-1"}
    placed = view_of(await counter.ask("POST", "/v1/orders", headers, content=body))
    assert [(line.sku, line.quantity) for line in placed.lines] == [("SKU-2", 2)]
    assert (await level(counter.system, "SKU-2")).held == 2
    assert (await level(counter.system, "SKU-1")).held == 0


async def test_cancelling_answers_the_cancelled_order_and_gives_its_units_back(counter: Counter) -> None:
    placed = await counter.place("ann")
    for _ in range(2):  # cancelling again does no harm
        answer = await counter.ask("POST", f"{placed.headers['location']}/cancel", counter.bearer("ann"))
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
        assert answer.json()["status"] == "cancelled"
        assert "payUrl" not in {key: value for key, value in answer.json()["payment"].items() if value is not None}
    await level_becomes(counter.system, available=40, held=0, sold=0)
    await clean(counter.system)


@on_sqlite
async def test_cancelling_takes_no_notice_of_a_body(counter: Counter) -> None:
    placed = await counter.place("ann")
    body = {"status": "paid", "buyer": "bob", "amountMinor": 0}
    answer = await counter.ask("POST", f"{placed.headers['location']}/cancel", counter.bearer("ann"), body=body)
    expected = placed.json()
    assert answer.json() == expected | {"status": "cancelled", "payment": answer.json()["payment"]}


@on_sqlite
async def test_a_paid_order_is_not_cancelled(counter: Counter) -> None:
    placed = await counter.place("ann")
    await pay(counter, placed)
    await becomes(counter.system, view_of(placed), OrderStatus.PAID)
    answer = await counter.ask("POST", f"{placed.headers['location']}/cancel", counter.bearer("ann"))
    refused(answer, 409, "order_not_cancellable")


# --- Payments ---------------------------------------------------------------------------------------------------------


async def pay(counter: Counter, placed: httpx.Response) -> httpx.Response:
    """Pay an order by its link and post the notice."""
    notice = (await counter.ask("POST", placed.json()["payment"]["payUrl"])).json()
    return await counter.notify(notice["body"].encode(), notice["signature"])


async def test_paying_and_the_notice_make_the_order_paid_once(counter: Counter) -> None:
    placed = await counter.place("ann", quantity=3)
    paid = await counter.ask("POST", placed.json()["payment"]["payUrl"])
    assert (paid.status_code, paid.headers["content-type"]) == (200, "application/json")
    assert list(paid.json()) == ["body", "signature"]
    for _ in range(3):
        answer = await counter.notify(paid.json()["body"].encode(), paid.json()["signature"])
        assert (answer.status_code, answer.content) == (200, b"success")
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    await becomes(counter.system, view_of(placed), OrderStatus.PAID)
    await level_becomes(counter.system, available=37, held=0, sold=3)
    assert await count(counter.system, "SELECT event_id FROM payment_notice") == 1
    read = await counter.ask("GET", placed.headers["location"], counter.bearer("ann"))
    assert read.json()["payment"].get("payUrl") is None
    await clean(counter.system)


@on_sqlite
async def test_paying_again_by_the_same_link_tells_of_the_same_trade(counter: Counter) -> None:
    placed = await counter.place("ann")
    notices = [(await counter.ask("POST", placed.json()["payment"]["payUrl"])).json() for _ in range(2)]
    assert notices[0]["body"] == notices[1]["body"]


@on_sqlite
async def test_the_dearest_order_that_can_be_placed_can_be_paid(counter: Counter) -> None:
    price = 1_000_000_000_000  # the highest price of a unit, and the highest amount of a notice
    body = {"title": "Dear", "priceMinor": price, "currency": "CNY"}
    assert (await counter.ask("PUT", "/v1/skus/SKU-1", counter.staff(), body=body)).status_code == 200
    async with counter.unchanged():
        refused(await counter.place("ann", key="two", quantity=2), 400, "invalid_input")
    placed = await counter.place("ann", key="one")
    answer = await pay(counter, placed)
    assert (answer.status_code, answer.text) == (200, "success")
    await becomes(counter.system, view_of(placed), OrderStatus.PAID)


# --- Stock ------------------------------------------------------------------------------------------------------------


@on_sqlite
async def test_anybody_may_ask_how_many_are_left_over_all_warehouses(counter: Counter) -> None:
    receipt = {"sku": "SKU-1", "quantity": 2, "warehouse": "north"}
    await counter.ask("POST", "/v1/stocks/receipts", counter.staff() | {"idempotency-key": "r-1"}, body=receipt)
    await counter.place("ann", quantity=5)
    answer = await counter.ask("GET", "/v1/stocks/SKU-1")
    assert (answer.status_code, answer.json()) == (200, {"sku": "SKU-1", "available": 37})
    assert answer.headers["content-type"] == "application/json"


@on_sqlite
async def test_staff_reads_all_levels(counter: Counter) -> None:
    await counter.place("ann", quantity=5)
    answer = await counter.ask("GET", "/v1/stocks", counter.staff())
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    assert [each["sku"] for each in answer.json()] == ["SKU-1", "SKU-2", "SKU-EUR"]
    assert answer.json()[0] == {
        "sku": "SKU-1",
        "warehouse": "main",
        "available": 35,
        "held": 5,
        "sold": 0,
        "total": 40,
        "version": 2,
    }


@on_sqlite
async def test_a_changed_price_goes_for_later_orders_only(counter: Counter) -> None:
    before = await counter.place("ann", key="before")
    sku = {"sku": "SKU-1", "title": "Ticket ☂ 票", "priceMinor": 2_500, "currency": "EUR"}
    body = {name: value for name, value in sku.items() if name != "sku"}
    for _ in range(2):  # again changes nothing
        answer = await counter.ask("PUT", "/v1/skus/SKU-1", counter.staff(), body=body)
        assert (answer.status_code, answer.json()) == (200, sku | dict.fromkeys(("orderMax", "buyerMax", "timeOutMs")))
    after = await counter.place("ann", key="after")
    assert (after.json()["amountMinor"], after.json()["currency"]) == (2_500, "EUR")
    read = await counter.ask("GET", before.headers["location"], counter.bearer("ann"))
    assert (read.json()["amountMinor"], read.json()["currency"]) == (PRICE_MINOR, "CNY")


async def test_a_receipt_counts_once_by_its_key(counter: Counter) -> None:
    receipt = {"sku": "SKU-BARE", "quantity": 7}
    headers = counter.staff() | {"idempotency-key": "delivery-1"}
    for _ in range(3):
        answer = await counter.ask("POST", "/v1/stocks/receipts", headers, body=receipt)
        assert (answer.status_code, answer.headers["content-type"]) == (201, "application/json")
        assert [(each["warehouse"], each["total"]) for each in answer.json()] == [("main", 7)]
    more = headers | {"idempotency-key": "delivery-2"}
    answer = await counter.ask("POST", "/v1/stocks/receipts", more, body=receipt | {"warehouse": "north"})
    assert [(each["warehouse"], each["total"]) for each in answer.json()] == [("main", 7), ("north", 7)]
    booked = await rows(counter.system, "SELECT actor FROM stock_ledger WHERE sku = 'SKU-BARE'")
    assert booked == [{"actor": "boss"}, {"actor": "boss"}]


async def test_a_receipts_key_used_for_another_receipt_is_refused_and_books_nothing(counter: Counter) -> None:
    headers = counter.staff() | {"idempotency-key": "delivery-1"}
    first = {"sku": "SKU-1", "quantity": 7}
    assert (await counter.ask("POST", "/v1/stocks/receipts", headers, body=first)).status_code == 201
    for other in ({"quantity": 8}, {"warehouse": "north"}, {"sku": "SKU-2"}, {"sku": "SKU-BARE", "warehouse": "south"}):
        async with counter.unchanged():
            answer = await counter.ask("POST", "/v1/stocks/receipts", headers, body=first | other)
        refused(answer, 422, "idempotency_key_reused")


@on_sqlite
async def test_every_code_can_be_sold_and_asked_for(counter: Counter) -> None:
    unanswered = {}
    for sku in ("cancel", "sandbox", "v1", "1", "a" * 64, "a.b:c_d-e", "receipts"):
        body: dict[str, Any] = {"title": "Odd name", "priceMinor": 5, "currency": "CNY"}
        assert (await counter.ask("PUT", f"/v1/skus/{sku}", counter.staff(), body=body)).status_code == 200
        body = {"sku": sku, "quantity": 1}
        headers = counter.staff() | {"idempotency-key": f"receipt-{sku}"}
        assert (await counter.ask("POST", "/v1/stocks/receipts", headers, body=body)).status_code == 201
        assert (await counter.place("ann", key=f"order-{sku}", sku=sku)).status_code == 201
        answer = await counter.ask("GET", f"/v1/stocks/{sku}")
        if answer.status_code != 200 or answer.json() != {"sku": sku, "available": 0}:
            unanswered[sku] = answer.text
    assert unanswered == {}


# --- Refusals that a good client meets --------------------------------------------------------------------------------


async def test_refusals_by_rule_say_why_and_change_nothing(idle: Counter) -> None:
    await idle.place("ann", key="used")
    async with idle.unchanged():
        refused(await idle.place("ann", key="used", quantity=2), 422, "idempotency_key_reused")
        refused(await idle.place("ann", sku="SKU-9"), 422, "unknown_sku")
        refused(await idle.place("ann", sku="SKU-BARE"), 409, "sold_out")
        assert "39" in refused(await idle.place("ann", quantity=40), 409, "sold_out")
        lines = [{"sku": "SKU-1", "quantity": 1}, {"sku": "SKU-EUR", "quantity": 1}]
        headers = idle.bearer("ann") | {"idempotency-key": "mixed"}
        refused(await idle.ask("POST", "/v1/orders", headers, body={"lines": lines}), 422, "mixed_currencies")
        refused(await idle.ask("GET", "/v1/stocks/SKU-9"), 404, "sku_not_found")
        headers = idle.staff() | {"idempotency-key": "r-9"}
        body = {"sku": "SKU-9", "quantity": 1, "warehouse": "new"}
        refused(await idle.ask("POST", "/v1/stocks/receipts", headers, body=body), 404, "sku_not_found")


@on_sqlite
async def test_no_token_is_answered_with_how_to_sign_in(idle: Counter) -> None:
    body = {"lines": [{"sku": "SKU-1", "quantity": 1}]}
    hot = await idle.ask("POST", "/v1/orders", {"idempotency-key": "key-1"}, body=body)
    cold = await idle.ask("GET", "/v1/orders/1")
    assert "Authorization: Bearer" in refused(hot, 401, "unauthorized")
    assert hot.json() == cold.json()
    assert hot.headers["www-authenticate"] == cold.headers["www-authenticate"] == "Bearer"


# --- Health, metrics, schema ------------------------------------------------------------------------------------------


async def test_a_healthy_process_is_live_and_ready(counter: Counter) -> None:
    for path in ("/healthz/live", "/healthz/ready"):
        answer = await counter.ask("GET", path)
        assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
        assert answer.headers["content-type"] == "application/json"


@on_sqlite
async def test_metrics_come_with_the_content_type_that_prometheus_reads(counter: Counter) -> None:
    answer = await counter.ask("GET", "/metrics")
    assert answer.status_code == 200
    # A parameter that stands twice makes the header unreadable for Prometheus 3, and the scrape fails.
    assert answer.headers["content-type"] == CONTENT_TYPE_LATEST


async def test_metrics_tell_what_is_in_the_queues(idle: Counter) -> None:
    assert (await idle.place("ann")).status_code == 201
    told = await metrics(idle)
    names = {"queue": topology.ORDER_DUE_QUEUE}
    assert told["holdfast_queue_messages" + json.dumps(names | {"state": "delayed"}, sort_keys=True)] == 1
    assert told["holdfast_queue_messages" + json.dumps(names | {"state": "ready"}, sort_keys=True)] == 0
    assert told["holdfast_queue_oldest_age_seconds" + json.dumps(names)] == 0


@on_sqlite
async def test_metrics_come_although_the_database_does_not_answer(idle: Counter) -> None:
    system = idle.system
    async with AsyncExitStack() as all_readers:
        for _ in range(system.settings.database.readers):
            await all_readers.enter_async_context(system.database.read())
        async with asyncio.timeout(10):  # a reader is waited for 15 s
            told = await metrics(idle)
    assert not [name for name in told if name.startswith("holdfast_queue_messages")]
    assert "holdfast_queues_counted_timestamp_seconds{}" in told


async def metrics(counter: Counter) -> dict[str, float]:
    """All samples as `name{label="value"}` -> value."""
    answer = await counter.ask("GET", "/metrics")
    return {
        f"{sample.name}{json.dumps(sample.labels, sort_keys=True)}": sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


@on_sqlite
async def test_metrics_show_the_size_of_group_commits_and_how_long_requests_waited(idle: Counter) -> None:
    name = json.dumps({"name": "main"})
    before = await metrics(idle)
    answers = await asyncio.gather(*(idle.place(f"buyer-{number}") for number in range(20)))
    assert {answer.status_code for answer in answers} == {201}
    after = await metrics(idle)
    grown = {key: after[key] - before.get(key, 0.0) for key in after}
    # Beside the orders only the sweeps for expired messages go through this writer, a few times a second.
    sweeps = grown[f"holdfast_group_commit_batch_size_sum{name}"] - 20
    assert 0 <= sweeps <= 10
    batches = grown[f"holdfast_group_commit_batch_size_count{name}"]
    assert 1 <= batches <= 20 + sweeps
    assert grown[f"holdfast_group_commit_wait_seconds_count{name}"] == batches
    assert grown[f"holdfast_group_commit_wait_seconds_sum{name}"] >= 0
    most = json.dumps({"le": "+Inf", "name": "main"})
    assert grown[f"holdfast_group_commit_batch_size_bucket{most}"] >= 1
    placed = json.dumps({"route": "/v1/orders", "status": "201"})
    assert grown[f"holdfast_http_requests_total{placed}"] == 20
    assert grown[f"holdfast_orders_moved_total{json.dumps({'state': 'pending_payment'})}"] == 20


@on_sqlite
async def test_what_strangers_write_in_paths_becomes_no_label(idle: Counter) -> None:
    counted = requests_counted()
    paths = ["/canary", "/v1/orders/canary", "/v1/stocks/canary", "/sandbox/pay/canary", "/v1/notices/canary"]
    for path in paths:
        for method in ("GET", "POST", "PUT", "DELETE"):
            await idle.ask(method, path, idle.bearer("canary"))
    assert requests_counted() - counted == 4 * len(paths)
    assert "canary" not in (await idle.ask("GET", "/metrics")).text


@on_sqlite
async def test_the_application_is_built_in_ways_that_its_framework_will_keep(idle: Counter) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        build_app(idle.system)
    assert [str(each.message) for each in told] == []


@on_sqlite
async def test_the_openapi_document_names_every_route_but_the_two_hot_ones(idle: Counter) -> None:
    answer = await idle.ask("GET", "/schema/openapi.json")
    assert answer.status_code == 200
    named = {(method.upper(), path) for path, verbs in answer.json()["paths"].items() for method in verbs}
    routes = routes_of(build_app(idle.system))
    missing = {(method, path) for method, path in routes if not path.startswith("/schema")} - named
    assert missing == {
        ("POST", "/v1/orders"),
        ("POST", "/v1/notices/sandbox"),
        ("GET", "/healthz/live"),
        ("GET", "/healthz/ready"),
        ("GET", "/metrics"),
    }


# --- Traces -----------------------------------------------------------------------------------------------------------


async def watched(counter: Counter) -> None:
    """Keep a copy of every message."""
    for exchange in (topology.ORDER_EVENTS, topology.STOCK_EVENTS):
        await probe(counter.system, exchange, "#")


async def traces(counter: Counter, routing_key: str) -> list[str]:
    """The traceparents of the messages of a routing key."""
    found = await rows(
        counter.system,
        "SELECT headers FROM hf_message WHERE routing_key = :routing_key ORDER BY id",
        routing_key=routing_key,
    )
    return [msgspec.json.decode(row["headers"], type=dict[str, str]).get("traceparent", "") for row in found]


@on_sqlite
@pytest.mark.parametrize("routing_key", [topology.KEY_ORDER_CREATE, topology.KEY_ORDER_DUE, topology.KEY_STOCK_LOCKED])
async def test_the_trace_of_placing_is_in_the_orders_messages(idle: Counter, routing_key: str) -> None:
    await watched(idle)
    answer = await idle.place("ann", headers={"traceparent": TRACEPARENT})
    assert answer.status_code == 201
    found = await traces(idle, routing_key)
    assert found
    assert set(found) == {TRACEPARENT}


async def test_orders_of_one_batch_keep_their_own_traces(idle: Counter) -> None:
    sent = {f"buyer-{number}": f"00-{number + 1:032x}-{number + 1:016x}-01" for number in range(12)}
    await asyncio.gather(*(idle.place(buyer, headers={"traceparent": trace}) for buyer, trace in sent.items()))
    assert sorted(await traces(idle, topology.KEY_ORDER_DUE)) == sorted(sent.values())


@on_sqlite
async def test_the_trace_of_cancelling_is_in_the_orders_last_message(idle: Counter) -> None:
    await watched(idle)
    placed = await idle.place("ann")
    headers = idle.bearer("ann") | {"traceparent": TRACEPARENT}
    answer = await idle.ask("POST", f"{placed.headers['location']}/cancel", headers)
    assert answer.status_code == 200
    assert set(await traces(idle, topology.KEY_ORDER_CLOSED)) == {TRACEPARENT}


@on_sqlite
async def test_the_trace_of_a_notice_is_in_the_message_it_causes(idle: Counter) -> None:
    placed = await idle.place("ann")
    notice = (await idle.ask("POST", placed.json()["payment"]["payUrl"])).json()
    headers = {SIGNATURE_HEADER: notice["signature"], "traceparent": TRACEPARENT}
    answer = await idle.ask("POST", "/v1/notices/sandbox", headers, content=notice["body"].encode())
    assert answer.status_code == 200
    assert set(await traces(idle, topology.KEY_PAY_SUCCESS)) == {TRACEPARENT}


async def test_with_an_sdk_a_request_is_a_span_and_its_messages_come_from_it(
    start_system: StartSystem,
) -> None:
    with watched_by_an_sdk() as spans:
        system = await start_system(work=False)
        await fill(system)
        async with facing(system) as idle:
            assert (await idle.place("ann", headers={"traceparent": TRACEPARENT})).status_code == 201
            assert (await idle.place("bob")).status_code == 201
            assert (await idle.ask("GET", "/v1/orders/1", idle.bearer("ann"))).status_code == 404
            ann, bob = await spans.ended("POST /v1/orders", 2)
            (missed,) = await spans.ended("GET /v1/orders/{order_id}")
            assert parent_of(ann) == carried(TRACEPARENT)
            assert bob.parent is None
            assert (missed.attributes or {})["http.response.status_code"] == 404
            found = [carried(each) for each in await traces(idle, topology.KEY_ORDER_DUE)]
    sent = {id_of(span): parent_of(span) for span in spans.all() if span.kind is SpanKind.PRODUCER}
    assert [sent[each] for each in found] == [id_of(ann), id_of(bob)]


NO_TRACE = {
    "none": None,
    "empty": "",
    "words": "hello",
    "zero trace": f"00-{'0' * 32}-b7ad6b7169203331-01",
    "zero span": f"00-{TRACE}-{'0' * 16}-01",
    "version ff": f"ff-{TRACE}-b7ad6b7169203331-01",
    "capitals": TRACEPARENT.upper(),
    "cut off": TRACEPARENT[:-1],
    "too long": TRACEPARENT + "-x",
    "two": f"{TRACEPARENT},{TRACEPARENT}",
}


@on_sqlite
async def test_without_a_usable_traceparent_each_request_begins_a_trace(idle: Counter) -> None:
    for name, sent in NO_TRACE.items():
        headers = {} if sent is None else {"traceparent": sent, "tracestate": "canary=1"}
        assert (await idle.place("ann", key=f"key-{name}".replace(" ", "-"), headers=headers)).status_code == 201
    found = await traces(idle, topology.KEY_ORDER_DUE)
    assert len(found) == len(NO_TRACE)
    for trace in found:
        assert re.fullmatch(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}", trace)
    assert len({trace.split("-")[1] for trace in [*found, TRACEPARENT]}) == len(NO_TRACE) + 1
    assert await count(idle.system, "SELECT id FROM hf_message WHERE headers LIKE '%canary%'") == 0


@on_sqlite
async def test_an_endless_trace_header_is_not_stored_with_every_message(idle: Counter) -> None:
    endless = "x" * 20_000
    for number, sent in enumerate(
        (
            {"traceparent": TRACEPARENT, "tracestate": f"canary={endless}"},
            {"traceparent": f"01-{TRACE}-b7ad6b7169203331-01-{endless}"},
        )
    ):
        assert (await idle.place("ann", key=f"key-{number}", headers=sent)).status_code == 201
    stored = await rows(idle.system, "SELECT headers FROM hf_message")
    assert max(len(row["headers"]) for row in stored) < 2_000


# --- When it cannot be done now ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_server() -> Iterator[PostgresServer]:
    """A PostgreSQL of this module's own, to be crashed."""
    require_postgres()
    with PostgresServer() as server:
        yield server


@pytest.fixture
def fragile(own_server: PostgresServer) -> PostgresServer:
    """The own server, up."""
    if not own_server.running:
        own_server.restart()
    return own_server


async def test_while_postgresql_is_away_requests_get_503_and_afterwards_their_answers(fragile: PostgresServer) -> None:
    async with serving(settings_on(fragile.url(fragile.create_database()))) as counter:
        await fill(counter.system)
        before = await counter.place("ann", key="before")
        notice = (await counter.ask("POST", before.json()["payment"]["payUrl"])).json()
        assert (await counter.ask("GET", "/healthz/ready")).status_code == 200
        fragile.crash()
        refused(await counter.ask("GET", "/healthz/ready"), 503, "unavailable")
        assert (await counter.ask("GET", "/healthz/live")).status_code == 200
        meanwhile = [
            await counter.place("ann", key="meanwhile"),
            await counter.ask("GET", before.headers["location"], counter.bearer("ann")),
            await counter.ask("POST", f"{before.headers['location']}/cancel", counter.bearer("ann")),
            await counter.ask("GET", "/v1/stocks/SKU-1"),
            await counter.notify(notice["body"].encode(), notice["signature"]),
        ]
        for answer in meanwhile:
            assert answer.json()["code"] in {"unavailable", "outcome_unknown"}
            refused(answer, 503, answer.json()["code"])
        fragile.restart()

        async def ready() -> bool:
            return (await counter.ask("GET", "/healthz/ready")).status_code == 200

        await eventually(ready, "the process is ready again")
        placed = [await counter.place("ann", key="meanwhile") for _ in range(2)]
        assert [answer.status_code for answer in placed] == [201, 201]
        assert placed[0].content == placed[1].content
        assert await count(counter.system, "SELECT id FROM order_order") == 2
        told = await counter.notify(notice["body"].encode(), notice["signature"])
        assert (told.status_code, told.text) == (200, "success")


async def test_a_stranger_does_not_learn_where_the_database_is(fragile: PostgresServer) -> None:
    async with serving(settings_on(fragile.url(fragile.create_database()))) as counter:
        fragile.crash()
        for _ in range(2):  # the first call may find dead connections, the second cannot make new ones
            detail = refused(await counter.ask("GET", "/v1/stocks/SKU-1"), 503, "unavailable")
            assert str(fragile.port) not in detail
            assert "127.0.0.1" not in detail
            assert "Errno" not in detail


@on_sqlite
async def test_when_too_many_wait_further_requests_are_told_to_come_again(
    start_system: StartSystem, tmp_path: Path
) -> None:
    settings = settings_on(f"sqlite:///{tmp_path}/small.db")
    settings = msgspec.structs.replace(settings, database=msgspec.structs.replace(settings.database, queue_max=2))
    system = await start_system(settings, work=False)
    await fill(system)
    async with facing(system) as counter:
        async with system.database.transaction():  # nothing can be decided meanwhile
            asked = [asyncio.create_task(counter.place(f"buyer-{number}")) for number in range(12)]

            async def refused_some() -> bool:
                return sum(task.done() for task in asked) >= 12 - 2 - 2

            await eventually(refused_some, "all but those that wait are refused")
        answers = await asyncio.gather(*asked)
    turned_away = [answer for answer in answers if answer.status_code != 201]
    assert 8 <= len(turned_away) < 12
    for answer in turned_away:
        refused(answer, 503, "overloaded")
    assert await count(system, "SELECT id FROM order_order") == 12 - len(turned_away)


@on_sqlite
async def test_a_request_that_takes_too_long_has_an_unknown_outcome_and_the_same_key_finds_it(
    start_system: StartSystem, tmp_path: Path
) -> None:
    settings = settings_on(f"sqlite:///{tmp_path}/slow.db")
    settings = msgspec.structs.replace(settings, http=msgspec.structs.replace(settings.http, request_timeout_ms=150))
    system = await start_system(settings, work=False)
    await fill(system)
    async with facing(system) as counter:
        async with system.database.transaction():
            answer = await counter.place("ann")
            assert "same idempotency key" in refused(answer, 503, "outcome_unknown")

        async def placed() -> bool:
            return (await counter.place("ann")).status_code == 201

        await eventually(placed, "the same key places the order")
        assert await count(system, "SELECT id FROM order_order") == 1


@on_sqlite
@pytest.mark.parametrize("form", ["console", "json"])
async def test_a_fault_of_ours_is_told_without_content_and_logged_without_what_was_sent(
    idle: Counter, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    async def break_down(*_: Any) -> None:
        raise LookupError("out of order")

    for verb in ("place", "get"):
        monkeypatch.setattr(idle.system.orders, verb, break_down)
    observe.configure_logs(form, "info")
    sent = {"cookie": "canary-cookie", "x-phone": "canary-phone"}
    hot = await idle.place("canary-buyer", key="canary-key", sku="canary-sku", headers=sent)
    cold = await idle.ask("GET", "/v1/orders/5?x=canary-query", idle.bearer("canary-buyer") | sent)
    log = capsys.readouterr().err
    for answer in (hot, cold):
        assert (answer.status_code, answer.headers["content-type"]) == (500, PROBLEM)
        body = answer.json()
        assert (body["code"], body["status"]) == ("internal_error", 500)
        assert "out of order" not in answer.text
        assert body["instance"].removeprefix("urn:holdfast:incident:") in log
    assert log.count("out of order") >= 2
    token = jwt.encode(idle.claims("canary-buyer"), TOKEN_SECRET, algorithm="HS256").split(".")
    for secret in ("canary", TOKEN_SECRET, SANDBOX_SECRET, token[0]):
        assert secret not in log.replace("\n", "")
    assert len(log) < 40_000, "a fault is told in a traceback, not in a book"
