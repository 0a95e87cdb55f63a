"""Ten units and forty buyers at once: ten get one, thirty are told that it is sold out, whichever process they ask."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack

import pytest

from benchmarks.buyers import order_body
from benchmarks.loadgen import Response
from tests.faults.book import rows
from tests.faults.conftest import Scenario, Shops, Times
from tests.faults.crowd import Client, History, Wish, code_of, connected, place, stock_up
from tests.faults.processes import Place, Shop

pytestmark = pytest.mark.torture

UNITS = 10
BUYERS = 40
AT_ONCE = 20
UNHURRIED_MS = "600000"  # no order of a race times out


async def test_ten_units_two_processes(postgres_url: str, shops: Shops, scenario: Scenario, times: Times) -> None:
    shop = shops.open(postgres_url, ORDERS__TIME_OUT_MS=UNHURRIED_MS)
    await race(shop, [shop.server(), shop.server()], times(3, 50), scenario)


async def test_ten_units_one_process_on_sqlite(sqlite_url: str, shops: Shops, scenario: Scenario, times: Times) -> None:
    shop = shops.open(sqlite_url, ORDERS__TIME_OUT_MS=UNHURRIED_MS)
    await race(shop, [shop.server()], times(3, 50), scenario)


async def test_one_key_at_two_processes(postgres_url: str, shops: Shops, scenario: Scenario, times: Times) -> None:
    """Ten buyers for ten units, each asks two processes at once with one key: both give the same order.

    It is what a client does whose first request got no answer in time: "sold out" would be a lie about its own order.
    """
    shop = shops.open(postgres_url, ORDERS__TIME_OUT_MS=UNHURRIED_MS)
    servers = [shop.server(), shop.server()]
    history, found = History(), list[str]()
    await shop.migrate()
    await asyncio.gather(*(server.start() for server in servers))
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connected(each.port, history, UNITS)) for each in servers]
        for number in range(times(5, 50)):
            found += await one_key_round(clients, history, f"SKU-{number:02}")
    scenario.judge(times(5, 50), history, found + await not_clean(shop) + shop.complaints())


async def race(shop: Shop, servers: Sequence[Place], rounds: int, scenario: Scenario) -> None:
    history, found = History(), list[str]()
    await shop.migrate()
    await asyncio.gather(*(server.start() for server in servers))
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connected(each.port, history, AT_ONCE)) for each in servers]
        for number in range(rounds):
            found += await race_round(clients, history, f"SKU-{number:02}")
    sold = {
        row["sku"]: row["units"]
        for row in await rows(shop.url, "SELECT sku, sum(quantity) AS units FROM order_line GROUP BY sku")
    }
    found += [f"of {sku} {units} units are in orders" for sku, units in sold.items() if units != UNITS]
    scenario.judge(rounds, history, found + await not_clean(shop) + shop.complaints())


async def race_round(clients: Sequence[Client], history: History, sku: str) -> list[str]:
    """Forty buyers, twenty at once, the servers in turn; what is wrong with the outcome."""
    await stock_up(clients[0], {sku: UNITS})
    wishes = zip(_wishes(sku, BUYERS), itertools.cycle(clients), strict=False)
    answers: list[str] = []

    async def lane() -> None:
        for wish, client in wishes:
            answer = await place(client, wish)
            answers.append(_told(answer))
            if answer is not None and answer.status == 201:
                history.placed[wish.key] = answer.body

    await asyncio.gather(*(lane() for _ in range(AT_ONCE)))
    counted = Counter(answers)
    wanted = Counter({"201": UNITS, "409 sold_out": BUYERS - UNITS})
    return [] if counted == wanted else [f"{sku}: {dict(counted)}"]


async def one_key_round(clients: Sequence[Client], history: History, sku: str) -> list[str]:
    """Each wish goes to all servers at the same time; what is wrong with the answers."""
    await stock_up(clients[0], {sku: UNITS})
    wishes = _wishes(sku, UNITS)
    asked = [place(client, wish) for wish in wishes for client in clients]
    answers = await asyncio.gather(*asked)
    found = []
    for index, wish in enumerate(wishes):
        pair = answers[index * len(clients) : (index + 1) * len(clients)]
        if {_told(answer) for answer in pair} != {"201"}:
            found.append(f"{sku}, {wish.key}: one key, and the answers are {[_told(answer) for answer in pair]}")
        elif len({answer.body for answer in pair if answer is not None}) > 1:
            found.append(f"{sku}, {wish.key}: one key, and two different orders")
        history.placed.update((wish.key, answer.body) for answer in pair if answer is not None and answer.status == 201)
    return found


async def not_clean(shop: Shop) -> list[str]:
    code, verdict = await shop.verify()
    return [] if code == 0 and verdict.clean else [f"verify ended with {code}: {verdict.findings}"]


def _wishes(sku: str, count: int) -> list[Wish]:
    return [Wish(f"buyer-{number}", f"{sku}-{number}", order_body(sku)) for number in range(count)]


def _told(answer: Response | None) -> str:
    if answer is None:
        return "no answer"
    return f"{answer.status} {code_of(answer)}".strip() if answer.status != 201 else "201"
