"""Prefetch: never more is held than allowed, a large one is fetched by halves, and everything comes in the end."""

from __future__ import annotations

import asyncio
import random

import pytest

from holdfast.bootstrap import System
from holdfast.messaging import listener as listening
from holdfast.messaging.injection import Incoming
from holdfast.messaging.message import Delivery, ack, retry
from holdfast.messaging.retry import RetryPolicy
from holdfast.messaging.transport import Subscription
from holdfast.settings import Settings
from tests.conftest import WAIT_S, StartSystem, eventually
from tests.contract.notes import (
    QUEUE,
    counts,
    counts_become,
    manual_clock,
    note,
    office,
    pass_time,
    plainly,
    publish,
    send,
    texts,
    turn,
    with_messaging,
)

PATIENT = {"lease_ms": 600_000, "poll_ms": 60_000}


def numbers(count: int) -> list[str]:
    return [str(number) for number in range(count)]


async def stock(system: System, count: int) -> list[str]:
    """Fill the queue; answers the texts in order."""
    await publish(system, [note(system, each) for each in numbers(count)])
    return numbers(count)


async def waits(system: System, subscription: Subscription) -> asyncio.Task[list[Delivery]]:
    """A take that has looked and found no room, or nothing."""
    task = asyncio.create_task(subscription.take())
    await turn(system)
    assert not task.done()
    return task


