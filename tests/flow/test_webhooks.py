"""Webhooks end to end: signed, retried, bounded, logged, replayed; to a real HTTP server on this machine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import msgspec
import pytest
from standardwebhooks import Webhook

from holdfast.bootstrap import System
from holdfast.clock import US_PER_S, ManualClock, SystemClock
from holdfast.errors import InvalidInput
from holdfast.services.contracts import topology
from holdfast.services.contracts.events import OrderClosed
from holdfast.services.webhooks.model import (
    SCHEDULE_S,
    DeliveryView,
    EndpointChange,
    EndpointWithSecret,
    ForbiddenUrl,
    NewEndpoint,
    TooManyWebhooks,
    WebhookExists,
    WebhookNotFound,
)
from holdfast.settings import EventsSettings, Settings, WebhooksSettings
from holdfast.webhooks import verify
from tests.conftest import StartSystem, eventually
from tests.receiver import Receiver, answering, bytes_as_they_are, never, receiving
from tests.shop import in_time, order, rows, stock_up, two_systems

DAY_S = 86_400


def at_home(settings: Settings, **changed: Any) -> Settings:
    """Settings that let events be sent to this machine."""
    chosen: dict[str, Any] = {"allow_http": True, "allow_private": True, "timeout_ms": 3_000} | changed
    return msgspec.structs.replace(settings, webhooks=WebhooksSettings(**chosen))


@pytest.fixture
def home(settings: Settings) -> Settings:
    return at_home(settings)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver


async def happen(system: System, *order_ids: int) -> None:
    for order_id in order_ids:
        fact = OrderClosed(order_id=order_id, status="closed")
        await system.publisher.publish(topology.ORDER_EVENTS, topology.KEY_ORDER_CLOSED, fact)


async def add(system: System, receiver: Receiver, path: str = "/hook", *types: str) -> EndpointWithSecret:
    return await system.webhooks.add(NewEndpoint(url=receiver.url(path), types=types))


async def states(system: System, endpoint: EndpointWithSecret) -> list[tuple[str, int]]:
    """(status, attempts that have ended) of the deliveries to an endpoint, oldest first."""
    found = await rows(
        system,
        """SELECT d.status, (SELECT count(*) FROM webhook_attempt a WHERE a.delivery_id = d.id) AS ended
           FROM webhook_delivery d WHERE d.endpoint_id = :endpoint_id ORDER BY d.id""",
        endpoint_id=int(endpoint.id),
    )
    return [(each["status"], each["ended"]) for each in found]


async def deliveries(system: System, endpoint: EndpointWithSecret) -> list[DeliveryView]:
    return (await system.webhooks.deliveries(int(endpoint.id)))[::-1]


def reached(
    system: System, endpoint: EndpointWithSecret, wanted: Sequence[tuple[str, int]]
) -> Callable[[], Awaitable[bool]]:
    async def look() -> bool:
        return await states(system, endpoint) == list(wanted)

    return look


async def become(system: System, endpoint: EndpointWithSecret, *wanted: tuple[str, int]) -> None:
    await eventually(reached(system, endpoint, wanted), f"deliveries become {wanted}")


def a_clock() -> ManualClock:
    """A manual clock that starts now: the official library looks at the machine's own."""
    return ManualClock(SystemClock().now_us())


async def test_each_event_arrives_signed(start_system: StartSystem, home: Settings, receiver: Receiver) -> None:
    system = await start_system(home)
    every = await add(system, receiver, "/every")
    created = await add(system, receiver, "/created", "order.created")
    await stock_up(system, "SKU-1", 5)
    view = await order(system)
    await system.orders.cancel(int(view.id), "ann")
    await become(system, every, ("done", 1), ("done", 1))
    await become(system, created, ("done", 1))

    by_path = {path: [each for each in receiver.got if each.path == path] for path in ("/every", "/created")}
    assert [each.type for each in by_path["/created"]] == ["order.created"]
    assert {each.type for each in by_path["/every"]} == {"order.created", "order.closed"}
    events = {each.id: each for each in (await system.events.read()).events}
    for endpoint, path in ((every, "/every"), (created, "/created")):
        assert endpoint.secret.startswith("whsec_")
        for got in by_path[path]:
            assert got.method == "POST"
            assert set(got.body) == {"type", "timestamp", "data"}
            assert Webhook(endpoint.secret).verify(got.raw, got.headers) == got.body
            assert verify(endpoint.secret, got.headers, got.raw) == got.headers["webhook-id"]
            event = events[got.headers["webhook-id"].removeprefix("evt_")]
            assert (got.body["type"], got.body["timestamp"], got.body["data"]) == (
                event.type,
                event.timestamp,
                event.data,
            )
    assert every.secret != created.secret
    with pytest.raises(Exception, match="No matching signature"):
        Webhook(created.secret).verify(by_path["/every"][0].raw, by_path["/every"][0].headers)


