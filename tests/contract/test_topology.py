"""Declarations and what they do: limits, expiry, dead letters, alternates, queues that pass, active consumers."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from holdfast.bootstrap import System
from holdfast.clock import ManualClock
from holdfast.errors import NoSuchQueue, PublishRejected, TopologyMismatch, Unroutable
from holdfast.messaging.dead_letters import deaths
from holdfast.messaging.message import Delivery, ack, park, reject, retry
from holdfast.messaging.topology import Binding, Exchange, Queue, Topology
from holdfast.messaging.transport import Subscription
from holdfast.messaging.transports.sql.transport import SqlTransport
from holdfast.settings import Settings
from tests.conftest import StartSystem, eventually
from tests.contract.notes import (
    EXCHANGE,
    KEY,
    QUEUE,
    counts,
    counts_become,
    manual_clock,
    note,
    office,
    outcome,
    parked_messages,
    pass_time,
    publish,
    send,
    take,
    texts,
    turn,
    with_messaging,
)

DEAD = "notes.dead"
DEAD_EXCHANGE = "notes.dlx"

TO_DEAD = Topology(
    exchanges=[Exchange(name=DEAD_EXCHANGE, kind="direct")],
    queues=[Queue(name=DEAD)],
    bindings=[Binding(exchange=DEAD_EXCHANGE, queue=DEAD, routing_key=KEY)],
)


def dying(name: str = "dying", **arguments: object) -> Queue:
    """A queue whose dead letters go to `DEAD` under their own key."""
    return msgspec.convert({"name": name, "dead_letter_exchange": DEAD_EXCHANGE} | arguments, Queue)


async def declare(system: System, *queues: Queue) -> None:
    """These queues, bound to the exchange of notes under their own name."""
    bound = [Binding(exchange=EXCHANGE, queue=queue.name, routing_key=queue.name) for queue in queues]
    exchanges = [Exchange(name=EXCHANGE, kind="topic")]
    await system.transport.declare(TO_DEAD + Topology(exchanges=exchanges, queues=queues, bindings=bound))


async def send_to(system: System, queue: str, *bodies: str) -> None:
    """Straight into a queue, by the default exchange."""
    await send(system, *bodies, exchange="", key=queue)


async def taken(system: System, queue: str, count: int) -> list[Delivery]:
    """Take so many messages and ack them."""
    async with system.transport.subscribe(queue, prefetch=count) as subscription:
        deliveries = await take(subscription, count)
        await subscription.settle([ack(each) for each in deliveries])
    return deliveries


async def bound_dead(system: System, queue: Queue) -> None:
    """A dying queue whose dead letters arrive under the queue's name."""
    await declare(system, queue)
    binding = Binding(exchange=DEAD_EXCHANGE, queue=DEAD, routing_key=queue.name)
    await system.transport.declare(msgspec.structs.replace(TO_DEAD, bindings=[binding]))


# -- declaring --------------------------------------------------------------------------------------------------------


async def test_declaring_again_with_other_arguments_names_both_values_and_changes_nothing(
    start_system: StartSystem,
) -> None:
    system = await office(start_system)
    await declare(system, dying(message_ttl_ms=1_000))
    before = await system.transport.topology()
    with pytest.raises(TopologyMismatch) as caught:
        await declare(system, dying(message_ttl_ms=2_000, max_length=5), Queue(name="another"))
    assert "message_ttl_ms=1000" in caught.value.detail
    assert "message_ttl_ms=2000" in caught.value.detail
    assert "max_length=5" in caught.value.detail
    with pytest.raises(TopologyMismatch, match="kind='topic', declared with kind='fanout'"):
        await system.transport.declare(Topology(exchanges=[Exchange(name=EXCHANGE, kind="fanout")]))
    assert await system.transport.topology() == before
    await declare(system, dying(message_ttl_ms=1_000))
    assert await system.transport.topology() == before