@pytest.mark.parametrize(("prefetch", "claims"), [(49, [49]), (50, [25, 25]), (51, [25, 25]), (60, [30, 30])])
async def test_a_large_prefetch_is_claimed_by_halves_and_a_small_one_at_once(
    start_system: StartSystem, settings: Settings, prefetch: int, claims: list[int]
) -> None:
    system = await office(start_system, with_messaging(settings, **PATIENT))
    bodies = await stock(system, 200)
    got: list[str] = []
    async with system.transport.subscribe(QUEUE, prefetch=prefetch) as subscription:
        for claim in claims:
            deliveries = await subscription.take()
            assert len(deliveries) == claim
            got += texts(deliveries)
        waiting = await waits(system, subscription)
        assert await counts(system) == (200 - sum(claims), sum(claims), 0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    assert got == bodies[: len(got)]


async def test_of_a_large_prefetch_a_quarter_must_be_free_before_more_is_claimed(
    start_system: StartSystem, settings: Settings
) -> None:
    system = await office(start_system, with_messaging(settings, **PATIENT))
    await stock(system, 200)
    async with system.transport.subscribe(QUEUE, prefetch=60) as subscription:
        held = await subscription.take() + await subscription.take()
        waiting = await waits(system, subscription)
        await subscription.settle([ack(each) for each in held[:14]])
        await turn(system)
        assert not waiting.done()
        await subscription.settle([ack(held[14])])
        assert len(await asyncio.wait_for(waiting, WAIT_S)) == 15
        assert await counts(system) == (200 - 75, 60, 0)
        await subscription.settle([ack(each) for each in held[15:]])
        assert len(await subscription.take()) == 30  # half at most, although there is room for 45


@pytest.mark.parametrize("prefetch", [1, 49, 50, 64])
async def test_never_more_is_held_and_everything_comes(start_system: StartSystem, prefetch: int) -> None:
    """Settled in random pieces, some of it by a retry; what is held is counted on both sides."""
    system = await office(start_system)
    bodies = await stock(system, 300)
    chance = random.Random(prefetch)
    got: list[str] = []
    held: list[Delivery] = []
    again = 0
    async with asyncio.timeout(WAIT_S), system.transport.subscribe(QUEUE, prefetch=prefetch) as subscription:
        while len(got) < len(bodies):
            if (await counts(system))[0] > 0:
                held += await subscription.take()
            assert 0 < len(held) <= prefetch
            assert (await counts(system))[1] == len(held)
            chance.shuffle(held)
            # Always so much that there is room for another claim.
            some = chance.randint(max(1, -(-prefetch // 4) - (prefetch - len(held))), len(held))
            now, held = held[:some], held[some:]
            back = [each for each in now if each.attempt == 1 and chance.random() < 0.2]
            again += len(back)
            got += texts([each for each in now if each not in back])
            await subscription.settle([retry(each, 0) if each in back else ack(each) for each in now])
    assert sorted(got) == sorted(bodies)
    assert again > 0
    assert await counts(system) == (0, 0, 0)


@pytest.mark.parametrize("prefetch", [10, 60])
async def test_a_limit_of_zero_takes_nothing_until_it_is_raised_again(
    start_system: StartSystem, settings: Settings, prefetch: int
) -> None:
    system = await office(start_system, with_messaging(settings, **PATIENT))
    await stock(system, 100)
    async with system.transport.subscribe(QUEUE, prefetch=prefetch) as subscription:
        first = await subscription.take()
        subscription.limit(0)
        await subscription.settle([ack(each) for each in first])
        waiting = await waits(system, subscription)
        await send(system, "a wake-up changes nothing")
        await turn(system)
        assert not waiting.done()
        assert (await counts(system))[1] == 0
        subscription.limit(prefetch)
        assert len(await asyncio.wait_for(waiting, WAIT_S)) == len(first)


@pytest.mark.parametrize(("before", "after", "more"), [(10, 20, 10), (10, 100, 50), (60, 120, 60), (60, 61, 0)])
async def test_a_raised_limit_is_used_at_once(
    start_system: StartSystem, settings: Settings, before: int, after: int, more: int
) -> None:
    system = await office(start_system, with_messaging(settings, **PATIENT))
    await stock(system, 200)
    async with system.transport.subscribe(QUEUE, prefetch=before) as subscription:
        held: list[Delivery] = []
        while len(held) < before:
            held += await subscription.take()
        waiting = await waits(system, subscription)
        subscription.limit(after)
        if more:
            assert len(await asyncio.wait_for(waiting, WAIT_S)) == more
        else:  # room for one is not worth a transaction
            await turn(system)
            assert not waiting.done()
            await subscription.settle([ack(each) for each in held])
            assert len(await asyncio.wait_for(waiting, WAIT_S)) == after // 2


@pytest.mark.parametrize(("before", "after"), [(20, 5), (100, 60), (100, 5)])
async def test_under_a_lowered_limit_nothing_is_taken_until_less_is_held(
    start_system: StartSystem, settings: Settings, before: int, after: int
) -> None:
    system = await office(start_system, with_messaging(settings, **PATIENT))
    await stock(system, 300)
    async with system.transport.subscribe(QUEUE, prefetch=before) as subscription:
        held: list[Delivery] = []
        while len(held) < before:
            held += await subscription.take()
        subscription.limit(after)
        waiting = await waits(system, subscription)
        await subscription.settle([ack(each) for each in held[: before - after]])
        await turn(system)
        assert not waiting.done()
        assert (await counts(system))[1] == after
        await subscription.settle([ack(each) for each in held[before - after :]])
        assert len(await asyncio.wait_for(waiting, WAIT_S)) == (after if after < 50 else after // 2)


async def test_a_paused_listener_takes_nothing_and_a_resumed_one_as_before(
    start_system: StartSystem, settings: Settings
) -> None:
    system = await office(start_system, with_messaging(settings, **PATIENT))
    got: list[str] = []
    most = 0
    held = 0
    opened = asyncio.Event()

    async def handle(incoming: Incoming) -> None:
        nonlocal held, most
        held += 1
        most = max(most, held)
        await opened.wait()
        got.append(incoming.body.text)
        held -= 1

    listener = system.listen(plainly(handle, prefetch=60, concurrency=200))
    listener.pause()
    bodies = await stock(system, 150)
    await turn(system)
    assert await counts(system) == (150, 0, 0)
    listener.resume()
    await counts_become(system, (90, 60, 0))
    await turn(system)
    assert most == 60
    listener.pause()
    opened.set()
    await counts_become(system, (90, 0, 0))
    await turn(system)
    assert len(got) == 60
    listener.resume()
    await counts_become(system, (0, 0, 0))
    assert sorted(got) == sorted(bodies)
    assert most <= 60


async def test_many_listeners_on_one_queue_lose_and_double_nothing(start_system: StartSystem) -> None:
    system = await office(start_system)
    got: list[str] = []

    async def handle(incoming: Incoming) -> None:
        await asyncio.sleep(0)
        got.append(incoming.body.text)

    for number in range(3):
        system.listen(plainly(handle, name=f"reader {number}", prefetch=50 + number))
    bodies = await stock(system, 600)

    async def all_came() -> bool:
        return len(got) >= len(bodies)

    await eventually(all_came, "all were handled")
    await counts_become(system, (0, 0, 0))
    assert sorted(got) == sorted(bodies)


async def test_what_waits_for_a_local_retry_takes_no_room_from_others(start_system: StartSystem) -> None:
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    got: list[str] = []

    async def handle(incoming: Incoming) -> None:
        got.append(incoming.body.text)
        if incoming.body.text.startswith("poison") and got.count(incoming.body.text) == 1:
            raise ValueError("not now")

    system.listen(plainly(handle, prefetch=1, local=RetryPolicy(tries=2, interval_ms=1_000)))
    await send(system, "poison 1", "poison 2", "good")
    await settles_at(system, (0, 2, 0))
    assert got == ["poison 1", "poison 2", "good"]
    await pass_time(system, clock, 1)
    await settles_at(system, (0, 0, 0))
    assert sorted(got[3:]) == ["poison 1", "poison 2"]


async def test_so_many_may_wait_for_a_local_retry_and_the_next_is_put_back_at_once(
    start_system: StartSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "ASIDE_MAX", 2)
    system = await office(start_system, clock=manual_clock())

    async def handle(incoming: Incoming) -> None:
        raise ValueError("not now")

    patient = RetryPolicy(tries=5, interval_ms=60_000)
    system.listen(plainly(handle, prefetch=1, local=patient, durable=patient, outage_after=100))
    await send(system, "1", "2", "3", "4")
    await settles_at(system, (0, 2, 2))


async def test_a_paused_listener_takes_nothing_although_messages_wait_for_a_local_retry(
    start_system: StartSystem,
) -> None:
    clock = manual_clock()
    system = await office(start_system, clock=clock)

    async def handle(incoming: Incoming) -> None:
        raise ValueError("not now")

    patient = RetryPolicy(tries=5, interval_ms=60_000)
    listener = system.listen(plainly(handle, prefetch=5, local=patient))
    await send(system, "1")
    await settles_at(system, (0, 1, 0))
    listener.pause()
    await send(system, "2")
    await pass_time(system, clock, 60)
    assert await counts(system) == (1, 1, 0)


async def settles_at(system: System, wanted: tuple[int, int, int]) -> None:
    """Let all happen that can, a few rounds of it, until the counts are those."""
    for _ in range(50):
        await turn(system)
        if await counts(system) == wanted:
            return
    assert await counts(system) == wanted
