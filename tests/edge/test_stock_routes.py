"""Warehouses, adjustments and counts as staff sees them: what is answered, what is booked, and what is refused."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from tests.edge.counter import Counter, refused
from tests.shop import clean, count, level_becomes, rows, stock_up

on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)

ADJUSTMENTS, COUNTS = "/v1/stocks/adjustments", "/v1/stocks/counts"


async def level_of(counter: Counter, sku: str = "SKU-1", warehouse: str = "main") -> httpx.Response:
    return await counter.ask("GET", f"/v1/levels/{sku}/{warehouse}", counter.staff())


async def adjust(
    counter: Counter, delta: int, tag: str | None, *, key: str = "adjust-1", **more: Any
) -> httpx.Response:
    headers = counter.staff() | {"idempotency-key": key} | ({} if tag is None else {"if-match": tag})
    body = {"sku": "SKU-1", "delta": delta, "reason": "water damage"} | more
    return await counter.ask("POST", ADJUSTMENTS, headers, body=body)


async def counted(counter: Counter, units: int, tag: str | None = None, *, key: str = "c-1", **more: Any) -> Any:
    headers = counter.staff() | {"idempotency-key": key} | ({} if tag is None else {"if-match": tag})
    return await counter.ask("POST", COUNTS, headers, body={"sku": "SKU-1", "counted": units} | more)


async def test_a_level_has_a_tag_that_every_change_changes(idle: Counter) -> None:
    tags = []
    for step in range(4):
        answer = await level_of(idle)
        body = answer.json()
        assert (answer.status_code, answer.headers["etag"]) == (200, f'"{body["version"]}"')
        listed = (await idle.ask("GET", "/v1/stocks", idle.staff())).json()
        assert body in listed
        tags.append(answer.headers["etag"])
        if step == 0:
            assert (await idle.place("ann", quantity=2)).status_code == 201
        elif step == 1:
            assert (await adjust(idle, -1, tags[-1])).status_code == 201
        elif step == 2:
            await stock_up(idle.system, "SKU-1", 1)
    assert len(set(tags)) == 4
    refused(await level_of(idle, "SKU-1", "moon"), 404, "level_not_found")
    refused(await level_of(idle, "SKU 1"), 400, "invalid_input")
    refused(await level_of(idle, "SKU-1", "a b"), 400, "invalid_input")


async def test_an_adjustment_is_booked_once_and_answers_the_level(idle: Counter) -> None:
    await stock_up(idle.system, "SKU-1", 3, "east")
    tag = (await level_of(idle)).headers["etag"]
    first = await adjust(idle, -3, tag)
    assert first.status_code == 201
    body = first.json()
    assert (body["available"], body["held"], body["sold"], body["total"]) == (37, 0, 0, 37)
    assert first.headers["etag"] == f'"{body["version"]}"' != tag
    for again in (tag, first.headers["etag"], '"0"', "*"):  # a repeated request is the same one, whatever changed since
        answer = await adjust(idle, -3, again)
        assert (answer.status_code, answer.json()) == (201, body)
    assert await rows(idle.system, "SELECT available_delta, actor, reason FROM stock_ledger WHERE kind = 'adjust'") == [
        {"available_delta": -3, "actor": "boss", "reason": "water damage"}
    ]
    async with idle.unchanged():
        for other in ({"warehouse": "east"}, {"reason": "theft"}, {"sku": "SKU-2"}):
            answer = await adjust(idle, -3, "*", **other)
            refused(answer, 422, "idempotency_key_reused")
        refused(await adjust(idle, -4, "*"), 422, "idempotency_key_reused")
    await clean(idle.system)


async def test_an_adjustment_of_another_level_than_was_seen_is_refused(idle: Counter) -> None:
    seen = (await level_of(idle)).headers["etag"]
    refused(await adjust(idle, -3, None), 428, "precondition_required")
    assert (await idle.place("ann")).status_code == 201
    async with idle.unchanged():
        for tag in (seen, f"W/{(await level_of(idle)).headers['etag']}", '"x", "y"', '""'):
            assert "read it" in refused(await adjust(idle, -3, tag), 412, "precondition_failed")
        for tag in ("7", '"7', "", ",", '"7",', '"7" "8"', '* , "7"'):
            refused(await adjust(idle, -3, tag), 400, "invalid_input")
        refused(await adjust(idle, -3, "*", warehouse="moon"), 404, "level_not_found")
        refused(await adjust(idle, -3, "*", sku="SKU-9"), 404, "level_not_found")
        refused(await adjust(idle, 0, "*"), 400, "invalid_input")
    now = (await level_of(idle)).headers["etag"]
    assert (await adjust(idle, -3, f'"x",{now}')).status_code == 201
    await clean(idle.system)


async def test_of_many_who_saw_the_same_level_one_adjusts_it(idle: Counter) -> None:
    tag = (await level_of(idle)).headers["etag"]
    answers = await asyncio.gather(*(adjust(idle, -5, tag, key=f"by-{number}") for number in range(8)))
    assert sorted(each.status_code for each in answers) == [201] + [412] * 7
    assert (await level_of(idle)).json()["available"] == 35
    await clean(idle.system)


async def test_what_is_held_cannot_be_taken_away(idle: Counter) -> None:
    assert (await idle.place("ann", quantity=30)).status_code == 201
    async with idle.unchanged():
        assert "10 units are available and 30 held" in refused(await adjust(idle, -11, "*"), 409, "too_few_units")
        assert "30 are held" in refused(await counted(idle, 29), 409, "too_few_units")
    assert (await adjust(idle, -10, "*")).json()["available"] == 0
    assert (await counted(idle, 30)).json() | {"version": 0} == {
        **{"sku": "SKU-1", "warehouse": "main", "version": 0},
        **{"available": 0, "held": 30, "sold": 0, "total": 30},
    }
    await clean(idle.system)


async def test_a_count_books_the_difference_once(counter: Counter) -> None:
    assert (await counter.place("ann", quantity=4)).status_code == 201
    await level_becomes(counter.system, held=4)
    first = await counted(counter, 38, reason="yearly")
    assert (first.status_code, first.json()["available"], first.json()["held"]) == (201, 34, 4)
    assert (await counted(counter, 38, reason="yearly")).json() == first.json()
    refused(await counted(counter, 37, reason="yearly"), 422, "idempotency_key_reused")
    refused(await counted(counter, 38), 422, "idempotency_key_reused")
    same = await counted(counter, 38, first.headers["etag"], key="c-2")
    assert (same.status_code, same.json()["available"]) == (201, 34)  # no difference is told too
    refused(await counted(counter, 50, first.headers["etag"], key="c-3"), 412, "precondition_failed")
    more = await counted(counter, 44, key="c-3")
    assert more.json()["available"] == 40
    booked = "SELECT available_delta, counted, reason FROM stock_ledger WHERE kind = 'count' ORDER BY id"
    assert await rows(counter.system, booked) == [
        {"available_delta": -2, "counted": 38, "reason": "yearly"},
        {"available_delta": 0, "counted": 38, "reason": None},
        {"available_delta": 6, "counted": 44, "reason": None},
    ]
    await clean(counter.system)


async def test_the_first_count_of_a_sku_makes_its_level(idle: Counter) -> None:
    refused(await counted(idle, 7, '"0"', sku="SKU-BARE", warehouse="north"), 412, "precondition_failed")
    refused(await counted(idle, 7, sku="SKU-9"), 404, "sku_not_found")
    assert await count(idle.system, "SELECT code FROM stock_warehouse WHERE code = 'north'") == 0
    answer = await counted(idle, 7, sku="SKU-BARE", warehouse="north")
    assert (answer.status_code, answer.json()["available"], answer.json()["total"]) == (201, 7, 7)
    assert (await idle.ask("GET", "/v1/stocks/SKU-BARE")).json() == {"sku": "SKU-BARE", "available": 7}
    await clean(idle.system)


async def test_the_warehouse_with_the_lowest_priority_is_drawn_upon_first(idle: Counter) -> None:
    await stock_up(idle.system, "SKU-1", 10, "zenith")
    for code, priority in (("zenith", 5), ("main", 50), ("empty", 0)):
        answer = await idle.ask("PUT", f"/v1/warehouses/{code}", idle.staff(), body={"priority": priority})
        assert (answer.status_code, answer.json()) == (200, {"code": code, "priority": priority})
    listed = (await idle.ask("GET", "/v1/warehouses", idle.staff())).json()
    assert [each["code"] for each in listed] == ["empty", "zenith", "main"]
    assert (await idle.place("ann", quantity=12)).status_code == 201
    assert (await level_of(idle, "SKU-1", "zenith")).json()["held"] == 10
    assert (await level_of(idle)).json()["held"] == 2
    await idle.ask("PUT", "/v1/warehouses/main", idle.staff(), body={"priority": 1})
    assert (await idle.place("bob", quantity=1)).status_code == 201
    assert (await level_of(idle)).json()["held"] == 3
    await clean(idle.system)


@on_sqlite
async def test_skus_may_be_called_like_the_paths_beside_them(idle: Counter) -> None:
    for name in ("receipts", "adjustments", "counts"):
        await stock_up(idle.system, name, 3)
        assert (await idle.ask("GET", f"/v1/stocks/{name}")).json() == {"sku": name, "available": 3}
        methods = await idle.ask("OPTIONS", f"/v1/stocks/{name}")
        assert (methods.status_code, methods.headers["allow"]) == (204, "GET, OPTIONS, POST")
        assert (await level_of(idle, name)).json()["available"] == 3