async def test_a_passive_check_tells_all_that_is_missing_and_declares_nothing(start_system: StartSystem) -> None:
    system = await office(start_system)
    before = await system.transport.topology()
    await system.transport.check(before)
    wanted = Topology(
        exchanges=[Exchange(name=EXCHANGE, kind="fanout"), Exchange(name="new")],
        queues=[Queue(name=QUEUE), Queue(name="new.queue")],
        bindings=[Binding(exchange=EXCHANGE, queue=QUEUE, routing_key="other")],
    )
    with pytest.raises(TopologyMismatch) as caught:
        await system.transport.check(wanted)
    for told in ("kind='fanout'", "exchange 'new' does not exist", "queue 'new.queue' does not exist", "'other'"):
        assert told in caught.value.detail
    assert await system.transport.topology() == before


async def test_what_only_a_broker_offers_is_refused_by_name_and_nothing_is_declared(start_system: StartSystem) -> None:
    system = await office(start_system)
    before = await system.transport.topology()
    wanted = Topology(
        exchanges=[Exchange(name="h", kind="headers"), Exchange(name="i", internal=True), Exchange(name="plain")],
        queues=[Queue(name="p", max_priority=5), Queue(name="b", max_length_bytes=100), Queue(name="plain")],
        bindings=[Binding(exchange="plain", to_exchange="i")],
    )
    with pytest.raises(TopologyMismatch) as caught:
        await system.transport.declare(wanted)
    for told in ("headers_exchange", "internal_exchange", "max_priority", "max_length_bytes", "exchange_to_exchange"):
        assert told in caught.value.detail
    assert "'plain'" in caught.value.detail  # of the binding
    assert await system.transport.topology() == before


async def test_every_argument_is_kept(start_system: StartSystem) -> None:
    system = await office(start_system)
    full = Queue(
        name="full",
        expires_ms=60_000,
        message_ttl_ms=5_000,
        max_length=10,
        overflow="reject-publish",
        dead_letter_exchange=DEAD_EXCHANGE,
        dead_letter_routing_key="dead",
        single_active_consumer=True,
    )
    alternate = Exchange(name="with.alternate", kind="direct", alternate=DEAD_EXCHANGE)
    await system.transport.declare(TO_DEAD + Topology(exchanges=[alternate], queues=[full]))
    known = await system.transport.topology()
    assert full in known.queues
    assert alternate in known.exchanges


async def test_listening_to_a_queue_that_nobody_declared_is_told(start_system: StartSystem) -> None:
    system = await office(start_system)
    with pytest.raises(NoSuchQueue, match="'nowhere'"):
        async with system.transport.subscribe("nowhere", prefetch=1):
            pytest.fail("there is no such queue")


# -- alternate exchanges ----------------------------------------------------------------------------------------------


async def test_what_no_queue_takes_goes_to_the_alternate_exchange(start_system: StartSystem) -> None:
    system = await office(start_system)
    await system.transport.declare(
        Topology(
            exchanges=[
                Exchange(name="first", kind="direct", alternate="second"),
                Exchange(name="second", kind="direct", alternate="third"),
                Exchange(name="third", kind="fanout"),
            ],
            queues=[Queue(name="taken"), Queue(name="left")],
            bindings=[
                Binding(exchange="first", queue="taken", routing_key="known"),
                Binding(exchange="third", queue="left"),
            ],
        )
    )
    await send(system, "known", exchange="first", key="known")
    await send(system, "unknown", exchange="first", key="unknown")
    assert texts(await taken(system, "taken", 1)) == ["known"]
    (left,) = await taken(system, "left", 1)
    assert texts([left]) == ["unknown"]
    assert (left.message.exchange, left.message.routing_key) == ("first", "unknown")


async def test_alternates_in_a_circle_or_missing_end_as_unroutable(start_system: StartSystem) -> None:
    system = await office(start_system)
    await system.transport.declare(
        Topology(
            exchanges=[
                Exchange(name="one", alternate="two"),
                Exchange(name="two", alternate="one"),
                Exchange(name="lost", alternate="never.declared"),
            ]
        )
    )
    for exchange in ("one", "lost"):
        assert isinstance(await outcome(system, note(system, exchange=exchange)), Unroutable)


# -- expiry -----------------------------------------------------------------------------------------------------------


