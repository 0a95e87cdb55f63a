"""Outbox and inbox: messages and effects that share a transaction happen together, once, or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from holdfast.db.database import Tx
from holdfast.errors import InvalidInput, PublishRejected, Unroutable
from holdfast.messaging.draft import Draft
from holdfast.messaging.message import ack
from holdfast.messaging.retry import RetryPolicy
from tests.conftest import StartSystem
from tests.contract.notes import (
    EXCHANGE,
    KEY,
    QUEUE,
    Ledger,
    Note,
    counts,
    counts_become,
    effectively,
    needs_several_processes,
    note,
    office,
    parked_messages,
    parks,
    publish,
    rolled_back,
    send,
    take,
    texts,
)


def drafts(*bodies: str, key: str = KEY) -> list[Draft]:
    return [Draft(exchange=EXCHANGE, routing_key=key, body=Note(body)) for body in bodies]


# -- outbox -----------------------------------------------------------------------------------------------------------


async def test_nothing_is_sent_from_a_rolled_back_transaction(start_system: StartSystem) -> None:
    system = await office(start_system)
    ledger = await Ledger.of(system)
    async with rolled_back(system) as tx:
        await ledger.write(tx, [Note("never")])
        await system.outbox.add(tx, EXCHANGE, KEY, Note("never"))
    assert await counts(system) == (0, 0, 0)
    assert await ledger.entries() == []


async def test_everything_is_sent_from_a_committed_transaction_and_nothing_before(start_system: StartSystem) -> None:
    system = await office(start_system)
    ledger = await Ledger.of(system)
    async with system.database.transaction() as tx:
        await ledger.write(tx, [Note("business")])
        await system.outbox.add(tx, EXCHANGE, KEY, Note("first"))
        await system.outbox.add_all(tx, drafts("second", "third"))
        await system.outbox.add_all(tx, [])
        assert await counts(system) == (0, 0, 0)
    assert await counts(system) == (3, 0, 0)
    assert await ledger.entries() == ["business"]


async def test_the_messages_of_one_transaction_keep_their_order_for_one_consumer(start_system: StartSystem) -> None:
    system = await office(start_system)
    bodies = [str(number) for number in range(40)]
    async with system.database.transaction() as tx:
        for body in bodies[:20]:
            await system.outbox.add(tx, EXCHANGE, KEY, Note(body))
        await system.outbox.add_all(tx, drafts(*bodies[20:]))
    async with system.transport.subscribe(QUEUE, prefetch=9) as subscription:
        got: list[str] = []
        while len(got) < len(bodies):
            deliveries = await subscription.take()
            got += texts(deliveries)
            await subscription.settle([ack(each) for each in deliveries])
    assert got == bodies


async def test_effects_see_the_messages_of_one_transaction_in_order(start_system: StartSystem) -> None:
    system = await office(start_system)
    ledger = await Ledger.of(system)
    bodies = [str(number) for number in range(40)]
    async with system.database.transaction() as tx:
        await system.outbox.add_all(tx, drafts(*bodies))
    system.listen(effectively(ledger.write, prefetch=7))
    await ledger.holds(len(bodies))
    assert await ledger.entries() == bodies


async def test_an_outbox_message_no_queue_takes_raises_and_voids_the_transaction(start_system: StartSystem) -> None:
    system = await office(start_system)
    ledger = await Ledger.of(system)

    async def act() -> None:
        async with system.database.transaction() as tx:
            await ledger.write(tx, [Note("never")])
            await system.outbox.add_all(tx, [*drafts("never"), *drafts("nobody", key="letter")])

    with pytest.raises(Unroutable):
        await act()
    assert await counts(system) == (0, 0, 0)
    assert await ledger.entries() == []


async def test_an_optional_outbox_message_no_queue_takes_is_dropped(start_system: StartSystem) -> None:
    system = await office(start_system)
    async with system.database.transaction() as tx:
        await system.outbox.add(tx, EXCHANGE, "letter", Note("nobody"), mandatory=False)
    assert await counts(system) == (0, 0, 0)


async def test_an_outbox_message_to_an_unknown_exchange_raises(start_system: StartSystem) -> None:
    system = await office(start_system)
    with pytest.raises(PublishRejected):
        async with system.database.transaction() as tx:
            await system.outbox.add(tx, "nowhere", KEY, Note("never"))


async def test_a_body_without_a_type_id_is_refused(start_system: StartSystem) -> None:
    system = await office(start_system)

    class Stranger(Note, frozen=True):
        pass

    with pytest.raises(InvalidInput, match="Stranger"):
        async with system.database.transaction() as tx:
            await system.outbox.add(tx, EXCHANGE, KEY, Stranger("never"))


async def test_every_outbox_message_has_an_id_of_its_own(start_system: StartSystem) -> None:
    system = await office(start_system)
    async with system.database.transaction() as tx:
        await system.outbox.add_all(tx, drafts(*("same body" for _ in range(50))))
    async with system.transport.subscribe(QUEUE, prefetch=100) as subscription:
        message_ids = {each.message.message_id for each in await take(subscription, 50)}
    assert len(message_ids) == 50
    assert all(message_ids)


# -- inbox ------------------------------------------------------------------------------------------------------------


async def test_the_inbox_knows_a_message_again_for_each_consumer_on_its_own(start_system: StartSystem) -> None:
    system = await office(start_system)
    async with system.database.transaction() as tx:
        assert await system.inbox.fresh(tx, "mail", ["a", "b", "a"]) == {"a", "b"}
        assert await system.inbox.fresh(tx, "mail", ["b", "c"]) == {"c"}
        assert await system.inbox.fresh(tx, "mail", []) == set()
    async with system.database.transaction() as tx:
        assert await system.inbox.fresh(tx, "mail", ["a", "b", "c"]) == set()
        assert await system.inbox.fresh(tx, "audit", ["a", "d"]) == {"a", "d"}


async def test_the_inbox_forgets_what_was_rolled_back(start_system: StartSystem) -> None:
    system = await office(start_system)
    async with rolled_back(system) as tx:
        assert await system.inbox.fresh(tx, "mail", ["a"]) == {"a"}
    async with system.database.transaction() as tx:
        assert await system.inbox.fresh(tx, "mail", ["a"]) == {"a"}


@pytest.mark.parametrize("commits", [True, False])
async def test_two_transactions_that_claim_one_message_wait_for_each_other(
    start_system: StartSystem, commits: bool
) -> None:
    system = await office(start_system)

    async def claim() -> set[str]:
        async with system.database.transaction() as tx:
            return await system.inbox.fresh(tx, "mail", ["b", "a"])

    async with system.database.transaction() if commits else rolled_back(system) as tx:
        assert await system.inbox.fresh(tx, "mail", ["a", "b"]) == {"a", "b"}
        rival = asyncio.create_task(claim())
        await asyncio.wait([rival], timeout=0.1)
        assert not rival.done()
    assert await rival == (set() if commits else {"a", "b"})


async def test_duplicates_across_batches_have_one_effect(start_system: StartSystem) -> None:
    system = await office(start_system)
    ledger = await Ledger.of(system)
    system.listen(effectively(ledger.write))
    await send(system, "once", message_id="same")
    await ledger.holds(1)
    await send(system, "once", message_id="same")
    await send(system, "marker")
    await ledger.holds(2)
    assert await ledger.entries() == ["once", "marker"]
    assert await counts(system) == (0, 0, 0)


async def test_duplicates_inside_a_batch_have_one_effect(start_system: StartSystem) -> None:
    system = await office(start_system)
    ledger = await Ledger.of(system)
    batches: list[int] = []

    async def effect(tx: Tx, notes: Sequence[Note]) -> None:
        batches.append(len(notes))
        await ledger.write(tx, notes)

    await publish(system, [note(system, "once", message_id="same") for _ in range(5)] + [note(system, "marker")])
    system.listen(effectively(effect))
    await ledger.holds(2)
    assert await ledger.entries() == ["once", "marker"]
    assert await counts(system) == (0, 0, 0)
    assert batches == [2]  # they did meet in one batch


async def test_duplicates_that_reach_two_processes_have_one_effect(start_system: StartSystem) -> None:
    system = await office(start_system)
    needs_several_processes(system)
    other = await office(start_system)
    ledger = await Ledger.of(system)
    bodies = [str(number) for number in range(100)]
    copies = [note(system, body, message_id=f"id-{body}") for body in bodies * 3]
    await publish(system, copies)
    for each in (system, system, other, other):
        each.listen(effectively(ledger.write, prefetch=10, local=RetryPolicy(tries=5, interval_ms=1)))
    await counts_become(system, (0, 0, 0))
    assert sorted(await ledger.entries()) == sorted(bodies)
    assert await parked_messages(system) == []


async def test_consumers_of_different_names_each_have_their_own_effect(start_system: StartSystem) -> None:
    system = await office(start_system)
    ledger = await Ledger.of(system)
    first = system.listen(effectively(ledger.write, name="first"))
    await send(system, "once", message_id="same")
    await ledger.holds(1)
    await first.stop()
    await send(system, "once", message_id="same")
    system.listen(effectively(ledger.write, name="second"))
    await ledger.holds(2)
    assert await ledger.entries() == ["once", "once"]


async def test_a_database_error_is_not_taken_for_a_duplicate(start_system: StartSystem) -> None:
    system = await office(start_system)
    ledger = await Ledger.of(system)
    mended = False

    async def effect(tx: Tx, notes: Sequence[Note]) -> None:
        await ledger.write(tx, notes if mended else [Note("refused by the database")])

    listener = system.listen(effectively(effect))
    await send(system, "important", message_id="same")
    (kept,) = await parks(system)
    assert kept.message_id == "same"
    assert "ck_test_ledger_text" in kept.reason
    assert await ledger.entries() == []
    mended = True
    await send(system, "important", message_id="same")  # its effect has not happened, so it is no duplicate
    await ledger.holds(1)
    await listener.stop()
    assert await ledger.entries() == ["important"]
    assert len(await parked_messages(system)) == 1


async def test_effect_inbox_ack_and_outgoing_messages_commit_together(start_system: StartSystem) -> None:
    system = await office(start_system)
    ledger = await Ledger.of(system)
    tries = 0

    async def effect(tx: Tx, notes: Sequence[Note]) -> None:
        nonlocal tries
        await ledger.write(tx, notes)
        for each in notes:
            if each.text == "question":
                await system.outbox.add(tx, EXCHANGE, KEY, Note("answer"))
                tries += 1
                if tries == 1:
                    raise ZeroDivisionError

    system.listen(effectively(effect, local=RetryPolicy(tries=2, interval_ms=1)))
    await send(system, "question")
    await ledger.holds(2)
    assert await ledger.entries() == ["question", "answer"]
    assert tries == 2
    assert await counts(system) == (0, 0, 0)
