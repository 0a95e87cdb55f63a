"""Giving up on many messages in one settlement: each with its own reason, to its own place, replayed or not."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from holdfast.db.prepared import COPY_FROM
from holdfast.messaging.dead_letters import deaths
from holdfast.messaging.message import HEADER_PARKED_ID, ack, park, reject, retry
from holdfast.messaging.topology import Binding, Exchange, Queue, Topology
from tests.conftest import StartSystem
from tests.contract.notes import (
    EXCHANGE,
    QUEUE,
    counts,
    counts_become,
    note,
    office,
    parked_messages,
    publish,
    read,
    send,
    take,
    texts,
)
from tests.contract.test_error_store import actions, copied, everything, state, store_of

BULK = 2 * COPY_FROM + 20  # more than one claim by halves, and by COPY where there is one


def numbers(count: int, prefix: str = "") -> list[str]:
    return [f"{prefix}{number}" for number in range(count)]


@pytest.mark.parametrize("count", [COPY_FROM - 1, COPY_FROM, BULK])
async def test_many_are_parked_each_with_its_reason(start_system: StartSystem, count: int) -> None:
    system = await office(start_system)
    await publish(system, [note(system, each) for each in numbers(count)])
    async with system.transport.subscribe(QUEUE, prefetch=2 * count) as subscription:
        held = await take(subscription, count)
        odd = ["nul \x00 inside", "half a pair \ud800", "x" * 50_000, "", "two\nlines"]
        settlements = [park(each, f"{read(each)}: {odd[at % len(odd)]}") for at, each in enumerate(held)]
        await subscription.settle(settlements)
        assert all(each.settled for each in held)
    assert await counts(system) == (0, 0, 0)
    kept = await parked_messages(system)
    assert sorted(each.message_id for each in kept) == sorted(each.message.message_id for each in held)
    for each in kept:
        assert each.reason.startswith(f"{json.loads(each.body)['text']}: ")


async def test_replayed_ones_and_fresh_ones_are_parked_in_one_settlement(start_system: StartSystem) -> None:
    """A replayed one goes back to the row it came from and is counted there; a fresh one gets a row of its own."""
    system = await office(start_system)
    store = store_of(system)
    await publish(system, [note(system, each) for each in numbers(30, "old ")])
    async with system.transport.subscribe(QUEUE, prefetch=30) as subscription:
        first = await take(subscription, 30)
        await subscription.settle([park(each, "first failure") for each in first])
    old = {each.message_id: each.id for each in await everything(system)}
    assert (await store.replay(list(old.values()), actor="ann")).count == 30
    await publish(system, [note(system, each) for each in numbers(BULK, "new ")])

    async with system.transport.subscribe(QUEUE, prefetch=2 * BULK) as subscription:
        held = await take(subscription, 30 + BULK)
        replayed = [each for each in held if HEADER_PARKED_ID in each.message.headers]
        assert len(replayed) == 30
        done, failed = replayed[:10], replayed[10:]
        fresh = [each for each in held if each not in replayed]
        # Mixed as they may come: one settlement of three kinds.
        mixed = [settlement for pair in zip(failed, fresh, strict=False) for settlement in pair]
        mixed += fresh[len(failed) :]
        settlements = [park(each, f"{read(each)} failed") for each in mixed] + [ack(each) for each in done]
        await subscription.settle(settlements)
    assert await counts(system) == (0, 0, 0)
    rows = {each.message_id: each for each in await everything(system)}
    assert len(rows) == 30 + BULK
    for each in failed:
        row = rows[each.message.message_id]
        assert (row.id, row.state, row.loops) == (old[each.message.message_id], "parked", 1)
        assert (await store.show(row.id)).reason == f"{read(each)} failed"
    for each in done:
        assert await state(system, old[each.message.message_id]) == ("done", 0)
    for each in fresh:
        row = rows[each.message.message_id]
        assert (row.state, row.loops) == ("parked", 0)
    assert [action for _, action in await actions(system, old[failed[0].message.message_id])][-1] == "failed again"


async def test_many_are_rejected_with_different_reasons(start_system: StartSystem) -> None:
    system = await office(start_system)
    await publish(system, [note(system, each) for each in numbers(BULK)])
    reasons = ["no use", "too old", "unknown buyer"]
    async with system.transport.subscribe(QUEUE, prefetch=2 * BULK) as subscription:
        held = await take(subscription, BULK)
        wanted = {each.message.message_id: reasons[at % 3] for at, each in enumerate(held)}
        await subscription.settle([reject(each, wanted[each.message.message_id]) for each in reversed(held)])
    assert await counts(system) == (0, 0, 0)
    assert {each.message_id: each.reason for each in await parked_messages(system)} == wanted


async def test_many_are_rejected_to_the_dead_letter_exchanges_of_their_queues(start_system: StartSystem) -> None:
    """One settlement for each queue, with acks and retries between; limits of the dead queue hold for the bulk."""
    system = await office(start_system)
    await system.transport.declare(
        Topology(
            exchanges=[
                Exchange(name=EXCHANGE, kind="topic"),
                Exchange(name="dlx", kind="fanout"),
                Exchange(name="nowhere", kind="fanout"),
            ],
            queues=[
                Queue(name="dead"),
                Queue(name="dead.short", max_length=7),
                Queue(name="first", dead_letter_exchange="dlx"),
                Queue(name="second", dead_letter_exchange="", dead_letter_routing_key="dead.short"),
                Queue(name="third", dead_letter_exchange="nowhere"),
            ],
            bindings=[
                Binding(exchange="dlx", queue="dead"),
                *(Binding(exchange=EXCHANGE, queue=each, routing_key=each) for each in ("first", "second", "third")),
            ],
        )
    )
    reasons = ["no use", "too old"]
    for queue in ("first", "second", "third"):
        await publish(system, [note(system, each, key=queue) for each in numbers(BULK, f"{queue} ")])
        async with system.transport.subscribe(queue, prefetch=2 * BULK) as subscription:
            held = await take(subscription, BULK)
            settlements = [reject(each, reasons[at % 2]) for at, each in enumerate(held)]
            settlements[3], settlements[8] = ack(held[3]), retry(held[8], 600_000)
            await subscription.settle(settlements)
        await counts_become(system, (0, 0, 1), queue)
    assert await counts(system, "dead") == (BULK - 2, 0, 0)
    assert await counts(system, "dead.short") == (7, 0, 0)
    stranded = await parked_messages(system, "third")
    assert len(stranded) == BULK - 2
    assert Counter("rejected" in each.reason and "nowhere" in each.reason for each in stranded) == {True: BULK - 2}

    async with system.transport.subscribe("dead", prefetch=2 * BULK) as subscription:
        letters = await take(subscription, BULK - 2)
    wanted = [name for at, name in enumerate(numbers(BULK, "first ")) if at not in (3, 8)]
    assert sorted(texts(letters)) == sorted(wanted)
    for letter in letters:
        (death,) = deaths(letter.message.headers)
        assert (death.queue, death.reason, death.count) == ("first", "rejected", 1)


async def test_a_bulk_that_is_given_up_on_twice_leaves_one_row_each(start_system: StartSystem) -> None:
    """The second holder's word counts: what a lost lease settles late changes nothing."""
    system = await office(start_system)
    await send(system, *numbers(COPY_FROM + 5))
    async with system.transport.subscribe(QUEUE, prefetch=200) as subscription:
        held = await take(subscription, COPY_FROM + 5)
        await subscription.settle([park(each, "given up") for each in held])
        late = [park(copied(each), "too late") for each in held]
        await subscription.settle(late)
    assert Counter(each.reason for each in await parked_messages(system)) == {"given up": COPY_FROM + 5}