async def test_a_queue_with_time_to_live_and_no_consumer_is_a_delay_exact_and_in_order(
    start_system: StartSystem,
) -> None:
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    await bound_dead(system, dying(message_ttl_ms=5_000))
    await send(system, "a", "b", exchange=EXCHANGE, key="dying")
    await pass_time(system, clock, 1)
    await send(system, "c", exchange=EXCHANGE, key="dying")
    await pass_time(system, clock, 3.999_999)
    assert (await counts(system, "dying"), await counts(system, DEAD)) == ((3, 0, 0), (0, 0, 0))
    await pass_time(system, clock, 0.000_001)
    assert (await counts(system, "dying"), await counts(system, DEAD)) == ((1, 0, 0), (2, 0, 0))
    await pass_time(system, clock, 1)
    came = await taken(system, DEAD, 3)
    assert texts(came) == ["a", "b", "c"]
    (death,) = deaths(came[0].message.headers)
    assert (death.queue, death.reason, death.count, death.exchange) == ("dying", "expired", 1, EXCHANGE)
    assert death.routing_keys == ("dying",)
    assert came[0].message.headers["x-first-death-queue"] == "dying"
    assert (came[0].message.exchange, came[0].message.routing_key) == (DEAD_EXCHANGE, "dying")


async def test_a_short_expiration_does_not_wait_behind_a_long_one(start_system: StartSystem) -> None:
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    await bound_dead(system, dying())
    long, short = note(system, "long", exchange="", key="dying"), note(system, "short", exchange="", key="dying")
    await publish(system, [msgspec.structs.replace(long, expires_ms=60_000)])
    await publish(system, [msgspec.structs.replace(short, expires_ms=1_000)])
    await pass_time(system, clock, 1)
    assert texts(await taken(system, DEAD, 1)) == ["short"]
    assert await counts(system, "dying") == (1, 0, 0)


async def test_the_shorter_time_to_live_counts_and_a_dead_letter_keeps_none_of_its_own(
    start_system: StartSystem,
) -> None:
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    await bound_dead(system, dying(message_ttl_ms=2_000))
    message = note(system, "short", exchange="", key="dying")
    await publish(system, [msgspec.structs.replace(message, expires_ms=500)])
    await pass_time(system, clock, 0.5)
    assert await counts(system, DEAD) == (1, 0, 0)
    await pass_time(system, clock, 3_600)
    assert texts(await taken(system, DEAD, 1)) == ["short"]


async def test_time_to_live_counts_from_when_a_delayed_message_is_due(start_system: StartSystem) -> None:
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    await bound_dead(system, dying(message_ttl_ms=1_000))
    await send(system, "later", exchange="", key="dying", delay_ms=10_000)
    await pass_time(system, clock, 10)
    assert await counts(system, "dying") == (1, 0, 0)
    await pass_time(system, clock, 1)
    assert await counts(system, DEAD) == (1, 0, 0)


async def test_an_expired_message_without_a_dead_letter_exchange_is_gone(start_system: StartSystem) -> None:
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    await declare(system, Queue(name="short", message_ttl_ms=1_000))
    await send_to(system, "short", "gone")
    await pass_time(system, clock, 1)
    assert await counts(system, "short") == (0, 0, 0)
    assert await parked_messages(system, "short") == []


async def test_what_a_consumer_holds_does_not_expire_until_it_lets_go(
    start_system: StartSystem, settings: Settings
) -> None:
    clock = manual_clock()
    system = await office(start_system, with_messaging(settings, lease_ms=60_000), clock=clock)
    await bound_dead(system, dying(message_ttl_ms=1_000))
    await send_to(system, "dying", "held")
    async with system.transport.subscribe("dying", prefetch=1) as subscription:
        (held,) = await take(subscription)
        await pass_time(system, clock, 2)
        assert await counts(system, "dying") == (0, 1, 0)
        await subscription.settle([retry(held, 0)])
        await turn(system)
    await pass_time(system, clock, 1)
    assert texts(await taken(system, DEAD, 1)) == ["held"]


# -- rejecting --------------------------------------------------------------------------------------------------------


async def rejected(system: System, queue: str, body: str = "bad") -> None:
    await send_to(system, queue, body)
    async with system.transport.subscribe(queue, prefetch=1) as subscription:
        (delivery,) = await take(subscription)
        await subscription.settle([reject(delivery, "no good")])