async def test_a_failing_receiver_is_tried_for_three_days_and_then_given_up(
    start_system: StartSystem, home: Settings, receiver: Receiver
) -> None:
    clock = a_clock()
    system = await start_system(home, clock=clock)
    endpoint = await add(system, receiver)
    receiver.reply = answering(500, b"\xff\x00 out of order")
    await happen(system, 1)
    await in_time(clock, reached(system, endpoint, [("pending", 1)]), "the first attempt")
    for number, wait_s in enumerate(SCHEDULE_S, start=1):
        (waiting,) = await rows(system, "SELECT due_us FROM webhook_delivery")
        left_s = (waiting["due_us"] - clock.now_us()) / US_PER_S
        assert wait_s - 2 < left_s <= wait_s * 1.1 + 1
        clock.advance(max(0.0, left_s - 1))
        assert len(receiver.got) == number  # never early
        last = number == len(SCHEDULE_S)
        status = "failed" if last else "pending"
        await in_time(clock, reached(system, endpoint, [(status, number + 1)]), f"attempt {number + 1}", within_s=60)
    assert len(receiver.got) == len(SCHEDULE_S) + 1
    assert len({each.headers["webhook-id"] for each in receiver.got}) == 1
    assert len({each.raw for each in receiver.got}) == 1
    assert len({each.headers["webhook-timestamp"] for each in receiver.got}) == len(receiver.got)

    (failed,) = await deliveries(system, endpoint)
    log = await system.webhooks.delivery(int(endpoint.id), int(failed.id))
    assert [each.attempt for each in log.log] == list(range(1, len(SCHEDULE_S) + 2))
    assert {(each.status, each.error) for each in log.log} == {(500, None)}
    assert log.log[0].answer == "�� out of order"
    assert endpoint.secret not in repr(log)
    shown = await system.webhooks.get(int(endpoint.id))
    assert shown.enabled
    assert shown.failing_since is not None
    assert shown.flagged_at is None  # not five days yet

    clock.advance(2 * DAY_S)
    await happen(system, 2)
    await in_time(clock, reached(system, endpoint, [("failed", 10), ("pending", 1)]), "the next event is tried too")
    assert (await system.webhooks.get(int(endpoint.id))).flagged_at is not None
    receiver.reply = answering(204, b"")
    await in_time(clock, reached(system, endpoint, [("failed", 10), ("done", 2)]), "it recovers")
    shown = await system.webhooks.get(int(endpoint.id))
    assert (shown.failing_since, shown.flagged_at) == (None, None)

    # Everything that failed goes again, with the same id, from the beginning of the schedule.
    assert await system.webhooks.replay(int(endpoint.id), failed_since_us=0) == 1
    await in_time(clock, reached(system, endpoint, [("done", 11), ("done", 2)]), "the replay")
    assert receiver.got[-1].headers["webhook-id"] == receiver.got[0].headers["webhook-id"]


async def test_410_disables_the_endpoint_until_it_is_enabled(
    start_system: StartSystem, home: Settings, receiver: Receiver
) -> None:
    system = await start_system(home)
    endpoint = await add(system, receiver)
    receiver.reply = answering(410)
    await happen(system, 1)
    await become(system, endpoint, ("failed", 1))
    shown = await system.webhooks.get(int(endpoint.id))
    assert (shown.enabled, shown.disabled_reason) == (False, "it answered 410 Gone")
    await happen(system, 2)

    async def told() -> bool:
        return len((await system.events.read()).events) == 2

    await eventually(told, "the feed has the second event")
    assert await states(system, endpoint) == [("failed", 1)]  # it is not meant for a disabled one

    receiver.reply = answering(200)
    await system.webhooks.change(int(endpoint.id), EndpointChange(enabled=True))
    (failed,) = await deliveries(system, endpoint)
    assert await system.webhooks.replay(int(endpoint.id), delivery_id=int(failed.id)) == 1
    await happen(system, 3)
    await become(system, endpoint, ("done", 2), ("done", 1))


