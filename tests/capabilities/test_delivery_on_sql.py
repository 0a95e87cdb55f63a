"""Capabilities of sending and handling (section 4 of the spec), one test per row; on SQLite and PostgreSQL."""

from __future__ import annotations

import asyncio
import random
from itertools import pairwise

import msgspec
import pytest

from holdfast.clock import US_PER_MS
from holdfast.errors import InvalidInput, NoSuchExchange, PublishError, PublishRejected, Unroutable
from holdfast.messaging.draft import Draft
from holdfast.messaging.injection import Incoming
from holdfast.messaging.listen import Listen
from holdfast.messaging.publisher import Publisher
from holdfast.messaging.recover import Discard, Recoverer, Republish, Requeue, error_topology
from holdfast.messaging.retry import RetryPolicy
from holdfast.messaging.topology import Binding, Exchange, Queue, Topology
from holdfast.settings import Settings
from tests.conftest import WAIT_S, StartSystem, eventually
from tests.contract.notes import (
    EXCHANGE,
    KEY,
    ONCE,
    QUEUE,
    Memo,
    Note,
    counts,
    counts_become,
    manual_clock,
    note,
    office,
    opened,
    parked_messages,
    parks,
    pass_time,
    plainly,
    publish,
    raw,
    send,
    take,
    texts,
    turn,
)


async def test_G7_failed_close_is_not_lost_and_does_not_spin(start_system: StartSystem) -> None:  # noqa: N802
    """A handler that fails for 5 s succeeds afterwards; one that always fails is parked, in less than 10 deliveries."""
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    until_us = clock.now_us() + 5_000 * US_PER_MS
    calls: list[str] = []

    async def close(incoming: Incoming) -> None:
        calls.append(incoming.body.text)
        if incoming.body.text == "never" or clock.now_us() < until_us:
            raise ConnectionError("the database is away")

    durable = RetryPolicy(tries=6, interval_ms=1_000, multiplier=2.0)
    system.listen(plainly(close, durable=durable))
    await send(system, "later", "never")
    for _ in range(40):
        await pass_time(system, clock, 1)
    assert calls.count("later") in (4, 5)  # after 0, 1, 3, (5,) 7 s
    assert calls.count("never") == 6
    assert [each.body for each in await parked_messages(system)] == [b'{"text":"never"}']
    assert await counts(system) == (0, 0, 0)


async def test_G15_two_payload_types_one_queue(start_system: StartSystem) -> None:  # noqa: N802
    """Two types on one queue reach their own handlers; garbage and an unknown type are parked."""
    system = await office(start_system)
    notes: list[str] = []
    memos: list[str] = []

    async def on_note(incoming: Incoming) -> None:
        notes.append(incoming.body.text)

    async def on_memo(incoming: Incoming) -> None:
        memos.append(incoming.body.text)

    system.listen(Listen(name="both", queue=QUEUE, plain={Note: on_note, Memo: on_memo}, local=ONCE, durable=ONCE))
    await send(system, "a note")
    await publish(
        system,
        [
            raw(note(system, "a memo"), type="test.memo"),
            raw(note(system), body=b"garbage"),
            raw(note(system), type="com.mall.Unknown"),
        ],
    )
    parked = await parks(system, 2)
    assert (notes, memos) == (["a note"], ["a memo"])
    assert {each.body for each in parked} == {b"garbage", b'{"text":"hello"}'}


async def test_H3_confirms_none_simple_correlated(start_system: StartSystem) -> None:  # noqa: N802
    """Sent and not waited for, waited for one by one, or all on their way at once with a callback for each outcome."""
    system = await office(start_system)
    publish_one = system.publisher.publish

    sent = asyncio.create_task(publish_one(EXCHANGE, KEY, Note("none")))
    await counts_become(system, (1, 0, 0))
    assert sent.done()

    assert await publish_one(EXCHANGE, KEY, Note("simple"), message_id="m-1") == "m-1"
    assert await counts(system) == (2, 0, 0)

    told: dict[str, object] = {}
    tasks = [
        asyncio.create_task(publish_one(EXCHANGE, key, Note("correlated"), message_id=name), name=name)
        for name, key in (("good", KEY), ("lost", "letter"))
    ]
    for task in tasks:
        task.add_done_callback(lambda done: told.update({done.get_name(): type(done.exception())}))
    await asyncio.wait(tasks)
    await turn(system)
    assert told == {"good": type(None), "lost": Unroutable}
    assert await counts(system) == (3, 0, 0)


async def test_H4_return_callback(start_system: StartSystem) -> None:  # noqa: N802
    """A key that no queue takes: 312 NO_ROUTE with exchange, key and message id."""
    system = await office(start_system)
    await system.transport.declare(Topology(exchanges=[Exchange(name="hmall.direct", kind="direct")]))
    with pytest.raises(Unroutable) as caught:
        await system.publisher.publish("hmall.direct", "q", Note("lost"), message_id="m-1")
    for told in ("312 NO_ROUTE", "'hmall.direct'", "'q'", "m-1"):
        assert told in caught.value.detail