async def test_a_rejected_message_goes_to_the_dead_letter_exchange_under_its_own_or_the_given_key(
    start_system: StartSystem,
) -> None:
    system = await office(start_system)
    await bound_dead(system, dying())
    await bound_dead(system, dying("keyed", dead_letter_routing_key=KEY))
    await rejected(system, "dying", "own")
    await rejected(system, "keyed", "given")
    own, given = await taken(system, DEAD, 2)
    assert texts([own, given]) == ["own", "given"]
    assert (own.message.routing_key, given.message.routing_key) == ("dying", KEY)
    assert [death.reason for death in deaths(own.message.headers)] == ["rejected"]
    assert own.attempt == 1


@pytest.mark.parametrize("case", ["no dead-letter exchange", "an exchange that is missing", "a key nobody takes"])
async def test_a_rejected_message_that_nobody_takes_is_parked_and_not_lost(
    start_system: StartSystem, case: str
) -> None:
    system = await office(start_system)
    queue = {
        "no dead-letter exchange": Queue(name="q"),
        "an exchange that is missing": Queue(name="q", dead_letter_exchange="never.declared"),
        "a key nobody takes": dying("q", dead_letter_routing_key="nobody"),
    }[case]
    await declare(system, queue)
    await rejected(system, "q")
    assert await counts(system, "q") == (0, 0, 0)
    (parked,) = await parked_messages(system, "q")
    assert ("no good" in parked.reason) == (case == "no dead-letter exchange")


async def test_a_message_can_be_parked_past_the_dead_letter_exchange(start_system: StartSystem) -> None:
    system = await office(start_system)
    await bound_dead(system, dying())
    await send_to(system, "dying", "for a human")
    async with system.transport.subscribe("dying", prefetch=1) as subscription:
        (delivery,) = await take(subscription)
        await subscription.settle([park(delivery, "look at this")])
    assert [each.reason for each in await parked_messages(system, "dying")] == ["look at this"]
    assert await counts(system, DEAD) == (0, 0, 0)


async def test_deaths_are_counted_by_queue_and_reason_newest_first(start_system: StartSystem) -> None:
    system = await office(start_system)
    await declare(
        system,
        Queue(name="there", dead_letter_exchange="", dead_letter_routing_key="back"),
        Queue(name="back", dead_letter_exchange="", dead_letter_routing_key="there"),
    )
    await rejected(system, "there")
    for queue in ("back", "there", "back"):
        async with system.transport.subscribe(queue, prefetch=1) as subscription:
            (delivery,) = await take(subscription)
            await subscription.settle([reject(delivery, "not mine")])
    (last,) = await taken(system, "there", 1)
    history = [(death.queue, death.reason, death.count) for death in deaths(last.message.headers)]
    assert history == [("back", "rejected", 2), ("there", "rejected", 2)]
    assert last.message.headers["x-first-death-queue"] == "there"


# -- circles ----------------------------------------------------------------------------------------------------------


async def test_a_message_that_expires_in_circles_is_dropped_and_one_that_is_rejected_is_not(
    start_system: StartSystem,
) -> None:
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    circle = [
        Queue(name="ping", message_ttl_ms=1_000, dead_letter_exchange="", dead_letter_routing_key="pong"),
        Queue(name="pong", message_ttl_ms=1_000, dead_letter_exchange="", dead_letter_routing_key="ping"),
    ]
    await declare(system, *circle)
    await send_to(system, "ping", "round")
    await pass_time(system, clock, 1)
    assert (await counts(system, "ping"), await counts(system, "pong")) == ((0, 0, 0), (1, 0, 0))
    await pass_time(system, clock, 1)
    assert (await counts(system, "ping"), await counts(system, "pong")) == ((0, 0, 0), (0, 0, 0))

    await send_to(system, "ping", "round")
    await pass_time(system, clock, 1)
    async with system.transport.subscribe("pong", prefetch=1) as subscription:
        (delivery,) = await take(subscription)
        await subscription.settle([reject(delivery, "go back")])
    (again,) = await taken(system, "ping", 1)
    assert [(death.queue, death.reason) for death in deaths(again.message.headers)] == [
        ("pong", "rejected"),
        ("ping", "expired"),
    ]


