"""Capabilities of queues (section 4 of the spec), one test per row, named by it; on SQLite and PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import msgspec
import pytest

from holdfast.bootstrap import System
from holdfast.errors import PublishRejected, TopologyMismatch
from holdfast.messaging.dead_letters import deaths
from holdfast.messaging.injection import Incoming
from holdfast.messaging.listen import Listen
from holdfast.messaging.message import reject
from holdfast.messaging.toolkit import Messaging, open_messaging
from holdfast.messaging.topology import Binding, Exchange, Queue, Topology
from tests.conftest import StartSystem, eventually
from tests.contract.notes import (
    ONCE,
    TYPES,
    Note,
    counts,
    counts_become,
    manual_clock,
    note,
    office,
    outcome,
    pass_time,
    publish,
    send,
    take,
    texts,
)

ORDERS = Topology(
    exchanges=[Exchange(name="order-event-exchange", kind="topic")],
    queues=[
        Queue(
            name="order.delay.queue",
            message_ttl_ms=60_000,
            dead_letter_exchange="order-event-exchange",
            dead_letter_routing_key="order.release.order",
        ),
        Queue(name="order.release.order.queue"),
    ],
    bindings=[
        Binding(exchange="order-event-exchange", queue="order.delay.queue", routing_key="order.create.order"),
        Binding(exchange="order-event-exchange", queue="order.release.order.queue", routing_key="order.release.order"),
    ],
)


async def test_G2_delay_by_queue_ttl_no_per_message_timers(start_system: StartSystem) -> None:  # noqa: N802
    """The time to live is the queue's argument, not the messages'; ten orders are released in order within a second."""
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    await system.transport.declare(ORDERS)
    (delay,) = [each for each in (await system.transport.topology()).queues if each.name == "order.delay.queue"]
    assert delay.message_ttl_ms == 60_000
    bodies = [f"order {number}" for number in range(10)]
    for body in bodies:
        outgoing = note(system, body, exchange="order-event-exchange", key="order.create.order")
        assert outgoing.expires_ms is None
        await publish(system, [outgoing])
    await pass_time(system, clock, 59.9)
    assert await counts(system, "order.release.order.queue") == (0, 0, 0)
    await pass_time(system, clock, 1)
    assert await counts(system, "order.delay.queue") == (0, 0, 0)
    async with system.transport.subscribe("order.release.order.queue", prefetch=10) as subscription:
        assert texts(await take(subscription, 10)) == bodies


async def test_G3_dead_letter_hop_to_release_queue(start_system: StartSystem) -> None:  # noqa: N802
    """With nobody closing orders, an expired one waits in the release queue, with its history."""
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    await system.transport.declare(ORDERS)
    await send(system, "order 1", exchange="order-event-exchange", key="order.create.order")
    await pass_time(system, clock, 60)
    assert await counts(system, "order.release.order.queue") == (1, 0, 0)
    async with system.transport.subscribe("order.release.order.queue", prefetch=1) as subscription:
        (released,) = await take(subscription)
    assert released.message.routing_key == "order.release.order"
    (death,) = deaths(released.message.headers)
    assert (death.queue, death.reason, death.count) == ("order.delay.queue", "expired", 1)


async def test_H21_dead_letters_three_causes(start_system: StartSystem) -> None:  # noqa: N802
    """Rejected, expired and pushed out by the length limit: each reaches the dead-letter exchange with its reason."""
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    await system.transport.declare(
        Topology(
            exchanges=[Exchange(name="dlx", kind="fanout")],
            queues=[
                Queue(name="rejecting", dead_letter_exchange="dlx"),
                Queue(name="expiring", dead_letter_exchange="dlx", message_ttl_ms=1_000),
                Queue(name="short", dead_letter_exchange="dlx", max_length=1),
                Queue(name="full", max_length=1, overflow="reject-publish"),
                Queue(name="dead"),
            ],
            bindings=[Binding(exchange="dlx", queue="dead")],
        )
    )
    for queue in ("rejecting", "expiring", "short", "short", "full"):
        await send(system, queue, exchange="", key=queue)
    assert isinstance(await outcome(system, note(system, exchange="", key="full")), PublishRejected)
    async with system.transport.subscribe("rejecting", prefetch=1) as subscription:
        (delivery,) = await take(subscription)
        await subscription.settle([reject(delivery, "no")])
    await pass_time(system, clock, 1)
    async with system.transport.subscribe("dead", prefetch=3) as subscription:
        dead = await take(subscription, 3)
    reasons = {body: deaths(each.message.headers)[0].reason for body, each in zip(texts(dead), dead, strict=True)}
    assert reasons == {"rejecting": "rejected", "expiring": "expired", "short": "maxlen"}


async def test_H22_dlx_delay_key_kept(start_system: StartSystem) -> None:  # noqa: N802
    """ttl.fanout -> ttl.queue -> hmall.direct: an expiration of 5 s arrives at 5 s in direct.queue1, key blue kept."""
    system = await office(start_system)
    await system.transport.declare(
        Topology(
            exchanges=[Exchange(name="ttl.fanout", kind="fanout"), Exchange(name="hmall.direct", kind="direct")],
            queues=[Queue(name="ttl.queue", dead_letter_exchange="hmall.direct"), Queue(name="direct.queue1")],
            bindings=[
                Binding(exchange="ttl.fanout", queue="ttl.queue"),
                Binding(exchange="hmall.direct", queue="direct.queue1", routing_key="blue"),
            ],
        )
    )
    async with system.transport.subscribe("direct.queue1", prefetch=1) as subscription:
        sent_us = system.clock.now_us()
        outgoing = note(system, "blue", exchange="ttl.fanout", key="blue")
        await publish(system, [msgspec.structs.replace(outgoing, expires_ms=5_000)])
        (came,) = await take(subscription)
        took_us = system.clock.now_us() - sent_us
    assert came.message.routing_key == "blue"
    assert 5_000_000 <= took_us <= 5_500_000


async def test_H23_head_of_line_blocking_handled(start_system: StartSystem) -> None:  # noqa: N802
    """60 s, then 1 s into the same queue, as delay and as expiration: the second comes at 1 s."""
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    await system.transport.declare(
        Topology(queues=[Queue(name="ttl", dead_letter_exchange="", dead_letter_routing_key="out"), Queue(name="out")])
    )
    for body, seconds in (("long", 60), ("short", 1)):
        outgoing = note(system, f"{body} expiration", exchange="", key="ttl")
        await publish(system, [msgspec.structs.replace(outgoing, expires_ms=seconds * 1_000)])
        await send(system, f"{body} delay", exchange="", key="out", delay_ms=seconds * 1_000)
    async with system.transport.subscribe("out", prefetch=4) as subscription:
        await pass_time(system, clock, 1)
        assert sorted(texts(await take(subscription, 2))) == ["short delay", "short expiration"]
        await pass_time(system, clock, 59)
        assert sorted(texts(await take(subscription, 2))) == ["long delay", "long expiration"]


OVER = "SECKILL_OVER_SIGN_PUBSUB_EX"


@asynccontextmanager
async def instances(system: System, count: int, queues: list[Queue]) -> AsyncIterator[list[Messaging]]:
    """So many instances of a program, each with its queue bound to the fanout exchange."""
    async with AsyncExitStack() as stack:
        running = []
        for queue in queues[:count]:
            topology = Topology(
                exchanges=[Exchange(name=OVER, kind="fanout")],
                queues=[queue],
                bindings=[Binding(exchange=OVER, queue=queue.name)],
            )
            running.append(await stack.enter_async_context(open_messaging(system.database, TYPES, topology)))
        yield running


def hearing(queue: Queue, heard: list[str]) -> Listen:
    async def handle(incoming: Incoming) -> None:
        heard.append(incoming.body.text)

    return Listen(name=f"sign of {queue.name}", queue=queue.name, plain={Note: handle})


async def test_K9_fanout_with_anonymous_queues(start_system: StartSystem) -> None:  # noqa: N802
    """Three instances, three queues: each hears the message; the queue of one that stops goes with it."""
    system = await office(start_system)
    queues = [Queue.anonymous("sold-out") for _ in range(3)]
    heard: list[list[str]] = [[], [], []]

    async def bound() -> int:
        return sum(each.exchange == OVER for each in (await system.transport.topology()).bindings)

    async with instances(system, 3, queues) as running:
        for bus, queue, into in zip(running, queues, heard, strict=True):
            bus.listen(hearing(queue, into))
        assert await bound() == 3
        await running[0].publisher.publish(OVER, "", Note("clear the sign"))

        async def all_heard() -> bool:
            return heard == [["clear the sign"]] * 3

        await eventually(all_heard, "every instance heard it")
        await running[2].stop_listeners()
        assert await bound() == 2
    assert await bound() == 0


async def test_K10_named_queue_is_worker_mode(start_system: StartSystem) -> None:  # noqa: N802
    """The same with one fixed name: each message reaches one of the three instances only."""
    system = await office(start_system)
    queue = Queue(name="sold-out")
    heard: list[str] = []
    async with instances(system, 3, [queue] * 3) as running:
        for bus in running:
            bus.listen(hearing(queue, heard))
        sent = [f"sign {number}" for number in range(30)]
        await asyncio.gather(*(running[0].publisher.publish(OVER, "", Note(text)) for text in sent))
        await counts_become(system, (0, 0, 0), queue.name)
    assert sorted(heard) == sorted(sent)


async def test_H34_per_service_error_queue_only_if_wanted(start_system: StartSystem) -> None:  # noqa: N802
    """Switched on, exchange, queue and binding by the service's name exist and are used; off, they do not."""
    system = await office(start_system)
    declared = await system.transport.topology()
    assert "error.direct" not in {each.name for each in declared.exchanges}
    assert not [each.name for each in declared.queues if each.name.endswith("error.queue")]

    async def fail(_: Incoming) -> None:
        raise RuntimeError("always")

    nothing = Topology(queues=[Queue(name="work")])
    async with open_messaging(system.database, TYPES, nothing, error_service="trade") as bus:
        declared = await bus.transport.topology()
        assert Exchange(name="error.direct", kind="direct") in declared.exchanges
        assert Queue(name="trade.error.queue") in declared.queues
        binding = Binding(exchange="error.direct", queue="trade.error.queue", routing_key="trade")
        assert binding in declared.bindings
        bus.listen(Listen(name="work", queue="work", plain={Note: fail}, local=ONCE, durable=ONCE))
        await bus.publisher.publish("", "work", Note("broken"))
        await counts_become(system, (1, 0, 0), "trade.error.queue")


