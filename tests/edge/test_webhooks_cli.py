"""`holdfast webhooks`: what an operator sees and changes, on both databases, and what is refused."""

from __future__ import annotations

import asyncio

import pytest

from holdfast.bootstrap import System, migrate_all, running
from holdfast.services.contracts.events import OrderClosed
from holdfast.services.feed.actions import Feed, Told
from holdfast.services.webhooks.model import NewEndpoint
from holdfast.settings import Settings
from tests.edge.desk import Desk, misused, ok, refused
from tests.flow.test_webhooks import at_home, become, states
from tests.receiver import answering, receiving

URL = "http://127.0.0.1:9/hook"


@pytest.fixture
def desk(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.setenv("HOLDFAST_WEBHOOKS__ALLOW_HTTP", "true")
    monkeypatch.setenv("HOLDFAST_WEBHOOKS__ALLOW_PRIVATE", "true")
    asyncio.run(migrate_all(settings))
    return Desk(settings, monkeypatch)


def test_an_operator_adds_rotates_and_removes(desk: Desk) -> None:
    made = ok(desk.run("webhooks", "add", URL, "--type", "order.paid", "--description", "the till", "--json")).json
    assert made["secret"].startswith("whsec_")
    shown = {name: value for name, value in made.items() if name != "secret"}
    assert ok(desk.run("webhooks", "list", "--json")).json == [shown]
    assert URL in ok(desk.run("webhooks", "list")).out
    assert made["secret"] not in desk.run("webhooks", "list").out

    rotated = ok(desk.run("webhooks", "rotate", made["id"])).out
    assert "secret: whsec_" in rotated
    assert made["secret"] not in rotated
    assert "the former secret signs too until" in rotated
    assert ok(desk.run("webhooks", "deliveries", made["id"], "--json")).json == []
    assert ok(desk.run("webhooks", "remove", made["id"])).out == f"removed {made['id']}\n"
    assert ok(desk.run("webhooks", "list", "--json")).json == []


def test_an_operator_looks_at_deliveries_and_sends_again(desk: Desk) -> None:
    settings = at_home(desk.settings)

    class Nobody:
        async def buyers(self, *_: object) -> dict[int, str]:
            return {}

    async def fail() -> str:
        async with receiving() as receiver, running(settings) as system:
            receiver.reply = answering(410, b"no \x1b[31mmore")
            endpoint = await system.webhooks.add(NewEndpoint(url=receiver.url()))
            system.work()
            await happen(system)
            await become(system, endpoint, ("failed", 1))
            return endpoint.id

    async def happen(system: System) -> None:
        hooks = system.webhooks._webhooks
        feed = Feed(system.clock, Nobody(), hooks)
        async with system.database.transaction() as tx:
            await feed.record(tx, [Told(fact=OrderClosed(order_id=1, status="closed"), at_us=system.clock.now_us())])

    webhook = asyncio.run(fail())
    (failed,) = ok(desk.run("webhooks", "deliveries", webhook, "--status", "failed", "--json")).json
    assert (failed["lastStatus"], failed["attempts"]) == (410, 1)
    assert "failed" in ok(desk.run("webhooks", "deliveries", webhook, "--limit", 1)).out
    log = ok(desk.run("webhooks", "deliveries", webhook, "--delivery", failed["id"])).out
    assert "410 no \\x1b[31mmore" in log
    told = ok(desk.run("webhooks", "deliveries", webhook, "--delivery", failed["id"], "--json")).json
    assert [each["attempt"] for each in told["log"]] == [1]
    assert ok(desk.run("webhooks", "replay", webhook, "--delivery", failed["id"])).out == "replayed 1\n"
    again = ok(desk.run("webhooks", "replay", webhook, "--failed-since", "2020-01-01T00:00:00Z", "--json")).json
    assert again == {"replayed": 0}  # it is on its way

    async def look() -> list[tuple[str, int]]:
        async with running(settings) as system:
            (endpoint,) = await system.webhooks.every()
            return await states(system, endpoint)  # type: ignore[arg-type]

    assert asyncio.run(look()) == [("pending", 1)]


def test_what_is_wrong_is_said_in_a_sentence(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    made = ok(desk.run("webhooks", "add", URL, "--json")).json
    refused(desk.run("webhooks", "add", URL), "this URL already")
    refused(desk.run("webhooks", "add", "ftp://x"), "https://")
    refused(desk.run("webhooks", "add", URL + "2", "--type", "order.due"), "order.due")
    refused(desk.run("webhooks", "add", URL + "2", "--description", "x" * 201), "no webhook")
    for command in ("rotate", "remove", "deliveries"):
        refused(desk.run("webhooks", command, 7), "no such webhook")
        misused(desk.run("webhooks", command, "x"))
    refused(desk.run("webhooks", "replay", made["id"]), "one delivery")
    refused(desk.run("webhooks", "replay", made["id"], "--failed-since", "yesterday"), "--failed-since")
    refused(desk.run("webhooks", "deliveries", made["id"], "--delivery", 7), "no such webhook")
    refused(desk.run("webhooks", "deliveries", made["id"], "--status", "lost"), "pending")
    monkeypatch.delenv("HOLDFAST_WEBHOOKS__ALLOW_PRIVATE")
    refused(desk.run("webhooks", "add", "https://127.0.0.1/"), "not public")
