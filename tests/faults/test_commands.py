"""The command line against real databases: who is refused, what runs beside what, and what a broken book looks like."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest

from holdfast.bootstrap import running
from tests import shop as shelves
from tests.conftest import quick_settings
from tests.faults.book import change
from tests.faults.conftest import Scenario, Shops, Times
from tests.faults.crowd import BUYERS_AT_ONCE, SHELVES, Crowd, History, connected, stock_up
from tests.faults.processes import Ended, Place, Shop, Verdict

CANNOT = 2
FINDINGS = 1


def refused(ended: Ended, *words: str) -> None:
    """It ended with status 2 and one sentence with these words, and without a traceback."""
    assert ended.code == CANNOT, ended
    assert ended.err.startswith("error: "), ended
    assert ended.err.count("\n") == 1, ended
    assert ended.out == ""
    for word in words:
        assert word in ended.err, ended


@asynccontextmanager
async def serving(shop: Shop) -> AsyncIterator[Place]:
    """A migrated and running shop, stopped in good order."""
    await shop.migrate()
    server = shop.server()
    await server.start()
    yield server
    ended = await server.stop()
    assert (ended.code, ended.err) == (0, "")


async def test_a_second_writer_on_one_sqlite_file_is_refused(sqlite_url: str, shops: Shops) -> None:
    """Until the first is gone: also after `kill -9`, with the write-ahead log still there, `serve` starts again."""
    shop = shops.open(sqlite_url)
    async with serving(shop) as server:
        for ended in await asyncio.gather(shop.run("serve", "--port", "0"), shop.run("work")):
            refused(ended, f"process {server.process.pid} writes", "stop that one, or move to PostgreSQL")
        server.kill()
        (code, verdict), _ = await asyncio.gather(shop.verify(), server.start())
        assert (code, verdict.clean) == (0, True)


@pytest.mark.torture
async def test_verify_while_serving(database_url: str, shops: Shops, scenario: Scenario, times: Times) -> None:
    """It reads one instant of a database that changes all the time, and neither disturbs the other.

    The default slack, since under load messages are under way all the time; most checks know no slack anyway.
    """
    shop = shops.open(database_url)
    history, found = History(), list[str]()
    async with serving(shop) as server, connected(server.port, history) as client:
        await stock_up(client, SHELVES)
        crowd = Crowd(client, history, scenario.seed)
        async with crowd.buying():
            for _ in range(times(1, 20)):
                await crowd.progress(BUYERS_AT_ONCE)
                ended = await shop.run("verify", "--json")
                verdict = msgspec.json.decode(ended.out, type=Verdict)
                found += [f"verify ended with {ended.code}: {finding}" for finding in verdict.findings]
                assert (ended.code, ended.err) == (FINDINGS if verdict.findings else 0, "")
            await crowd.progress(BUYERS_AT_ONCE)
    found += [f"a request got no answer: {kind} {count} times" for kind, count in history.cut.items()]
    scenario.judge(times(1, 20), history, found + history.surprises)


async def test_migrate_from_two_processes_at_once(postgres_url: str, shops: Shops) -> None:
    shop = shops.open(postgres_url)
    both = await asyncio.gather(*(shop.run("migrate") for _ in range(2)))
    assert [(ended.code, ended.err) for ended in both] == [(0, ""), (0, "")]
    # One did it all, the other found nothing to do.
    assert sorted(ended.out.count("empty ->") for ended in both) == [0, 2]
    assert sorted(ended.out.count("nothing to do") for ended in both) == [0, 2]


async def test_before_migrate(database_url: str, shops: Shops) -> None:
    """Without a file on SQLite too, which `verify` does not create and `serve` does."""
    shop = shops.open(database_url)
    refused(await shop.run("verify"), "run `holdfast migrate`")
    refused(await shop.run("serve", "--port", "0"), "run `holdfast migrate`")


async def test_two_servers_start_at_once(postgres_url: str, shops: Shops) -> None:
    """Both declare all exchanges and queues at the same time; a third finds its port taken."""
    shop = shops.open(postgres_url)
    await shop.migrate()
    servers = [shop.server(), shop.server()]
    await asyncio.gather(*(server.start() for server in servers))
    taken = str(servers[0].port)
    refused(await shop.run("serve", "--port", taken), f"cannot listen on 127.0.0.1:{taken}")
    stopped = await asyncio.gather(*(server.stop() for server in servers))
    assert [(ended.code, ended.err) for ended in stopped] == [(0, ""), (0, "")]


async def test_verify_on_a_corrupted_database(database_url: str, shops: Shops) -> None:
    """It exits with 1 and shows the row, for people and as JSON."""
    shop = shops.open(database_url)
    await shop.migrate()
    async with running(quick_settings(database_url)) as system:
        await shelves.stock_up(system, "SKU-1", 2)
        wrong, right = [await shelves.order(system, buyer) for buyer in ("ann", "bob")]
    await change(shop.url, f"UPDATE order_order SET amount_minor = amount_minor + 1 WHERE id = {wrong.id}")
    shown, as_json = await asyncio.gather(shop.run("verify"), shop.run("verify", "--json"))
    assert (shown.code, shown.err, as_json.code, as_json.err) == (FINDINGS, "", FINDINGS, "")
    assert (
        f"VIOLATED orders.amount: each order's amount is the sum of its lines (1 rows)\n  order_id={wrong.id}, "
        in shown.out
    )
    verdict = msgspec.json.decode(as_json.out, type=Verdict)
    assert not verdict.clean
    assert {finding.name for finding in verdict.findings} == {"orders.amount", "money.payment_order"}
    assert [[row["order_id"] for row in finding.rows] for finding in verdict.findings] == [[int(wrong.id)]] * 2
    assert right.id not in shown.out + as_json.out