# -- length -----------------------------------------------------------------------------------------------------------


async def test_a_full_queue_drops_its_oldest_to_the_dead_letter_exchange(start_system: StartSystem) -> None:
    system = await office(start_system)
    await bound_dead(system, dying(max_length=3))
    await send_to(system, "dying", *"abcde")
    await send_to(system, "dying", "f")
    assert texts(await taken(system, "dying", 3)) == ["d", "e", "f"]
    dead = await taken(system, DEAD, 3)
    assert texts(dead) == ["a", "b", "c"]
    assert {death.reason for each in dead for death in deaths(each.message.headers)} == {"maxlen"}


async def test_a_full_queue_that_refuses_says_so_and_keeps_what_it_has(start_system: StartSystem) -> None:
    system = await office(start_system)
    await declare(system, Queue(name="full", max_length=2, overflow="reject-publish"))
    batch = [note(system, body, exchange=EXCHANGE, key="full") for body in "abc"]
    told = await system.transport.publish(batch)
    assert [type(each) for each in told] == [type(None), type(None), PublishRejected]
    assert "'full' is full" in str(told[2])
    assert texts(await taken(system, "full", 2)) == ["a", "b"]
    await send_to(system, "full", "d")
    assert texts(await taken(system, "full", 1)) == ["d"]


async def test_what_a_consumer_holds_takes_no_room(start_system: StartSystem) -> None:
    system = await office(start_system)
    await declare(system, Queue(name="full", max_length=1, overflow="reject-publish"))
    await send_to(system, "full", "held")
    async with system.transport.subscribe("full", prefetch=1) as subscription:
        await take(subscription)
        await send_to(system, "full", "next")
        assert await counts(system, "full") == (1, 1, 0)


async def test_many_publishers_at_once_never_fill_a_queue_beyond_its_limit(
    start_system: StartSystem, settings: Settings
) -> None:
    system = await office(start_system)
    others = [system]
    if system.transport.features.several_processes:
        others.append(await office(start_system))
    await declare(system, Queue(name="full", max_length=10, overflow="reject-publish"))

    async def one(at: System, number: int) -> bool:
        return await outcome(at, note(at, str(number), exchange="", key="full")) is None

    taken_in = await asyncio.gather(*(one(others[number % len(others)], number) for number in range(60)))
    assert taken_in.count(True) == 10
    assert await counts(system, "full") == (10, 0, 0)


# -- queues that pass -------------------------------------------------------------------------------------------------


async def instance(system: System) -> SqlTransport:
    """Another instance on the same database, as another process would be."""
    other = SqlTransport(system.database, system.group, system.clock, system.ids, system.settings.messaging)
    other._lifetimes.start()
    return other


async def exists(system: System, queue: str) -> bool:
    return queue in {each.name for each in (await system.transport.topology()).queues}


async def test_an_exclusive_queue_belongs_to_its_instance_and_goes_with_it(start_system: StartSystem) -> None:
    system = await office(start_system)
    other = await instance(system)
    mine = Queue(name="mine", exclusive=True)
    await other.declare(Topology(queues=[mine]))
    await other.declare(Topology(queues=[mine]))
    with pytest.raises(TopologyMismatch, match="exclusive to another instance"):
        await system.transport.declare(Topology(queues=[mine]))
    with pytest.raises(TopologyMismatch, match="exclusive to another instance"):
        async with system.transport.subscribe("mine", prefetch=1):
            pytest.fail("it is not ours")
    await send_to(system, "mine", "anybody may send to it")
    assert await exists(system, "mine")
    await other.close()
    assert not await exists(system, "mine")
    assert isinstance(await outcome(system, note(system, exchange="", key="mine")), Unroutable)


async def test_an_anonymous_queue_goes_with_its_consumer(start_system: StartSystem) -> None:
    system = await office(start_system)
    queue = Queue.anonymous("news")
    assert queue.name.startswith("news.gen-")
    await declare(system, queue)
    async with system.transport.subscribe(queue.name, prefetch=1):
        assert await exists(system, queue.name)
    assert not await exists(system, queue.name)


