"""The error store: parked messages are grouped, shown, edited, replayed once and discarded, and the audit knows it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from sqlalchemy import delete, select

from holdfast.audit import audit
from holdfast.bootstrap import System
from holdfast.db.database import Tx
from holdfast.errors import Conflict, InvalidInput
from holdfast.messaging.draft import Draft
from holdfast.messaging.error_store import CHUNK, ErrorStore
from holdfast.messaging.injection import Incoming
from holdfast.messaging.message import HEADER_PARKED_ID, Delivery, ack, reject, retry
from holdfast.messaging.message import park as park_it
from holdfast.messaging.parked import Outcome, ParkedSummary
from holdfast.messaging.recover import DeadLetter, Republish, error_topology
from holdfast.messaging.tables import bindings, messages, queues
from holdfast.messaging.topology import Binding, Exchange, Queue, Topology
from holdfast.settings import Settings
from tests.conftest import StartSystem, eventually
from tests.contract.notes import (
    EXCHANGE,
    KEY,
    QUEUE,
    Ledger,
    Note,
    counts,
    counts_become,
    effectively,
    manual_clock,
    needs_several_processes,
    note,
    office,
    opened,
    parks,
    plainly,
    publish,
    raw,
    read,
    rolled_back,
    send,
    take,
    vanish,
    with_messaging,
)

BOTH = "notes.archive"
ARCHIVED = Topology(
    exchanges=[Exchange(name=EXCHANGE, kind="topic")],
    queues=[Queue(name=BOTH)],
    bindings=[Binding(exchange=EXCHANGE, queue=BOTH, routing_key=KEY)],
)
TRACE = 'Traceback (most recent call last):\n  File "/app/a.py", line 7, in f\n    g()\n'


def store_of(system: System) -> ErrorStore:
    return system.messaging.error_store


async def taken(system: System, count: int = 1) -> list[Delivery]:
    """Take so many messages; they stay leased by a holder that is gone."""
    async with system.transport.subscribe(QUEUE, prefetch=max(count, 1)) as subscription:
        deliveries = await take(subscription, count)
        subscription._held.clear()
        return deliveries


async def settle(system: System, *settlements: Any) -> None:
    """Settle from outside of any subscription that took them."""
    await system.transport.subscribe(QUEUE, prefetch=1).settle(settlements)


def copied(delivery: Delivery) -> Delivery:
    """The same delivery as its holder knew it before it was settled."""
    return Delivery(
        message=delivery.message,
        queue=delivery.queue,
        attempt=delivery.attempt,
        deliveries=delivery.deliveries,
        receipt=delivery.receipt,
    )


async def park(system: System, *bodies: str, reason: str = "nobody can read this", **options: Any) -> list[int]:
    """Publish notes and reject each; answers their ids in the error store, in order of the bodies."""
    message_ids = await send(system, *bodies, **options)
    before = {each.id for each in await everything(system)}
    deliveries = await taken(system, len(bodies))
    await settle(system, *(reject(each, reason) for each in deliveries))
    new = {each.message_id: each.id for each in await everything(system) if each.id not in before}
    return [new[each] for each in message_ids]


async def everything(system: System) -> Sequence[ParkedSummary]:
    return await store_of(system).list(states=["parked", "pending", "done", "discarded"], limit=1_000)


async def state(system: System, parked_id: int) -> tuple[str, int]:
    """The state of a message and how often its replays failed."""
    shown = await store_of(system).show(parked_id)
    return shown.state, shown.loops


async def becomes(system: System, parked_id: int, wanted: str) -> None:
    async def reached() -> bool:
        return (await state(system, parked_id))[0] == wanted

    await eventually(reached, f"message {parked_id} is {wanted}")


async def actions(system: System, parked_id: int) -> list[tuple[str, str]]:
    """What was done with a message, and by whom."""
    return [(each.actor, each.action) for each in (await store_of(system).show(parked_id)).audit]


# -- groups, list, show -----------------------------------------------------------------------------------------------


async def test_failures_of_one_cause_are_one_group(start_system: StartSystem) -> None:
    system = await office(start_system)

    async def fail(incoming: Incoming) -> None:
        if incoming.body.text.startswith("odd"):
            raise KeyError(incoming.body.text)
        raise ValueError(f"no room for {incoming.body.text}")

    system.listen(plainly(fail))
    await send(system, "one", "two", "three", "odd one")
    await publish(system, [raw(note(system), body=b"{")])
    await parks(system, 5)

    groups = await store_of(system).groups()

    assert (groups[0].error, groups[0].count) == ("ValueError", 3)
    assert sorted((each.error, each.count) for each in groups[1:]) == [("CannotDecode", 1), ("KeyError", 1)]
    assert {each.queue for each in groups} == {QUEUE}
    assert {each.type for each in groups} == {"test.note"}
    first = groups[0]
    assert first.reason.startswith("ValueError: no room for ")
    rows = await store_of(system).list(group=first.group)
    assert {each.error for each in rows} == {"ValueError"}
    assert (first.first_us, first.last_us) == (min(r.parked_us for r in rows), max(r.failed_us for r in rows))
    assert first.first_us <= system.clock.now_us()


async def test_failures_of_an_effect_are_grouped_by_the_place_they_come_from(start_system: StartSystem) -> None:
    """Although they reach the listener by way of a transaction that was shared, and then split, among many."""
    system = await office(start_system)

    async def here(text: str) -> None:
        raise ValueError(f"no room for {text}")

    async def there(text: str) -> None:
        raise ValueError(f"no room for {text}")

    async def effect(_: Tx, notes: Sequence[Note]) -> None:
        for each in notes:
            await (here if each.text.startswith("h") else there)(each.text)

    system.listen(effectively(effect))
    await send(system, "h1", "h2", "t1", "h3", "t2")
    await parks(system, 5)
    groups = await store_of(system).groups()
    assert [(each.error, each.count) for each in groups] == [("ValueError", 3), ("ValueError", 2)]
    for each in groups:
        rows = await store_of(system).list(group=each.group)
        assert len({row.reason[: len("ValueError: no room for h")] for row in rows}) == 1
    for row in await store_of(system).list():
        own = msgspec.json.decode((await store_of(system).show(row.id)).body, type=Note).text
        assert {text for text in ("h1", "h2", "t1", "h3", "t2") if f"room for {text}" in row.reason} == {own}


async def test_one_failure_in_two_queues_is_two_groups(start_system: StartSystem) -> None:
    system = await office(start_system)
    await system.transport.declare(ARCHIVED)
    await park(system, "hopeless")
    async with system.transport.subscribe(BOTH, prefetch=1) as subscription:
        (copy,) = await take(subscription)
        await subscription.settle([reject(copy, "nobody can read this")])
    groups = await store_of(system).groups()
    assert sorted((each.queue, each.count) for each in groups) == [(BOTH, 1), (QUEUE, 1)]
    assert len({each.group for each in groups}) == 2
    assert [each.queue for each in await store_of(system).groups(BOTH)] == [BOTH]


async def test_the_list_is_paged_and_filtered(start_system: StartSystem) -> None:
    system = await office(start_system)
    store = store_of(system)
    ids = sorted(await park(system, "a", "b", "c", "d", "e"))
    (other,) = await park(system, "f", reason="another reason")
    paged: list[int] = []
    while page := await store.list(limit=2, after=paged[-1] if paged else 0):
        assert len(page) <= 2
        paged += [each.id for each in page]
    assert paged == [*ids, other]
    group = (await store.show(other)).group
    assert [each.id for each in await store.list(group=group)] == [other]
    assert [each.id for each in await store.list(QUEUE)] == [*ids, other]
    assert await store.list("no.queue") == []
    await store.discard([ids[0]], actor="ann", reason="old")
    assert [each.id for each in await store.list()] == [*ids[1:], other]
    assert [each.id for each in await store.list(states=["discarded"])] == [ids[0]]


async def test_a_message_is_shown_with_all_it_came_with(start_system: StartSystem) -> None:
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    outgoing = raw(note(system, "世界"), headers={"tenant": "blue"}, body=b'{"text":"\\u0000"}')
    await publish(system, [outgoing])
    (delivery,) = await taken(system)
    clock.advance(1)
    await settle(system, reject(delivery, "ValueError: no\nTraceback ..."))
    (row,) = await everything(system)

    shown = await store_of(system).show(row.id)

    message = outgoing.message
    assert (shown.body, shown.headers) == (message.body, {"tenant": "blue"})
    assert (shown.message_id, shown.type, shown.content_type) == (
        message.message_id,
        "test.note",
        "application/json",
    )
    assert (shown.exchange, shown.routing_key, shown.queue) == (EXCHANGE, KEY, QUEUE)
    assert (shown.attempt, shown.deliveries, shown.loops, shown.state) == (1, 1, 0, "parked")
    assert (shown.published_us, shown.parked_us, shown.failed_us) == (
        message.timestamp_us,
        message.timestamp_us + 1_000_000,
        message.timestamp_us + 1_000_000,
    )
    assert shown.reason == "ValueError: no\nTraceback ..."
    assert shown.audit == ()
    assert shown.error_headers == {
        "x-original-exchange": EXCHANGE,
        "x-original-routingKey": KEY,
        "x-exception-message": "ValueError: no",
        "x-exception-stacktrace": "Traceback ...",
    }


# -- replay -----------------------------------------------------------------------------------------------------------


async def test_a_replay_goes_to_its_own_queue_with_its_own_id_and_ends_done(start_system: StartSystem) -> None:
    system = await office(start_system)
    store = store_of(system)
    (parked_id,) = await park(system, "hopeless")
    await system.transport.declare(ARCHIVED)
    before = await store.show(parked_id)

    assert await store.replay([parked_id], actor="ann", reason="fixed in 1.2") == Outcome(ids=(parked_id,))

    assert await counts(system) == (1, 0, 0)
    assert await counts(system, BOTH) == (0, 0, 0)  # it would have had its own copy
    assert await state(system, parked_id) == ("pending", 0)
    async with system.transport.subscribe(QUEUE, prefetch=5) as subscription:
        (again,) = await take(subscription)
        assert (again.message.message_id, again.message.body) == (before.message_id, before.body)
        assert (again.message.exchange, again.message.routing_key) == (EXCHANGE, KEY)
        assert again.message.timestamp_us == before.published_us
        assert (again.attempt, again.deliveries) == (1, 1)
        assert again.message.headers == {HEADER_PARKED_ID: str(parked_id)}
        await subscription.settle([ack(again)])
    assert await state(system, parked_id) == ("done", 0)
    assert await actions(system, parked_id) == [("ann", "replay"), ("holdfast", "done")]
    assert (await store.show(parked_id)).audit[0].reason == "fixed in 1.2"
    assert await store.list() == []
    assert await store.groups() == []
    assert await store.replay([parked_id], actor="ann") == Outcome(ids=(), left={parked_id: "done"})
    assert await counts(system) == (0, 0, 0)


async def test_a_replay_that_fails_again_comes_back_to_its_row(start_system: StartSystem) -> None:
    system = await office(start_system)
    store = store_of(system)
    (parked_id,) = await park(system, "hopeless")
    first = await store.show(parked_id)
    for loop in (1, 2):
        await store.replay([parked_id], actor="ann")
        (again,) = await taken(system)
        await settle(system, retry(again, 0))
        (again,) = await taken(system)
        assert again.attempt == 2
        assert await state(system, parked_id) == ("pending", loop - 1)
        await settle(system, reject(again, f"KeyError: {loop}\n{TRACE}KeyError: {loop}\n"))
        assert await counts(system) == (0, 0, 0)
        assert [each.id for each in await everything(system)] == [parked_id]
        assert await state(system, parked_id) == ("parked", loop)
    shown = await store.show(parked_id)
    assert (shown.error, shown.reason[:12], shown.attempt, shown.deliveries) == ("KeyError", "KeyError: 2\n", 2, 5)
    assert shown.group != first.group
    assert (shown.body, shown.headers, shown.parked_us) == (first.body, first.headers, first.parked_us)
    assert shown.failed_us >= first.failed_us
    twice = [("ann", "replay"), ("holdfast", "failed again")] * 2
    assert await actions(system, parked_id) == twice
    assert shown.audit[-1].reason == "KeyError: 2"


async def test_after_the_fix_each_effect_happens_once(start_system: StartSystem) -> None:
    system = await office(start_system)
    ledger = await Ledger.of(system)
    broken = True

    async def effect(tx: Tx, notes: Sequence[Note]) -> None:
        await ledger.write(tx, notes)
        if broken:
            raise ZeroDivisionError

    system.listen(effectively(effect))
    await send(system, "one", "two", "three")
    await parks(system, 3)
    assert await ledger.entries() == []
    (group,) = await store_of(system).groups()
    broken = False

    outcome = await store_of(system).replay(group=group.group, actor="ann")

    assert outcome.count == 3
    await counts_become(system, (0, 0, 0))
    assert sorted(await ledger.entries()) == ["one", "three", "two"]
    assert [await state(system, each) for each in outcome.ids] == [("done", 0)] * 3


async def test_an_effect_that_has_happened_already_is_dropped_by_the_inbox(start_system: StartSystem) -> None:
    """Two copies of one message: one was handled, the other was parked and is replayed."""
    system = await office(start_system)
    ledger = await Ledger.of(system)
    (parked_id,) = await park(system, "once", message_id="same")
    system.listen(effectively(ledger.write))
    await send(system, "once", message_id="same")
    await ledger.holds(1)

    await store_of(system).replay([parked_id], actor="ann")

    await counts_become(system, (0, 0, 0))
    assert await ledger.entries() == ["once"]
    assert await state(system, parked_id) == ("done", 0)


async def test_a_replay_wakes_a_consumer_that_waits(start_system: StartSystem, settings: Settings) -> None:
    system = await office(start_system, with_messaging(settings, poll_ms=60_000))
    ledger = await Ledger.of(system)
    (parked_id,) = await park(system, "again")
    system.listen(effectively(ledger.write))
    await send(system, "warm up")
    await ledger.holds(1)
    await store_of(system).replay([parked_id], actor="ann")
    await ledger.holds(2)  # long before the next poll


async def test_a_rate_spreads_the_instants_at_which_replays_are_due(start_system: StartSystem) -> None:
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    ids = await park(system, "a", "b", "c", "d")
    start_us = clock.now_us()

    await store_of(system).replay(everything=True, actor="ann", per_second=3)

    async with system.database.read() as tx:
        rows = (await tx.execute(select(messages.c.due_us, messages.c.ready_us).order_by(messages.c.id))).all()
    dues = [row.due_us - start_us for row in rows]
    assert dues == [0, 333_334, 666_667, 1_000_000]
    assert [row.ready_us - start_us for row in rows] == dues
    assert await counts(system) == (1, 0, 3)
    clock.advance(1)
    assert await counts(system) == (4, 0, 0)
    assert {await state(system, each) for each in ids} == {("pending", 0)}


async def test_more_than_one_transaction_moves_are_all_replayed_once(start_system: StartSystem) -> None:
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    total = CHUNK + 20
    await park(system, *(f"note {number}" for number in range(total)))

    outcome = await store_of(system).replay(everything=True, actor="ann", per_second=1)

    assert outcome.count == len(set(outcome.ids)) == total
    assert await counts(system) == (1, 0, total - 1)
    async with system.database.read() as tx:
        dues = list((await tx.execute(select(messages.c.due_us).order_by(messages.c.due_us))).scalars())
    assert [(due - dues[0]) // 1_000_000 for due in dues] == list(range(total))
    assert (await store_of(system).replay(everything=True, actor="ann")).count == 0


async def test_a_replay_of_a_queue_or_group_leaves_the_others(start_system: StartSystem) -> None:
    system = await office(start_system)
    store = store_of(system)
    (one,) = await park(system, "one")
    (two,) = await park(system, "two", reason="another reason")
    group = (await store.show(two)).group
    assert await store.replay(group=group, actor="ann") == Outcome(ids=(two,))
    assert await store.replay(queue="no.queue", actor="ann") == Outcome(ids=())
    assert await state(system, one) == ("parked", 0)
    assert await store.replay(queue=QUEUE, actor="ann") == Outcome(ids=(one,))


# -- races ------------------------------------------------------------------------------------------------------------


async def test_of_many_operators_one_replays_a_message(start_system: StartSystem) -> None:
    """Each message once, whoever comes first; the others are told what state it is in."""
    systems = [await office(start_system)]
    if systems[0].transport.features.several_processes:
        systems.append(await office(start_system))
    ids = await park(systems[0], *"abcdef")
    stores = [store_of(system) for system in systems * 4]

    outcomes = await asyncio.gather(
        *(store.replay(ids, actor=f"operator {number}") for number, store in enumerate(stores))
    )

    assert sorted(each for outcome in outcomes for each in outcome.ids) == sorted(ids)
    for outcome in outcomes:
        assert set(outcome.ids) | set(outcome.left) == set(ids)
        assert set(outcome.left.values()) <= {"pending"}
    assert await counts(systems[0]) == (len(ids), 0, 0)
    for each in ids:
        assert [action for _, action in await actions(systems[0], each)] == ["replay"]


async def test_replay_and_discard_at_once_have_one_winner(start_system: StartSystem) -> None:
    system = await office(start_system)
    other = await office(start_system) if system.transport.features.several_processes else system
    ids = await park(system, *(f"note {number}" for number in range(10)))

    replayed: list[int] = []
    discarded: list[int] = []
    for each in ids:
        first, second = await asyncio.gather(
            store_of(system).replay([each], actor="ann"), store_of(other).discard([each], actor="bob", reason="old")
        )
        replayed += first.ids
        discarded += second.ids
        assert first.left == ({} if first.ids else {each: "discarded"})
        assert second.left == ({} if second.ids else {each: "pending"})

    assert sorted(replayed + discarded) == sorted(ids)
    assert await counts(system) == (len(replayed), 0, 0)


async def test_an_edit_and_a_replay_at_once_never_send_half_an_edit(start_system: StartSystem) -> None:
    """The replayed body is the old or the new one; an edit that came too late is refused."""
    system = await office(start_system)
    other = await office(start_system) if system.transport.features.several_processes else system
    for number in range(6):
        (parked_id,) = await park(system, "old")
        _, edited = await asyncio.gather(
            store_of(system).replay([parked_id], actor="ann"),
            store_of(other).edit(parked_id, actor="bob", body=b'{"text":"new"}', headers={"n": str(number)}),
            return_exceptions=True,
        )
        (delivery,) = await taken(system)
        if isinstance(edited, Conflict):
            assert (read(delivery), delivery.message.headers.get("n")) == ("old", None)
        else:
            assert edited is None
            assert (read(delivery), delivery.message.headers.get("n")) == ("new", str(number))
        await settle(system, ack(delivery))


async def test_a_holder_that_lost_its_lease_cannot_settle_the_row_again(
    start_system: StartSystem, settings: Settings
) -> None:
    clock = manual_clock()
    system = await office(start_system, with_messaging(settings, lease_ms=1_000), clock=clock)
    (parked_id,) = await park(system, "slow")
    await store_of(system).replay([parked_id], actor="ann")
    (stale,) = await taken(system)
    clock.advance(2)
    (fresh,) = await taken(system)
    assert fresh.receipt.row_id == stale.receipt.row_id

    await settle(system, reject(copied(stale), "too late"))  # not his any more
    assert await state(system, parked_id) == ("pending", 0)
    await settle(system, reject(fresh, "no again"))
    assert await state(system, parked_id) == ("parked", 1)
    await settle(system, ack(copied(stale)))  # of a message that is gone
    assert await state(system, parked_id) == ("parked", 1)

    await store_of(system).replay([parked_id], actor="ann")
    (newest,) = await taken(system)
    await settle(system, ack(copied(stale)))  # and once more, while the next replay is alive
    assert await state(system, parked_id) == ("pending", 1)
    await settle(system, ack(newest))
    assert await state(system, parked_id) == ("done", 1)


async def test_ack_and_reject_of_one_replay_at_once_have_one_winner(
    start_system: StartSystem, settings: Settings
) -> None:
    """The holder whose lease ran out acks while the new holder rejects, in two processes."""
    clock = manual_clock()
    settings = with_messaging(settings, lease_ms=1_000)
    system = await office(start_system, settings, clock=clock)
    needs_several_processes(system)
    other = await office(start_system, settings, clock=clock)
    for _ in range(6):
        (parked_id,) = await park(system, "slow")
        await store_of(system).replay([parked_id], actor="ann")
        (stale,) = await taken(system)
        clock.advance(2)
        (fresh,) = await taken(other)
        await asyncio.gather(settle(system, ack(stale)), settle(other, reject(fresh, "no")))
        assert await counts(system) == (0, 0, 0)
        last = (await actions(system, parked_id))[-1][1]
        assert (await state(system, parked_id), last) in [(("done", 0), "done"), (("parked", 1), "failed again")]


async def test_what_is_settled_in_a_rolled_back_transaction_stays_pending(start_system: StartSystem) -> None:
    system = await office(start_system)
    (parked_id,) = await park(system, "hopeless")
    await store_of(system).replay([parked_id], actor="ann")
    async with system.transport.subscribe(QUEUE, prefetch=1) as subscription:
        (delivery,) = await take(subscription)
        async with rolled_back(system) as tx:
            await subscription.settle([ack(delivery)], tx)
        async with rolled_back(system) as tx:
            await subscription.settle([reject(delivery, "no")], tx)
        assert await state(system, parked_id) == ("pending", 0)
        assert await counts(system) == (0, 1, 0)
        await subscription.settle([ack(delivery)])
    assert await state(system, parked_id) == ("done", 0)
    assert [action for _, action in await actions(system, parked_id)] == ["replay", "done"]


async def test_a_holder_that_dies_leaves_the_replay_to_the_next(settings: Settings) -> None:
    settings = with_messaging(settings, lease_ms=1_000)
    async with opened(settings) as system:
        (parked_id,) = await park(system, "hopeless")
        await store_of(system).replay([parked_id], actor="ann")
        async with system.transport.subscribe(QUEUE, prefetch=1) as subscription:
            (first,) = await take(subscription)
            vanish(subscription)
            subscription._held.clear()
    async with opened(settings) as system:
        (again,) = await taken(system)
        assert (again.attempt, again.deliveries) == (1, first.deliveries + 1)
        assert await state(system, parked_id) == ("pending", 0)
        await settle(system, ack(again))
        assert await state(system, parked_id) == ("done", 0)


@pytest.mark.parametrize("told", ["row", "0", "-1", "9" * 30, "9223372036854775808", "no number", "", "\uff11", "1e3"])
async def test_a_header_that_was_copied_or_made_up_touches_no_row(start_system: StartSystem, told: str) -> None:
    system = await office(start_system)
    (parked_id,) = await park(system, "hopeless")
    await store_of(system).replay([parked_id], actor="ann")
    (replayed,) = await taken(system)
    headers = {HEADER_PARKED_ID: str(parked_id) if told == "row" else told}
    await publish(system, [raw(note(system, each), headers=headers) for each in ("acked", "rejected")])
    one, two = await taken(system, 2)

    await settle(system, ack(one), reject(two, "no"))

    assert await state(system, parked_id) == ("pending", 0)
    assert sorted(each.state for each in await everything(system)) == ["parked", "pending"]
    (kept,) = await store_of(system).list(states=["parked"])
    assert kept.message_id == two.message.message_id
    await settle(system, ack(replayed))
    assert await state(system, parked_id) == ("done", 0)


async def test_a_replay_that_left_its_queue_without_an_answer_can_be_replayed_again(start_system: StartSystem) -> None:
    system = await office(start_system)
    store = store_of(system)
    (parked_id,) = await park(system, "hopeless")
    await store.replay([parked_id], actor="ann")
    async with system.database.transaction() as tx:
        await tx.execute(delete(messages))
    report = await audit(system.database, system.clock, 0)
    assert [finding.name for finding in report.findings] == ["messages.replays"]

    assert await store.replay([parked_id], actor="bob") == Outcome(ids=(parked_id,))

    assert await counts(system) == (1, 0, 0)
    assert await actions(system, parked_id) == [("ann", "replay"), ("holdfast", "reclaim"), ("bob", "replay")]
    assert await store.replay([parked_id], actor="ann") == Outcome(ids=(), left={parked_id: "pending"})


async def test_of_many_operators_one_replays_a_message_that_was_lost(start_system: StartSystem) -> None:
    """Its replay has left the queue: all of them see that at once, and still one message is sent."""
    systems = [await office(start_system)]
    if systems[0].transport.features.several_processes:
        systems.append(await office(start_system))
    (parked_id,) = await park(systems[0], "hopeless")
    for _ in range(5):
        await store_of(systems[0]).replay([parked_id], actor="ann")
        async with systems[0].database.transaction() as tx:
            await tx.execute(delete(messages))
        outcomes = await asyncio.gather(
            *(store_of(system).replay([parked_id], actor="bob") for system in systems for _ in range(6))
        )
        assert sum(outcome.count for outcome in outcomes) == 1
        assert await counts(systems[0]) == (1, 0, 0)
        async with systems[0].database.transaction() as tx:
            await tx.execute(delete(messages))
    assert (await audit(systems[0].database, systems[0].clock, 0)).findings[0].name == "messages.replays"


async def test_what_a_replay_causes_does_not_carry_its_mark(start_system: StartSystem) -> None:
    system = await office(start_system)
    await system.transport.declare(Topology(queues=[Queue(name=BOTH)]))
    await publish(system, [raw(note(system, "cause"), headers={"tenant": "blue"})])
    (delivery,) = await taken(system)
    await settle(system, reject(delivery, "no"))
    (row,) = await everything(system)

    async def effect(tx: Tx, notes: Sequence[Note]) -> None:
        drafts = [Draft(exchange="", routing_key=BOTH, body=each, trace=tx.trace_of(each)) for each in notes]
        await system.outbox.add_all(tx, drafts)

    system.listen(effectively(effect))
    await store_of(system).replay([row.id], actor="ann")

    async with system.transport.subscribe(BOTH, prefetch=1) as subscription:
        (caused,) = await take(subscription)
    assert HEADER_PARKED_ID not in caused.message.headers
    assert "tenant" not in caused.message.headers  # a message's own headers are its own; only the trace goes on


async def test_a_replay_that_ends_in_another_queue_is_done_here(start_system: StartSystem) -> None:
    """As a dead letter, or republished to the error exchange; there it is a message without our mark."""
    system = await office(start_system)
    dead = Topology(
        exchanges=[Exchange(name="dead", kind="fanout")],
        queues=[Queue(name=BOTH), Queue(name="dying", dead_letter_exchange="dead")],
        bindings=[Binding(exchange="dead", queue=BOTH, routing_key="")],
    )
    await system.transport.declare(dead)
    await system.transport.declare(error_topology("notes"))
    store = store_of(system)
    fates = {
        "dying": (DeadLetter(), BOTH, "dead-lettered"),
        QUEUE: (Republish(service="notes"), "notes.error.queue", "done"),
    }
    for queue, (recoverer, target, action) in fates.items():
        await publish(system, [note(system, queue, exchange="", key=queue)])
        async with system.transport.subscribe(queue, prefetch=1) as subscription:
            await subscription.settle([park_it(each, "look") for each in await take(subscription)])
        (row,) = await store.list(queue)

        async def fail(_: Incoming) -> None:
            raise ZeroDivisionError

        listen = plainly(fail, f"reader of {queue}", recover=recoverer)
        system.listen(msgspec.structs.replace(listen, queue=queue))
        await store.replay([row.id], actor="ann")

        async with system.transport.subscribe(target, prefetch=1) as subscription:
            (arrived,) = await take(subscription)
            await subscription.settle([ack(arrived)])
        assert arrived.message.message_id == row.message_id
        assert HEADER_PARKED_ID not in arrived.message.headers
        await becomes(system, row.id, "done")
        assert [each for _, each in await actions(system, row.id)] == ["replay", action]
    assert [each.state for each in await everything(system)] == ["done", "done"]


async def test_nothing_is_replayed_into_a_queue_that_is_gone(start_system: StartSystem) -> None:
    system = await office(start_system)
    store = store_of(system)
    (parked_id,) = await park(system, "hopeless")
    async with system.database.transaction() as tx:
        await tx.execute(delete(bindings))
        await tx.execute(delete(queues))
    for asked in ({"ids": [parked_id]}, {"queue": QUEUE}, {"everything": True}):
        with pytest.raises(InvalidInput, match="does not exist any more"):
            await store.replay(actor="ann", **asked)
    assert await state(system, parked_id) == ("parked", 0)
    assert (await store.discard([parked_id], actor="ann", reason="gone")).count == 1


# -- edit and discard -------------------------------------------------------------------------------------------------


async def test_an_edit_is_replayed_and_the_audit_keeps_what_was_before(start_system: StartSystem) -> None:
    system = await office(start_system)
    store = store_of(system)
    outgoing = raw(note(system), body=b'{"text": 1}', headers={"tenant": "blue", "old": "x"})
    await publish(system, [outgoing])
    (delivery,) = await taken(system)
    await settle(system, reject(delivery, "the body is no test.note"))
    (row,) = await everything(system)

    await store.edit(row.id, actor="ann", body=b'{"text":"one"}', reason="ticket 7")
    await store.edit(row.id, actor="bob", headers={"tenant": "red", "old": None, "new": "y"})
    await store.replay([row.id], actor="ann")

    (again,) = await taken(system)
    assert read(again) == "one"
    assert again.message.headers == {"tenant": "red", "new": "y", HEADER_PARKED_ID: str(row.id)}
    first, second, _ = (await store.show(row.id)).audit
    assert (first.actor, first.action, first.reason) == ("ann", "edit", "ticket 7")
    assert (first.body_before, first.body_after) == (b'{"text": 1}', b'{"text":"one"}')
    assert (first.headers_before, first.headers_after) == (None, None)
    assert (second.actor, second.body_before, second.body_after) == ("bob", None, None)
    assert second.headers_before == {"tenant": "blue", "old": "x"}
    assert second.headers_after == {"tenant": "red", "new": "y"}
    with pytest.raises(Conflict, match="is pending"):
        await store.edit(row.id, actor="ann", body=b"{}")
    await settle(system, reject(again, "no again"))
    shown = await store.show(row.id)
    assert (shown.body, shown.headers) == (b'{"text":"one"}', {"tenant": "red", "new": "y"})


async def test_discarded_messages_are_kept_and_never_replayed(start_system: StartSystem) -> None:
    system = await office(start_system)
    store = store_of(system)
    one, two = await park(system, "one", "two")
    assert (await audit(system.database, system.clock, 0)).figures["messages parked"] == 2
    assert await store.discard([one], actor="ann", reason="a test order") == Outcome(ids=(one,))
    assert await store.replay(everything=True, actor="ann") == Outcome(ids=(two,))
    report = await audit(system.database, system.clock, 60_000)
    assert (report.findings, report.figures["messages parked"]) == ((), 0)
    shown = await store.show(one)
    assert (shown.state, shown.body) == ("discarded", b'{"text":"one"}')
    assert [(each.actor, each.action, each.reason) for each in shown.audit] == [("ann", "discard", "a test order")]
    assert await store.discard([one, two], actor="ann", reason="x") == Outcome(
        ids=(), left={one: "discarded", two: "pending"}
    )
    with pytest.raises(Conflict, match="is discarded"):
        await store.edit(one, actor="ann", body=b"{}")


# -- bad input --------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "nothing named": ("replay", {"actor": "ann"}, "in one way"),
    "named twice": ("replay", {"ids": ["id"], "everything": True, "actor": "ann"}, "in one way"),
    "no ids": ("replay", {"ids": [], "actor": "ann"}, "1 to 1000 ids"),
    "too many ids": ("discard", {"ids": range(1, 1_002), "actor": "ann", "reason": "x"}, "not 1001"),
    "an unknown id": ("replay", {"ids": ["id", 17], "actor": "ann"}, "no parked message 17"),
    "two unknown ids": ("discard", {"ids": [17, 18], "actor": "a", "reason": "x"}, "17 and 1 more"),
    "a negative id": ("replay", {"ids": [-1], "actor": "ann"}, "-1 is no id"),
    "a huge id": ("replay", {"ids": [2**63], "actor": "ann"}, "is no id"),
    "no actor": ("replay", {"ids": ["id"], "actor": " "}, "actor"),
    "a long actor": ("replay", {"ids": ["id"], "actor": "a" * 201}, "actor"),
    "NUL in the actor": ("replay", {"ids": ["id"], "actor": "a\x00"}, "actor"),
    "half a pair in the reason": ("replay", {"ids": ["id"], "actor": "a", "reason": "\ud800"}, "reason"),
    "a long reason": ("replay", {"ids": ["id"], "actor": "a", "reason": "x" * 2_001}, "2000"),
    "a discard without a reason": ("discard", {"ids": ["id"], "actor": "a", "reason": " "}, "say why"),
    "rate 0": ("replay", {"ids": ["id"], "actor": "a", "per_second": 0}, "rate"),
    "no rate": ("replay", {"ids": ["id"], "actor": "a", "per_second": float("nan")}, "rate"),
    "an endless rate": ("replay", {"ids": ["id"], "actor": "a", "per_second": float("inf")}, "rate"),
    "NUL in the group": ("replay", {"group": "\x00", "actor": "a"}, "group"),
    "an empty queue": ("replay", {"queue": "", "actor": "a"}, "queue"),
    "an empty edit": ("edit", {"actor": "a"}, "body or headers"),
    "empty headers": ("edit", {"actor": "a", "headers": {}}, "body or headers"),
    "a body that is no JSON": ("edit", {"actor": "a", "body": b'{"card": "4111"'}, "no JSON"),
    "a body that is no text": ("edit", {"actor": "a", "body": b'"4111\xff"'}, "no JSON"),
    "a body too deep": ("edit", {"actor": "a", "body": b"[" * 100_000}, "no JSON"),
    "a body too large": ("edit", {"actor": "a", "body": b" " * (16 * 1024 * 1024 + 1)}, "limit"),
    "our own header": ("edit", {"actor": "a", "headers": {HEADER_PARKED_ID: "1"}}, "error store itself"),
    "a header that is not there": ("edit", {"actor": "a", "headers": {"x": None}}, "no header 'x'"),
    "a header without a name": ("edit", {"actor": "a", "headers": {"": "1"}}, "no header can"),
    "NUL in a header": ("edit", {"actor": "a", "headers": {"x": "\x00"}}, "cannot be stored"),
    "headers too large": ("edit", {"actor": "a", "headers": {"x": "y" * 65_537}}, "65536"),
}


async def test_bad_input_is_refused_in_one_sentence_and_changes_nothing(start_system: StartSystem) -> None:
    system = await office(start_system)
    store = store_of(system)
    (parked_id,) = await park(system, "hopeless")
    before = await store.show(parked_id)
    for name, (verb, arguments, says) in BAD.items():
        given = dict(arguments)
        if verb == "edit":
            given["parked_id"] = parked_id
        elif "ids" in given:
            given["ids"] = [parked_id if each == "id" else each for each in given["ids"]]
        with pytest.raises(InvalidInput) as refused:
            await getattr(store, verb)(**given)
        assert says in refused.value.detail, name
        assert len(refused.value.detail) < 400, name
        assert "4111" not in refused.value.detail, name
        assert "\n" not in refused.value.detail, name
    assert await store.show(parked_id) == before
    assert await counts(system) == (0, 0, 0)


async def test_bad_questions_are_refused(start_system: StartSystem) -> None:
    store = store_of(await office(start_system))
    unknown: Any = ["lost"]
    for asked, says in (
        (lambda: store.show(17), "no parked message 17"),
        (lambda: store.show(-1), "no id"),
        (lambda: store.list(limit=0), "1..1000"),
        (lambda: store.list(limit=1_001), "1..1000"),
        (lambda: store.list(after=-1), "no id"),
        (lambda: store.list(states=unknown), "parked, pending"),
        (lambda: store.list("\x00"), "no queue"),
        (lambda: store.groups("\ud800"), "no queue"),
        (lambda: store.edit(17, actor="ann", body=b"{}"), "no parked message 17"),
    ):
        with pytest.raises(InvalidInput, match=says):
            await asked()


async def test_an_operator_beside_the_server_reaches_it_by_polling(settings: Settings) -> None:
    """As the command line does on PostgreSQL: a store of its own, without wake-ups."""
    async with opened(settings) as system:
        ledger = await Ledger.of(system)
        (parked_id,) = await park(system, "again")
        system.listen(effectively(ledger.write))
        beside = ErrorStore(system.database, system.clock, system.ids)
        await beside.replay([parked_id], actor="ann")

        await becomes(system, parked_id, "done")
        assert await ledger.entries() == ["again"]