async def test_a_disabled_endpoint_goes_on_where_it_stopped(
    start_system: StartSystem, home: Settings, receiver: Receiver
) -> None:
    clock = a_clock()
    system = await start_system(home, clock=clock)
    endpoint = await add(system, receiver)
    receiver.reply = answering(503)
    await happen(system, 1)
    await in_time(clock, reached(system, endpoint, [("pending", 1)]), "the first attempt")
    await system.webhooks.change(int(endpoint.id), EndpointChange(enabled=False))
    clock.advance(60)
    assert await system.webhooks.sweep(0) == 0
    receiver.reply = answering(200)
    await system.webhooks.change(int(endpoint.id), EndpointChange(enabled=True))
    await in_time(clock, reached(system, endpoint, [("done", 2)]), "it goes on")


@pytest.mark.parametrize(
    ("reply", "status", "error"),
    [
        (answering(302, b"", "location: http://127.0.0.1:1/elsewhere"), 302, None),
        (bytes_as_they_are(b""), None, "RemoteProtocolError"),
        (bytes_as_they_are(b"SSH-2.0-OpenSSH\r\n"), None, "RemoteProtocolError"),
        (bytes_as_they_are(b"HTTP/1.1 500 No\r\ncontent-length: 999\r\n\r\nshort"), 500, None),
        (bytes_as_they_are(b"HTTP/1.1 500 No\r\nx: " + b"y" * 300_000), None, "RemoteProtocolError"),
    ],
    ids=["redirect", "silence", "another protocol", "a lying length", "endless headers"],
)
async def test_what_is_no_success_is_tried_again(
    start_system: StartSystem, home: Settings, receiver: Receiver, reply: Any, status: int | None, error: str | None
) -> None:
    system = await start_system(home)
    endpoint = await add(system, receiver)
    receiver.reply = reply
    await happen(system, 1)
    await become(system, endpoint, ("pending", 1))
    (one,) = await deliveries(system, endpoint)
    assert one.last_status == status
    assert (one.last_error or "").startswith(error or "")
    assert (one.last_error is None) == (error is None)
    assert one.next_at is not None
    assert [each.path for each in receiver.got] == ["/hook"]