async def test_the_exclusive_queue_of_a_killed_instance_is_removed_after_a_lease(
    start_system: StartSystem, settings: Settings
) -> None:
    clock = manual_clock()
    system = await office(start_system, with_messaging(settings, lease_ms=30_000), clock=clock)
    other = await instance(system)
    await other.declare(Topology(queues=[Queue(name="orphan", exclusive=True)]))
    assert other._lifetimes._task is not None
    other._lifetimes._task.cancel()  # it dies without a word
    await pass_time(system, clock, 20)
    assert await exists(system, "orphan")
    for _ in range(3):
        await pass_time(system, clock, 10)

    async def gone() -> bool:
        await pass_time(system, clock, 10)
        return not await exists(system, "orphan")

    await eventually(gone, "the orphan is removed")


async def test_a_queue_that_nobody_uses_expires_and_one_in_use_does_not(start_system: StartSystem) -> None:
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    await declare(system, Queue(name="unused", expires_ms=60_000), Queue(name="used", expires_ms=60_000))
    async with system.transport.subscribe("used", prefetch=1):
        await _hours(system, clock)
        assert await exists(system, "used")
        assert not await exists(system, "unused")

    async def gone() -> bool:
        await pass_time(system, clock, 10)
        return not await exists(system, "used")

    await eventually(gone, "the queue that was used is gone a minute later")


async def _hours(system: System, clock: ManualClock) -> None:
    async def gone() -> bool:
        await pass_time(system, clock, 10)
        return not await exists(system, "unused")

    await eventually(gone, "the unused queue expires")


# -- single active consumer -------------------------------------------------------------------------------------------


async def test_one_consumer_has_all_messages_and_the_next_takes_over_when_it_goes(start_system: StartSystem) -> None:
    system = await office(start_system)
    await declare(system, Queue(name="ordered", single_active_consumer=True))
    first: Subscription = system.transport.subscribe("ordered", prefetch=1)
    second: Subscription = system.transport.subscribe("ordered", prefetch=10)
    async with second:
        async with first:
            await send_to(system, "ordered", "a", "b", "c")
            (held,) = await take(first)
            waiting = asyncio.create_task(take(second, 2))
            await turn(system)
            assert not waiting.done()
            assert await counts(system, "ordered") == (2, 1, 0)
            await first.settle([ack(held)])
        assert texts(await waiting) == ["b", "c"]


async def test_the_next_takes_over_when_the_active_one_died_without_a_word(
    start_system: StartSystem, settings: Settings
) -> None:
    clock = manual_clock()
    system = await office(start_system, with_messaging(settings, lease_ms=30_000, poll_ms=1_000), clock=clock)
    await declare(system, Queue(name="ordered", single_active_consumer=True))
    first = system.transport.subscribe("ordered", prefetch=1)
    await first.__aenter__()
    await send_to(system, "ordered", "a", "b")
    await take(first)
    assert first._renewal is not None
    first._renewal.cancel()  # it dies without a word
    async with system.transport.subscribe("ordered", prefetch=10) as second:
        waiting = asyncio.create_task(take(second, 2))
        await pass_time(system, clock, 29)
        assert not waiting.done()
        await pass_time(system, clock, 2)
        assert sorted(texts(await waiting)) == ["a", "b"]
    await counts_become(system, (2, 0, 0), "ordered")


async def test_an_active_consumer_that_works_for_long_stays_the_active_one(
    start_system: StartSystem, settings: Settings
) -> None:
    clock = manual_clock()
    system = await office(start_system, with_messaging(settings, lease_ms=30_000, poll_ms=1_000), clock=clock)
    await declare(system, Queue(name="ordered", single_active_consumer=True))
    await send_to(system, "ordered", "a", "b")
    async with (
        system.transport.subscribe("ordered", prefetch=1) as first,
        system.transport.subscribe("ordered", prefetch=10) as second,
    ):
        (held,) = await take(first)
        waiting = asyncio.create_task(second.take())
        for _ in range(10):
            await pass_time(system, clock, 9)
        assert not waiting.done()
        await first.settle([ack(held)])
        assert texts(await take(first)) == ["b"]
        waiting.cancel()
