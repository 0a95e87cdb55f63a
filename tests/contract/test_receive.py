"""Receiving: what is delivered comes again until it is settled, to one consumer at a time, and is never lost."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from holdfast import observe
from holdfast.bootstrap import System
from holdfast.db.database import Tx
from holdfast.errors import AlreadySettled, HoldfastError
from holdfast.messaging.message import Delivery, ack, reject, retry
from holdfast.messaging.transport import Subscription
from holdfast.settings import Settings
from tests.conftest import WAIT_S, StartSystem, eventually
from tests.contract.notes import (
    QUEUE,
    Reader,
    counts,
    counts_become,
    deaf_twin,
    hear_each_other,
    manual_clock,
    needs_several_processes,
    needs_shared_database,
    note,
    office,
    opened,
    parked_messages,
    pass_time,
    publish,
    read,
    rolled_back,
    send,
    take,
    texts,
    turn,
    vanish,
    with_messaging,
)

LEASE_S = 1.0
# Polling this seldom cannot be what woke somebody within the time a test waits.
NO_POLLING = {"poll_ms": 60_000}


# -- settling ---------------------------------------------------------------------------------------------------------


async def test_ack_removes_the_message(start_system: StartSystem) -> None:
    system = await office(start_system)
    await send(system, "done")
    async with system.transport.subscribe(QUEUE, prefetch=1) as subscription:
        (delivery,) = await take(subscription)
        await subscription.settle([ack(delivery)])
        assert delivery.settled
    assert await counts(system) == (0, 0, 0)


async def test_messages_come_in_the_order_they_were_published(start_system: StartSystem) -> None:
    system = await office(start_system)
    bodies = [str(number) for number in range(30)]
    for body in bodies[:10]:
        await send(system, body)
    await send(system, *bodies[10:])
    async with system.transport.subscribe(QUEUE, prefetch=7) as subscription:
        got: list[str] = []
        while len(got) < len(bodies):
            deliveries = await subscription.take()
            got += texts(deliveries)
            await subscription.settle([ack(each) for each in deliveries])
    assert got == bodies


async def test_retry_redelivers_not_before_its_time_with_the_next_attempt(start_system: StartSystem) -> None:
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    await send(system, "again")
    async with system.transport.subscribe(QUEUE, prefetch=10) as subscription:
        (first,) = await take(subscription)
        await subscription.settle([retry(first, 5_000)])
        assert await counts(system) == (0, 0, 1)
        await pass_time(system, clock, 4.999_999)
        await send(system, "marker")
        assert texts(await take(subscription)) == ["marker"]  # the other one is not due for a microsecond yet
        assert await counts(system) == (0, 1, 1)
        await pass_time(system, clock, 0.000_001)
        (second,) = await take(subscription)
        assert read(second) == "again"
        assert (second.attempt, second.deliveries) == (2, 2)
        assert second.message == first.message


async def test_a_retry_that_does_not_count_keeps_the_attempt(start_system: StartSystem) -> None:
    system = await office(start_system)
    await send(system, "again")
    async with system.transport.subscribe(QUEUE, prefetch=1) as subscription:
        (first,) = await take(subscription)
        await subscription.settle([retry(first, 0, counts=False)])
        (second,) = await take(subscription)
        assert (second.attempt, second.deliveries) == (1, 2)


async def test_reject_parks_the_message_with_its_reason_and_loses_nothing(start_system: StartSystem) -> None:
    system = await office(start_system)
    (message_id,) = await send(system, "hopeless")
    async with system.transport.subscribe(QUEUE, prefetch=1) as subscription:
        (delivery,) = await take(subscription)
        await subscription.settle([reject(delivery, "nobody can read this")])
    assert await counts(system) == (0, 0, 0)
    (kept,) = await parked_messages(system)
    assert (kept.message_id, kept.body, kept.attempt) == (message_id, delivery.message.body, 1)
    assert kept.reason == "nobody can read this"


@pytest.mark.parametrize("reason", ["", "x" * 100_000, "a\x00b", "half a pair: \ud800", "世界 🦔"])
async def test_a_message_can_be_parked_whatever_the_reason_says(start_system: StartSystem, reason: str) -> None:
    system = await office(start_system)
    (message_id,) = await send(system, "hopeless")
    async with system.transport.subscribe(QUEUE, prefetch=1) as subscription:
        (delivery,) = await take(subscription)
        await subscription.settle([reject(delivery, reason)])
    assert [each.message_id for each in await parked_messages(system)] == [message_id]


async def test_deliveries_of_one_batch_are_settled_each_in_its_own_way(start_system: StartSystem) -> None:
    system = await office(start_system)
    await send(system, "acked", "retried", "rejected", "kept")
    async with system.transport.subscribe(QUEUE, prefetch=10) as subscription:
        one, two, three, _ = await take(subscription, 4)
        await subscription.settle([ack(one), retry(two, 60_000), reject(three, "no")])
        assert await counts(system) == (0, 1, 1)
        assert len(await parked_messages(system)) == 1


async def test_a_delivery_is_settled_once(start_system: StartSystem) -> None:
    system = await office(start_system)
    await send(system, "once")
    async with system.transport.subscribe(QUEUE, prefetch=1) as subscription:
        (delivery,) = await take(subscription)
        await subscription.settle([retry(delivery, 0)])
        with pytest.raises(AlreadySettled):
            await subscription.settle([ack(delivery)])
        (again,) = await take(subscription)  # the refused ack changed nothing
        assert again.attempt == 2


async def test_a_settlement_in_a_transaction_counts_with_its_commit(start_system: StartSystem) -> None:
    system = await office(start_system)
    needs_shared_database(system)
    await send(system, "done")
    async with system.transport.subscribe(QUEUE, prefetch=1) as subscription:
        (delivery,) = await take(subscription)
        async with rolled_back(system) as tx:
            await subscription.settle([ack(delivery)], tx)
        settled = [delivery.settled]
        assert await counts(system) == (0, 1, 0)
        async with system.database.transaction() as tx:
            await subscription.settle([ack(delivery)], tx)
            settled.append(delivery.settled)
        settled.append(delivery.settled)
        assert settled == [False, False, True]
    assert await counts(system) == (0, 0, 0)


# -- holding ----------------------------------------------------------------------------------------------------------


async def test_no_more_than_the_prefetch_is_held(start_system: StartSystem) -> None:
    system = await office(start_system)
    await send(system, "1", "2", "3", "4", "5")
    async with system.transport.subscribe(QUEUE, prefetch=2) as subscription:
        first, second = await take(subscription, 2)
        waiting = asyncio.create_task(take(subscription))
        await turn(system)
        assert await counts(system) == (3, 2, 0)
        assert not waiting.done()
        await subscription.settle([ack(second)])
        assert texts(await waiting) == ["3"]
        assert await counts(system) == (2, 2, 0)
        await subscription.settle([retry(first, 60_000)])
        assert texts(await take(subscription)) == ["4"]


async def test_stats_tell_ready_unacked_and_delayed_apart(start_system: StartSystem) -> None:
    system = await office(start_system)
    await send(system, "1", "2", "3")
    await send(system, "later", delay_ms=60_000)
    assert await counts(system) == (3, 0, 1)
    async with system.transport.subscribe(QUEUE, prefetch=2) as subscription:
        await take(subscription, 2)
        assert await counts(system) == (1, 2, 1)
        assert (await system.transport.stats(QUEUE)).total == 4
    assert await counts(system) == (3, 0, 1)


async def test_what_is_unsettled_is_given_back_at_once_when_the_subscription_closes(start_system: StartSystem) -> None:
    system = await office(start_system)
    await send(system, "1", "2")
    async with system.transport.subscribe(QUEUE, prefetch=10) as subscription:
        one, _ = await take(subscription, 2)
        await subscription.settle([ack(one)])
    assert await counts(system) == (1, 0, 0)
    async with system.transport.subscribe(QUEUE, prefetch=10) as subscription:
        (again,) = await take(subscription)
        assert (read(again), again.attempt, again.deliveries) == ("2", 1, 2)


async def test_nothing_is_in_flight_once_the_subscription_is_closed(start_system: StartSystem) -> None:
    system = await office(start_system)

    def in_flight() -> float:
        return observe.registry.get_sample_value("holdfast_messages_in_flight", {"queue": QUEUE}) or 0.0

    before = in_flight()
    await send(system, "1", "2")
    async with system.transport.subscribe(QUEUE, prefetch=10) as subscription:
        one, _ = await take(subscription, 2)
        assert in_flight() == before + 2
        await subscription.settle([ack(one)])
        assert in_flight() == before + 1
    assert in_flight() == before


async def test_stop_ends_a_waiting_take_and_what_is_held_may_still_be_settled(start_system: StartSystem) -> None:
    system = await office(start_system)
    await send(system, "held")
    async with system.transport.subscribe(QUEUE, prefetch=10) as subscription:
        (held,) = await take(subscription)
        waiting = asyncio.create_task(subscription.take())
        await turn(system)
        subscription.stop()
        assert await asyncio.wait_for(waiting, WAIT_S) == []
        assert await subscription.take() == []
        await subscription.settle([ack(held)])
    assert await counts(system) == (0, 0, 0)


async def test_a_message_comes_again_when_its_holder_vanished(start_system: StartSystem) -> None:
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    lease_s = system.settings.messaging.lease_ms / 1_000
    await send(system, "held")
    gone = system.transport.subscribe(QUEUE, prefetch=1)
    await gone.__aenter__()
    (lost,) = await take(gone)
    vanish(gone)
    async with system.transport.subscribe(QUEUE, prefetch=10) as subscription:
        await pass_time(system, clock, lease_s - 0.000_001)
        await send(system, "marker")
        assert texts(await take(subscription)) == ["marker"]  # the lease holds to its last microsecond
        await pass_time(system, clock, 0.000_001)
        (again,) = await take(subscription)
        assert (again.message, again.attempt, again.deliveries) == (lost.message, 1, 2)
        await subscription.settle([ack(again)])


async def test_a_waiting_consumer_gets_a_vanished_holders_message_by_itself(
    start_system: StartSystem, settings: Settings
) -> None:
    system = await office(start_system, with_messaging(settings, lease_ms=1_000, **NO_POLLING))
    await send(system, "held")
    gone = system.transport.subscribe(QUEUE, prefetch=1)
    await gone.__aenter__()
    await take(gone)
    vanish(gone)
    async with system.transport.subscribe(QUEUE, prefetch=1) as subscription:
        (again,) = await take(subscription)
        assert again.deliveries == 2


async def test_a_holder_whose_lease_ran_out_decides_no_more(start_system: StartSystem) -> None:
    """Putting it back or giving up on it is for who holds it now; only the news that it is done is always welcome."""
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    await send(system, "retried late", "rejected late", "given back late")
    late = system.transport.subscribe(QUEUE, prefetch=10)
    await late.__aenter__()
    first, second, _ = await take(late, 3)
    vanish(late)
    await pass_time(system, clock, system.settings.messaging.lease_ms / 1_000)
    async with system.transport.subscribe(QUEUE, prefetch=10) as subscription:
        held = await take(subscription, 3)
        await late.settle([retry(first, 0)])
        await late.settle([reject(second, "too late")])
        await late.__aexit__(None, None, None)
        assert await counts(system) == (0, 3, 0)
        assert await parked_messages(system) == []
        await subscription.settle([ack(each) for each in held])
    assert await counts(system) == (0, 0, 0)


async def test_a_slow_holder_keeps_its_message_beyond_the_lease(start_system: StartSystem) -> None:
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    lease_s = system.settings.messaging.lease_ms / 1_000
    await send(system, "slow")
    async with (
        system.transport.subscribe(QUEUE, prefetch=1) as slow,
        system.transport.subscribe(QUEUE, prefetch=10) as other,
    ):
        (delivery,) = await take(slow)
        for _ in range(12):
            await pass_time(system, clock, lease_s / 3)
        await send(system, "marker")
        assert texts(await take(other)) == ["marker"]
        await slow.settle([ack(delivery)])
        assert await counts(system) == (0, 1, 0)


# -- sharing ----------------------------------------------------------------------------------------------------------


async def all_done(systems: list[System], bodies: list[str]) -> list[Reader]:
    """Let two workers of each system share the queue until it is empty."""
    workers = [Reader(system) for system in systems for _ in range(2)]

    async def done() -> bool:
        return sum(len(worker.got) for worker in workers) >= len(bodies)

    await eventually(done, "every message was taken")
    for worker in workers:
        await worker.stop()
    return workers


async def test_workers_share_a_queue_without_doubles(start_system: StartSystem) -> None:
    system = await office(start_system)
    bodies = [str(number) for number in range(200)]
    await send(system, *bodies)
    workers = await all_done([system], bodies)
    assert sorted(body for worker in workers for body in worker.got) == sorted(bodies)
    assert all(worker.got for worker in workers)
    assert await counts(system) == (0, 0, 0)


async def test_workers_of_two_systems_share_a_queue_without_doubles(start_system: StartSystem) -> None:
    system = await office(start_system)
    needs_several_processes(system)
    other = await office(start_system)
    bodies = [str(number) for number in range(400)]
    await send(system, *bodies)
    workers = await all_done([system, other], bodies)
    assert sorted(body for worker in workers for body in worker.got) == sorted(bodies)
    assert all(worker.got for worker in workers)
    assert await counts(system) == (0, 0, 0)


# -- waking -----------------------------------------------------------------------------------------------------------


async def waiting_take(system: System, subscription: Subscription) -> asyncio.Task[list[Delivery]]:
    """A take that has looked, found nothing, and sleeps."""
    task = asyncio.create_task(take(subscription))
    await turn(system)
    assert not task.done()
    return task


async def test_a_waiting_consumer_is_woken_by_a_publish(start_system: StartSystem, settings: Settings) -> None:
    system = await office(start_system, with_messaging(settings, **NO_POLLING))
    async with system.transport.subscribe(QUEUE, prefetch=1) as subscription:
        waiting = await waiting_take(system, subscription)
        await send(system, "wake up")
        assert texts(await waiting) == ["wake up"]


async def test_a_waiting_consumer_is_woken_by_what_another_gives_back(
    start_system: StartSystem, settings: Settings
) -> None:
    system = await office(start_system, with_messaging(settings, lease_ms=60_000, **NO_POLLING))
    await send(system, "held", "put back")
    async with (
        system.transport.subscribe(QUEUE, prefetch=1) as subscription,
        system.transport.subscribe(QUEUE, prefetch=2) as holder,
    ):
        _, put_back = await take(holder, 2)
        waiting = await waiting_take(system, subscription)
        holder.stop()
        await holder.settle([retry(put_back, 0)])
        (again,) = await waiting
        await subscription.settle([ack(again)])
        waiting = await waiting_take(system, subscription)
        await holder.__aexit__(None, None, None)
        assert texts(await waiting) == ["held"]


async def two_systems(start_system: StartSystem, settings: Settings, **changes: int) -> tuple[System, System]:
    """Two systems on one database that hear each other; each stands for a process of its own."""
    system = await office(start_system, with_messaging(settings, **changes))
    needs_several_processes(system)
    other = await office(start_system, with_messaging(settings, **changes))
    await hear_each_other(system, 2)
    return system, other


async def test_a_publish_wakes_the_consumer_of_another_process(start_system: StartSystem, settings: Settings) -> None:
    system, other = await two_systems(start_system, settings, **NO_POLLING)
    async with (
        system.transport.subscribe(QUEUE, prefetch=1) as here,
        other.transport.subscribe(QUEUE, prefetch=1) as there,
    ):
        waiting = await waiting_take(other, there)
        await send(system, "over there")
        (delivery,) = await asyncio.wait_for(waiting, 5)
        await there.settle([ack(delivery)])
        waiting = await waiting_take(system, here)
        there.stop()
        await send(other, "and back")
        assert texts(await asyncio.wait_for(waiting, 5)) == ["and back"]


async def test_a_delayed_publish_wakes_the_consumer_of_another_process_on_time(
    start_system: StartSystem, settings: Settings
) -> None:
    system, other = await two_systems(start_system, settings, **NO_POLLING)
    async with other.transport.subscribe(QUEUE, prefetch=1) as there:
        waiting = await waiting_take(other, there)
        sent_us = system.clock.now_us()
        await send(system, "in a moment", delay_ms=300)
        assert texts(await asyncio.wait_for(waiting, 5)) == ["in a moment"]
        assert system.clock.now_us() - sent_us >= 300_000


async def test_a_retry_wakes_the_consumer_of_another_process(start_system: StartSystem, settings: Settings) -> None:
    """A process that puts a message back and leaves must not make the others wait for their next poll."""
    system, other = await two_systems(start_system, settings, lease_ms=60_000, **NO_POLLING)
    async with other.transport.subscribe(QUEUE, prefetch=1) as there:
        async with system.transport.subscribe(QUEUE, prefetch=1) as here:
            await send(system, "put back")
            (delivery,) = await take(here)
            waiting = await waiting_take(other, there)
            here.stop()
            await here.settle([retry(delivery, 0)])
        assert texts(await asyncio.wait_for(waiting, 5)) == ["put back"]


async def test_what_a_stopping_process_gives_back_wakes_the_consumer_of_another(
    start_system: StartSystem, settings: Settings
) -> None:
    system, other = await two_systems(start_system, settings, lease_ms=60_000, **NO_POLLING)
    async with other.transport.subscribe(QUEUE, prefetch=1) as there:
        async with system.transport.subscribe(QUEUE, prefetch=1) as here:
            await send(system, "given back")
            await take(here)
            waiting = await waiting_take(other, there)
        assert texts(await asyncio.wait_for(waiting, 5)) == ["given back"]


async def test_polling_finds_a_message_whose_wake_up_was_lost(start_system: StartSystem, settings: Settings) -> None:
    system = await office(start_system, with_messaging(settings, poll_ms=50))
    async with system.transport.subscribe(QUEUE, prefetch=1) as subscription:
        waiting = await waiting_take(system, subscription)
        assert await deaf_twin(system).publish([note(system, "unheard")]) == [None]
        assert texts(await waiting) == ["unheard"]


async def test_polling_finds_a_message_of_another_process_whose_wake_up_was_lost(
    start_system: StartSystem, settings: Settings
) -> None:
    system, other = await two_systems(start_system, settings, poll_ms=50)
    async with other.transport.subscribe(QUEUE, prefetch=1) as there:
        waiting = await waiting_take(other, there)
        assert await deaf_twin(system).publish([note(system, "unheard")]) == [None]
        assert texts(await waiting) == ["unheard"]


async def test_a_consumer_does_not_spin_while_another_process_locks_a_due_message(
    start_system: StartSystem, settings: Settings
) -> None:
    clock = manual_clock()
    system = await office(start_system, settings, clock)
    needs_several_processes(system)
    await send(system, "hello", cancel_key="locked")

    def requests() -> float:
        return observe.registry.get_sample_value("holdfast_group_commit_batch_size_sum", {"name": "main"}) or 0.0

    async with system.transport.subscribe(QUEUE, prefetch=1) as subscription:
        async with rolled_back(system) as tx:
            assert await system.outbox.cancel(tx, "locked") == 1
            before = requests()
            waiting = asyncio.create_task(take(subscription))
            for _ in range(50):
                await publish(system, [note(system, key="nobody", mandatory=False)])
            looks = requests() - before - 50
        await pass_time(system, clock, system.settings.messaging.poll_ms / 1_000)
        assert texts(await waiting) == ["hello"]
    assert looks <= 2  # the clock stands still: one look, then sleep until the next poll


async def test_a_locked_due_message_does_not_hide_when_the_next_one_is_due(
    start_system: StartSystem, settings: Settings
) -> None:
    clock = manual_clock()
    system = await office(start_system, with_messaging(settings, **NO_POLLING), clock)
    needs_several_processes(system)
    await send(system, "locked", cancel_key="locked")
    await send(system, "in 1 s", delay_ms=1_000)
    async with system.transport.subscribe(QUEUE, prefetch=1) as subscription, rolled_back(system) as tx:
        assert await system.outbox.cancel(tx, "locked") == 1
        waiting = asyncio.create_task(take(subscription))
        await pass_time(system, clock, 1)
        assert texts(await asyncio.wait_for(waiting, 5)) == ["in 1 s"]


async def test_a_message_that_becomes_due_while_the_consumer_looks_is_not_left_for_the_next_poll(
    start_system: StartSystem, settings: Settings
) -> None:
    clock = manual_clock()
    system = await office(start_system, with_messaging(settings, **NO_POLLING), clock)
    needs_shared_database(system)
    looked, commit = asyncio.Event(), asyncio.Event()

    async def slowly(tx: Tx, requests: Sequence[None]) -> list[HoldfastError | None]:
        looked.set()
        await commit.wait()
        return [None for _ in requests]

    await send(system, "in 1 s", delay_ms=1_000)
    async with system.transport.subscribe(QUEUE, prefetch=1) as subscription:
        # Both stand in one batch: the look comes first, and its transaction takes longer than the message's delay.
        waiting = asyncio.create_task(take(subscription))
        beside = asyncio.create_task(system.group.submit(slowly, None))
        await looked.wait()
        clock.advance(1)
        commit.set()
        await beside
        assert texts(await asyncio.wait_for(waiting, 5)) == ["in 1 s"]


async def test_a_restarted_system_gets_what_was_given_back_without_waiting_for_the_lease(settings: Settings) -> None:
    patient = with_messaging(settings, lease_ms=600_000, **NO_POLLING)
    async with opened(patient) as system:
        await send(system, "held")
        async with system.transport.subscribe(QUEUE, prefetch=1) as subscription:
            await take(subscription)
    async with opened(patient) as system, system.transport.subscribe(QUEUE, prefetch=1) as subscription:
        (again,) = await take(subscription)
        assert (again.attempt, again.deliveries) == (1, 2)


async def test_one_process_alone_takes_over_at_once_what_its_predecessor_held_when_it_died(settings: Settings) -> None:
    patient = with_messaging(settings, lease_ms=600_000, **NO_POLLING)
    async with opened(patient) as system:
        if system.transport.features.several_processes:
            pytest.skip("where others may work, a lease is void only when it runs out")
        await send(system, "held")
        gone = system.transport.subscribe(QUEUE, prefetch=1)
        await gone.__aenter__()
        await take(gone)
        vanish(gone)
    async with opened(patient) as system, system.transport.subscribe(QUEUE, prefetch=1) as subscription:
        (again,) = await take(subscription)
        assert again.deliveries == 2
        await counts_become(system, (0, 1, 0))