async def test_an_accepted_event_is_done_however_its_answer_ends(
    start_system: StartSystem, settings: Settings, receiver: Receiver
) -> None:
    system = await start_system(at_home(settings, timeout_ms=500))
    endpoint = await add(system, receiver)
    stop = asyncio.Event()

    async def drips(_: Any, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n" + b"x" * 10)
        await writer.drain()
        await stop.wait()

    async def floods(_: Any, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 50000000\r\n\r\n")
        for _number in range(500):
            writer.write(b"y" * 100_000)
            await writer.drain()

    receiver.reply = drips
    await happen(system, 1)
    await become(system, endpoint, ("done", 1))
    stop.set()
    receiver.reply = floods
    await happen(system, 2)
    await become(system, endpoint, ("done", 1), ("done", 1))
    first, second = await deliveries(system, endpoint)
    dripped = await system.webhooks.delivery(int(endpoint.id), int(first.id))
    assert (dripped.log[0].status, dripped.log[0].error) == (200, None)
    flooded = await system.webhooks.delivery(int(endpoint.id), int(second.id))
    assert flooded.log[0].answer == "y" * 1_000


async def test_a_receiver_that_asks_for_time_gets_it(
    start_system: StartSystem, home: Settings, receiver: Receiver
) -> None:
    clock = a_clock()
    system = await start_system(home, clock=clock)
    endpoint = await add(system, receiver)
    receiver.reply = answering(429, b"", "Retry-After: 120")
    await happen(system, 1)
    await in_time(clock, reached(system, endpoint, [("pending", 1)]), "the first attempt")
    (row,) = await rows(system, "SELECT due_us, at_us FROM webhook_delivery JOIN webhook_attempt ON delivery_id = id")
    assert row["due_us"] - row["at_us"] == 120 * US_PER_S


async def test_a_slow_endpoint_holds_up_nobody_and_gets_few_at_once(
    start_system: StartSystem, settings: Settings, receiver: Receiver
) -> None:
    system = await start_system(at_home(settings, timeout_ms=20_000, at_once=3))
    async with receiving() as other:
        slow, quick = await add(system, receiver), await add(system, other)
        stop = asyncio.Event()
        receiver.reply = never(stop)
        await happen(system, *range(1, 31))
        await become(system, quick, *[("done", 1)] * 30)

        async def busy() -> bool:
            return receiver.open == 3

        await eventually(busy, "the slow one has all that it may have")
        assert {status for status, _ in await states(system, slow)} == {"pending"}
        stop.set()
        await become(system, slow, *[("done", 1)] * 30)
        assert receiver.open_max == 3
        assert 1 <= other.open_max <= 3


async def test_a_time_out_is_a_failure(start_system: StartSystem, settings: Settings, receiver: Receiver) -> None:
    system = await start_system(at_home(settings, timeout_ms=200))
    endpoint = await add(system, receiver)
    stop = asyncio.Event()
    receiver.reply = never(stop)
    await happen(system, 1)
    await become(system, endpoint, ("pending", 1))
    (one,) = await deliveries(system, endpoint)
    stop.set()
    assert (one.last_status, one.last_error) == (None, "no answer within 0.2 s")


async def test_what_a_dead_process_had_under_way_is_sent_by_another(
    start_system: StartSystem, home: Settings, receiver: Receiver
) -> None:
    clock = a_clock()
    system = await start_system(home, work=False, clock=clock)
    endpoint = await add(system, receiver)
    await happen(system, 1)
    listen = next(each for each in system.listens if each.name == "feed.events")
    system.listen(listen)
    await become(system, endpoint, ("pending", 0))
    hooks: Any = system.webhooks._webhooks
    (job,) = [await system.group.submit(hooks.claim, int(endpoint.id))]  # and dies
    assert job is not None
    assert await system.webhooks.sweep(0) == 0  # as long as it may be alive
    clock.advance(60)
    assert await system.webhooks.sweep(0) == 1
    await become(system, endpoint, ("done", 1))
    assert [each.attempts for each in await deliveries(system, endpoint)] == [2]


async def test_a_rotation_leaves_no_gap(start_system: StartSystem, home: Settings, receiver: Receiver) -> None:
    clock = a_clock()
    system = await start_system(home, clock=clock)
    first = await add(system, receiver)
    second = await system.webhooks.rotate(int(first.id))
    assert second.secret != first.secret
    assert second.previous_secret_until is not None
    await happen(system, 1)
    await in_time(clock, reached(system, first, [("done", 1)]), "sent")
    got = receiver.got[0]
    assert len(got.headers["webhook-signature"].split(" ")) == 2
    for secret in (first.secret, second.secret):
        assert Webhook(secret).verify(got.raw, got.headers) == got.body
        verify(secret, got.headers, got.raw)

    clock.advance(DAY_S + 1)
    await happen(system, 2)
    await in_time(clock, reached(system, first, [("done", 1), ("done", 1)]), "sent")
    late = receiver.got[1]
    verify(second.secret, late.headers, late.raw, clock=clock)
    with pytest.raises(InvalidInput):
        verify(first.secret, late.headers, late.raw, clock=clock)


async def test_secrets_stand_in_no_answer_and_no_log(
    start_system: StartSystem, home: Settings, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    system = await start_system(home)
    endpoint = await add(system, receiver)
    receiver.reply = answering(410)
    await happen(system, 1)
    await become(system, endpoint, ("failed", 1))
    changed = await system.webhooks.change(int(endpoint.id), EndpointChange(description="the till"))
    told = [*await system.webhooks.every(), changed, *await deliveries(system, endpoint)]
    secret = endpoint.secret.removeprefix("whsec_")
    assert secret not in msgspec.json.encode(told).decode() + repr(told) + caplog.text


async def test_an_event_is_delivered_once_to_each_endpoint_by_two_processes(
    start_system: StartSystem, home: Settings, receiver: Receiver
) -> None:
    systems = await two_systems(start_system, home)
    one, two = await add(systems[0], receiver, "/one"), await add(systems[-1], receiver, "/two")
    await asyncio.gather(*(happen(systems[number % len(systems)], number + 1) for number in range(40)))
    for endpoint in (one, two):
        await become(systems[0], endpoint, *[("done", 1)] * 40)
    sent = [(each.path, each.headers["webhook-id"]) for each in receiver.got]
    assert len(sent) == len(set(sent)) == 80


async def test_endpoints_are_kept_in_bounds(start_system: StartSystem, settings: Settings, receiver: Receiver) -> None:
    system = await start_system(at_home(settings, endpoints_max=2), work=False)
    one, two = await add(system, receiver, "/1"), await add(system, receiver, "/2")
    with pytest.raises(WebhookExists):
        await add(system, receiver, "/1")
    with pytest.raises(TooManyWebhooks):
        await add(system, receiver, "/3")
    with pytest.raises(WebhookExists):
        await system.webhooks.change(int(one.id), EndpointChange(url=two.url))
    with pytest.raises(InvalidInput):
        await system.webhooks.change(int(one.id), EndpointChange(types=("order.due",)))
    with pytest.raises(ForbiddenUrl):
        await system.webhooks.change(int(one.id), EndpointChange(url="ftp://127.0.0.1/"))
    with pytest.raises(ForbiddenUrl):
        await add(system, receiver, "/with#fragment")
    changed = await system.webhooks.change(int(one.id), EndpointChange(types=("order.paid",), description="x"))
    assert (changed.types, changed.description, changed.url) == (("order.paid",), "x", one.url)
    for unknown in (
        system.webhooks.get(1),
        system.webhooks.rotate(1),
        system.webhooks.remove(1),
        system.webhooks.change(1, EndpointChange(enabled=False)),
        system.webhooks.replay(1, failed_since_us=0),
        system.webhooks.deliveries(1),
        system.webhooks.delivery(int(one.id), 1),
        system.webhooks.replay(int(one.id), delivery_id=1),
    ):
        with pytest.raises(WebhookNotFound):
            await unknown
    with pytest.raises(InvalidInput):
        await system.webhooks.replay(int(one.id))


async def test_a_removed_endpoint_gets_nothing_more_and_old_deliveries_go(
    start_system: StartSystem, home: Settings, receiver: Receiver
) -> None:
    clock = a_clock()
    kept = msgspec.structs.replace(home, events=EventsSettings(keep_days=2))
    system = await start_system(kept, clock=clock)
    gone, stays = await add(system, receiver, "/gone"), await add(system, receiver, "/stays")
    receiver.reply = answering(500)
    await happen(system, 1)
    for endpoint in (gone, stays):
        await in_time(clock, reached(system, endpoint, [("pending", 1)]), "the first attempt")
    await system.webhooks.remove(int(gone.id))
    found = await rows(system, "SELECT endpoint_id, status FROM webhook_delivery")
    assert {(str(each["endpoint_id"]), each["status"]) for each in found} == {
        (gone.id, "cancelled"),
        (stays.id, "pending"),
    }
    # What still has to be sent is not forgotten, however old it is: not the delivery, and with it what it says.
    await system.webhooks.change(int(stays.id), EndpointChange(enabled=False))
    clock.advance(3 * DAY_S)
    await system.events.sweep()
    await system.webhooks.clear()
    assert (await system.events.read()).events == []
    found = await rows(system, "SELECT endpoint_id, status FROM webhook_delivery")
    assert [str(each["endpoint_id"]) for each in found] == [stays.id]
    assert {each["delivery_id"] for each in await rows(system, "SELECT delivery_id FROM webhook_attempt")} == {
        int((await deliveries(system, stays))[0].id)
    }
    receiver.reply = answering(200)
    await system.webhooks.change(int(stays.id), EndpointChange(enabled=True))
    await in_time(clock, reached(system, stays, [("done", 2)]), "it is sent at last")
    assert receiver.got[-1].type == "order.closed"
    assert {each.path for each in receiver.got[2:]} == {"/stays"}