async def test_H38_declare_arguments_catalogue(start_system: StartSystem) -> None:  # noqa: N802
    """Each argument is declared and shown again; what only a broker has can be written down and is refused by name."""
    system = await office(start_system)
    offered = Topology(
        exchanges=[Exchange(name="alternate", kind="fanout"), Exchange(name="main", alternate="alternate")],
        queues=[
            Queue(name="auto-delete", auto_delete=True),
            Queue(name="exclusive", exclusive=True),
            Queue(name="expires", expires_ms=60_000),
            Queue(name="ttl", message_ttl_ms=60_000),
            Queue(name="drop-head", max_length=10, overflow="drop-head"),
            Queue(name="reject-publish", max_length=10, overflow="reject-publish"),
            Queue(name="dead-lettering", dead_letter_exchange="main", dead_letter_routing_key="dead"),
            Queue(name="single", single_active_consumer=True),
        ],
    )
    await system.transport.declare(offered)
    declared = await system.transport.topology()
    assert set(offered.exchanges) <= set(declared.exchanges)
    assert set(offered.queues) <= set(declared.queues)
    for queue, feature in (
        (Queue(name="bytes", max_length_bytes=1_000), "max_length_bytes"),
        (Queue(name="priority", max_priority=5), "max_priority"),
    ):
        with pytest.raises(TopologyMismatch, match=feature):
            await system.transport.declare(Topology(queues=[queue]))
    for exchange, feature in (
        (Exchange(name="internal", internal=True), "internal_exchange"),
        (Exchange(name="headers", kind="headers"), "headers_exchange"),
        (Exchange(name="auto", auto_delete=True), "auto_delete_exchange"),
    ):
        with pytest.raises(TopologyMismatch, match=feature):
            await system.transport.declare(Topology(exchanges=[exchange]))
    assert await system.transport.topology() == declared