async def test_H5_confirm_matrix(start_system: StartSystem) -> None:  # noqa: N802
    """Good, bad key, bad exchange: delivered, unroutable, failed; only the first is stored."""
    system = await office(start_system)
    outcomes = await system.publisher.publish_all(
        [
            Draft(exchange=EXCHANGE, routing_key=KEY, body=Note("good")),
            Draft(exchange=EXCHANGE, routing_key="letter", body=Note("bad key")),
            Draft(exchange="nowhere", routing_key=KEY, body=Note("bad exchange")),
        ]
    )
    assert [type(each) for each in outcomes] == [type(None), Unroutable, NoSuchExchange]
    async with system.transport.subscribe(QUEUE, prefetch=10) as subscription:
        assert texts(await take(subscription)) == ["good"]


async def test_H6_correlation_id_per_message(start_system: StartSystem) -> None:  # noqa: N802
    """10,000 sends at once, many sharing a message id, random failures: each outcome is its own message's."""
    system = await office(start_system)
    await system.transport.declare(Topology(queues=[Queue(name="full", max_length=0, overflow="reject-publish")]))
    chance = random.Random(6)
    kinds: dict[str, tuple[str, str, type]] = {
        "good": (EXCHANGE, KEY, type(None)),
        "unroutable": (EXCHANGE, "letter", Unroutable),
        "rejected": ("", "full", PublishRejected),
        "nowhere": ("nowhere", KEY, NoSuchExchange),
    }
    wanted = [chance.choice(list(kinds)) for _ in range(10_000)]
    once = Publisher(system.transport, system.codec, system.clock, system.ids, RetryPolicy(tries=1))

    async def one(number: int) -> PublishError | None:
        exchange, key, _ = kinds[wanted[number]]
        draft = Draft(exchange=exchange, routing_key=key, body=Note(str(number)), message_id=f"m-{number % 100}")
        (outcome,) = await once.publish_all([draft], deadline_s=WAIT_S)
        return outcome

    outcomes = await asyncio.gather(*(one(number) for number in range(len(wanted))))
    assert [type(each) for each in outcomes] == [kinds[kind][2] for kind in wanted]
    assert await counts(system) == (wanted.count("good"), 0, 0)


async def test_H7_durability(settings: Settings) -> None:  # noqa: N802
    """1,000 messages that nobody consumed are there after a restart."""
    async with opened(settings) as system:
        await send(system, *(str(number) for number in range(1_000)))
    async with opened(settings) as system:
        assert await counts(system) == (1_000, 0, 0)
        async with system.transport.subscribe(QUEUE, prefetch=1_000) as subscription:
            assert texts(await take(subscription, 1_000)) == [str(number) for number in range(1_000)]


async def test_H12_exception_classes_decide(start_system: StartSystem) -> None:  # noqa: N802
    """What cannot be decoded or is invalid is given up at once, a business error is tried again."""
    system = await office(start_system)
    calls: list[str] = []

    async def handle(incoming: Incoming) -> None:
        calls.append(incoming.body.text)
        if incoming.body.text == "invalid":
            raise InvalidInput("no such warehouse")
        raise RuntimeError("business")

    tries = RetryPolicy(tries=3, interval_ms=1)
    system.listen(plainly(handle, local=tries))
    await send(system, "invalid", "business")
    await publish(system, [raw(note(system), body=b"{")])
    await parks(system, 3)
    assert sorted(calls) == ["business"] * 3 + ["invalid"]


async def test_H13_consumer_local_retry(start_system: StartSystem) -> None:  # noqa: N802
    """Three calls, one second apart, within one delivery."""
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    calls: list[tuple[int, int]] = []

    async def fail(incoming: Incoming) -> None:
        calls.append((clock.now_us(), incoming.delivery.deliveries))
        raise RuntimeError

    system.listen(plainly(fail, local=RetryPolicy(tries=3, interval_ms=1_000)))
    await send(system, "failing")
    await turn(system)
    for _ in range(3):
        await pass_time(system, clock, 1)
    assert [deliveries for _, deliveries in calls] == [1, 1, 1]
    assert [later - sooner for (sooner, _), (later, _) in pairwise(calls)] == [1_000_000] * 2
    await parks(system)


async def test_H14_three_recoverers(start_system: StartSystem) -> None:  # noqa: N802
    """Drop, requeue, republish: the message is gone, waits in its queue, lies in the error queue."""
    system = await office(start_system)
    await system.transport.declare(error_topology("shop"))
    names = ("dropping", "requeuing", "republishing")
    await system.transport.declare(Topology(queues=[Queue(name=name) for name in names]))

    async def fail(_: Incoming) -> None:
        raise RuntimeError("always")

    chosen: tuple[Recoverer, ...] = (Discard(), Requeue(interval_ms=3_600_000), Republish(service="shop"))
    for name, recover in zip(names, chosen, strict=True):
        await send(system, name, exchange="", key=name)
        system.listen(msgspec.structs.replace(plainly(fail, name=name, recover=recover), queue=name))
    for name, state in zip(names, ((0, 0, 0), (0, 0, 1), (0, 0, 0)), strict=True):
        await counts_become(system, state, name)
    await counts_become(system, (1, 0, 0), "shop.error.queue")
    for name in names:
        assert await parked_messages(system, name) == []


async def test_H15_error_exchange_and_queue(start_system: StartSystem) -> None:  # noqa: N802
    """error.direct, key and queue by the service's name; the message tells its origin and the exception."""
    system = await office(start_system)
    await system.transport.declare(error_topology("shop"))

    async def fail(_: Incoming) -> None:
        raise RuntimeError("out of paper")

    await send(system, "a receipt")
    system.listen(plainly(fail, recover=Republish(service="shop")))
    await counts_become(system, (1, 0, 0), "shop.error.queue")
    async with system.transport.subscribe("shop.error.queue", prefetch=1) as subscription:
        (failed,) = await take(subscription)
    assert (failed.message.exchange, failed.message.routing_key) == ("error.direct", "shop")
    headers = failed.message.headers
    assert headers["x-exception-message"] == "RuntimeError: out of paper"
    assert "RuntimeError: out of paper" in headers["x-exception-stacktrace"]
    assert (headers["x-original-exchange"], headers["x-original-routingKey"]) == (EXCHANGE, KEY)
    assert texts([failed]) == ["a receipt"]


async def test_H24_delayed_exchange(start_system: StartSystem) -> None:  # noqa: N802
    """A delay of 5 s through an exchange arrives at 5 s, at most half a second late, whatever else is delayed."""
    system = await office(start_system)
    await system.transport.declare(
        Topology(
            exchanges=[Exchange(name="delay.direct", kind="direct")],
            queues=[Queue(name="delay.queue")],
            bindings=[Binding(exchange="delay.direct", queue="delay.queue", routing_key="delay")],
        )
    )
    many = [
        Draft(exchange="delay.direct", routing_key="delay", body=Note("next year"), delay_ms=31_536_000_000)
        for _ in range(2_000)
    ]
    assert set(await system.publisher.publish_all(many, deadline_s=WAIT_S)) == {None}
    async with system.transport.subscribe("delay.queue", prefetch=10) as subscription:
        sent_us = system.clock.now_us()
        await system.publisher.publish("delay.direct", "delay", Note("soon"), delay_ms=5_000)
        assert texts(await take(subscription)) == ["soon"]
        took_us = system.clock.now_us() - sent_us
    assert 5_000_000 <= took_us <= 5_500_000


async def test_H33_send_message_with_confirm_tries_again(start_system: StartSystem) -> None:  # noqa: N802
    """Refused twice it is delivered at the third try; refused always, the caller is told that it is not stored."""
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    await system.transport.declare(Topology(queues=[Queue(name="full", max_length=1, overflow="reject-publish")]))
    publisher = Publisher(system.transport, system.codec, clock, system.ids, RetryPolicy(tries=3, interval_ms=1_000))
    await send(system, "in the way", exchange="", key="full")
    publishing = asyncio.create_task(publisher.publish("", "full", Note("third time"), deadline_s=WAIT_S))
    await pass_time(system, clock, 1)
    assert not publishing.done()
    async with system.transport.subscribe("full", prefetch=1) as subscription:
        await take(subscription)  # what is held takes no room
        await pass_time(system, clock, 1)
        await publishing
        refused = asyncio.create_task(publisher.publish("", "full", Note("never"), deadline_s=WAIT_S))
        for _ in range(3):
            await pass_time(system, clock, 1)
        with pytest.raises(PublishRejected):
            await refused
    assert await counts(system, "full") == (2, 0, 0)


async def test_H44_queue_state_visible(start_system: StartSystem) -> None:  # noqa: N802
    """While a handler works its message is unacked; after a failure it is ready, or delayed, again."""
    system = await office(start_system)
    gate, called = asyncio.Event(), asyncio.Event()

    async def hold(_: Incoming) -> None:
        called.set()
        await gate.wait()
        raise RuntimeError

    listener = system.listen(plainly(hold, durable=RetryPolicy(tries=2, interval_ms=3_600_000)))
    await send(system, "watched")
    await called.wait()
    assert await counts(system) == (0, 1, 0)
    gate.set()
    await counts_become(system, (0, 0, 1))
    await listener.stop()

    called.clear()
    gate.clear()
    held = system.listen(plainly(hold, name="again"))
    await send(system, "given back")
    await called.wait()
    assert await counts(system) == (0, 1, 1)
    await held.stop(drain_s=0)

    async def ready() -> bool:
        return (await counts(system))[0] == 1

    await eventually(ready, "what a stopped listener held is ready again")
