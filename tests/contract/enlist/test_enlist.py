"""Outbox and inbox in the user's own transaction, whatever holds it: the same cases for every kind of handle."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy import text

from holdfast.bootstrap import System
from holdfast.errors import InvalidInput, PublishError, PublishRejected, Unroutable
from holdfast.messaging.draft import DELAY_MS_MAX, Draft
from holdfast.messaging.injection import Incoming
from tests.conftest import eventually
from tests.contract.enlist.handles import Handle, Heard, OpenHandle
from tests.contract.notes import (
    EXCHANGE,
    KEY,
    QUEUE,
    Ledger,
    Note,
    counts,
    counts_become,
    plainly,
    read,
    send,
    take,
)

# -- the message shares the fate of the user's rows -------------------------------------------------------------------


async def test_what_is_committed_is_delivered_with_the_users_row(system: System, open_handle: OpenHandle) -> None:
    heard, handle = Heard(system), await open_handle()
    await handle.begin()
    await handle.write()
    await handle.add("first")
    await handle.add_all([Draft(exchange=EXCHANGE, routing_key=KEY, body=Note(body)) for body in ("second", "third")])
    assert await counts(system) == (0, 0, 0)
    await handle.commit()
    await heard.become("first", "second", "third")
    await counts_become(system, (0, 0, 0))
    assert await Ledger(system).entries() == ["own row"]


async def test_our_message_may_be_the_first_statement(system: System, open_handle: OpenHandle) -> None:
    handle = await open_handle()
    await handle.begin()
    await handle.add("only")
    assert await counts(system) == (0, 0, 0)
    await handle.commit()
    assert await counts(system) == (1, 0, 0)


async def test_nothing_is_left_of_what_is_rolled_back(system: System, open_handle: OpenHandle) -> None:
    handle = await open_handle()
    await handle.begin()
    await handle.add("never")
    await handle.write()
    assert await handle.first("clerk", "m-1")
    await handle.rollback()
    assert await counts(system) == (0, 0, 0)
    assert await Ledger(system).entries() == []
    await handle.begin()
    await handle.add("ever")
    assert await handle.first("clerk", "m-1")
    await handle.commit()
    assert await counts(system) == (1, 0, 0)


async def test_a_savepoint_rolled_back_takes_its_message_along(system: System, open_handle: OpenHandle) -> None:
    handle = await open_handle()
    await handle.begin()
    await handle.write()
    await handle.add("before")
    await handle.save()
    await handle.add("within")
    await handle.undo()
    await handle.save()
    await handle.add("after")
    await handle.release()
    await handle.commit()
    async with system.transport.subscribe(QUEUE, prefetch=5) as subscription:
        assert {read(each) for each in await take(subscription, 2)} == {"before", "after"}
    assert await Ledger(system).entries() == ["own row"]


# -- refusals ---------------------------------------------------------------------------------------------------------


async def test_a_refusal_leaves_the_transaction_as_it_was(system: System, open_handle: OpenHandle) -> None:
    handle = await open_handle()
    await handle.begin()
    refusals: list[tuple[type[Exception], dict[str, Any]]] = [
        (Unroutable, {"key": "nobody.listens"}),
        (PublishRejected, {"exchange": "unheard-of"}),
        (PublishRejected, {"cancel_key": "NUL \x00"}),
        (InvalidInput, {"delay_ms": -1}),
        (InvalidInput, {"delay_ms": DELAY_MS_MAX + 1}),
    ]
    for refused, options in refusals:
        with pytest.raises(refused):
            await handle.add("refused", **options)
        await handle.write()
    await handle.commit()
    assert await counts(system) == (0, 0, 0)
    assert await Ledger(system).entries() == ["own row"] * len(refusals)


async def test_of_a_batch_with_a_refused_message_none_is_written(system: System, open_handle: OpenHandle) -> None:
    handle = await open_handle()
    keys = [KEY, "nobody.listens", KEY]
    await handle.begin()
    with pytest.raises(PublishError):
        await handle.add_all([Draft(exchange=EXCHANGE, routing_key=key, body=Note("refused")) for key in keys])
    await handle.add("fine")
    await handle.add("for nobody", key="nobody.listens", mandatory=False)
    await handle.commit()
    assert await counts(system) == (1, 0, 0)


async def test_a_handle_in_autocommit_is_refused(system: System, open_handle: OpenHandle) -> None:
    handle = await open_handle(autocommit=True)
    for attempt in (handle.add("alone"), handle.cancel("key"), handle.first("clerk", "m-1")):
        with pytest.raises(InvalidInput, match="no transaction open"):
            await attempt
    assert await counts(system) == (0, 0, 0)
    async with system.database.read() as tx:
        assert (await tx.execute(text("SELECT count(*) FROM hf_inbox"))).scalar_one() == 0


async def test_a_handle_in_the_wrong_method_is_refused(system: System, open_handle: OpenHandle) -> None:
    handle = await open_handle()
    await handle.begin()
    with pytest.raises(InvalidInput, match="_sync"):
        await handle.add_wrongly()
    with pytest.raises(InvalidInput, match="Handle holds no transaction"):
        await handle.outbox.add(Handle(str(handle.url), handle.outbox, handle.inbox), EXCHANGE, KEY, Note("no"))
    await handle.rollback()
    assert await counts(system) == (0, 0, 0)


# -- delay and cancel -------------------------------------------------------------------------------------------------


async def test_a_delayed_message_waits_and_another_transaction_cancels_it(
    system: System, open_handle: OpenHandle
) -> None:
    handle, other = await open_handle(), await open_handle()
    await handle.begin()
    await handle.add("time-out", delay_ms=3_600_000, cancel_key="order-1")
    await handle.add("time-out", delay_ms=3_600_000, cancel_key="order-2")
    await handle.commit()
    assert await counts(system) == (0, 0, 2)
    await other.begin()
    assert await other.cancel("order-1", "order-3") == 1
    await other.rollback()
    assert await counts(system) == (0, 0, 2)
    await other.begin()
    assert await other.cancel() == 0
    assert await other.cancel("order-1", "order-3") == 1
    assert await other.cancel("order-1") == 0
    await other.commit()
    assert await counts(system) == (0, 0, 1)


async def test_a_delayed_message_is_moved_with_the_commit(system: System, open_handle: OpenHandle) -> None:
    handle, other = await open_handle(), await open_handle()
    await handle.begin()
    await handle.add("time-out", delay_ms=3_600_000, cancel_key="order-1")
    await handle.commit()
    await other.begin()
    assert await other.move("order-1", delay_ms=0) == 1
    await other.rollback()
    assert await counts(system) == (0, 0, 1)
    await other.begin()
    assert await other.move("order-1", "order-2", due_us=0) == 1
    await other.commit()
    assert await counts(system) == (1, 0, 0)


async def test_a_delay_ends(system: System, open_handle: OpenHandle) -> None:
    heard, handle = Heard(system), await open_handle()
    await handle.begin()
    sent_us = system.clock.now_us()
    await handle.add("later", delay_ms=300)
    await handle.commit()
    await heard.become("later")
    assert system.clock.now_us() - sent_us >= 300_000


# -- inbox ------------------------------------------------------------------------------------------------------------


async def test_the_inbox_knows_the_second_time_from_the_first(system: System, open_handle: OpenHandle) -> None:
    handle = await open_handle()
    await handle.begin()
    assert await handle.first("clerk", "m-1")
    assert not await handle.first("clerk", "m-1")
    assert await handle.first("other clerk", "m-1")
    await handle.commit()
    await handle.begin()
    assert not await handle.first("clerk", "m-1")
    assert await handle.first("clerk", "m-2")
    await handle.rollback()
    await handle.begin()
    assert await handle.first("clerk", "m-2")
    await handle.commit()


@pytest.mark.parametrize("commits", [True, False])
async def test_of_two_transactions_with_one_message_the_second_waits_for_the_first(
    system: System, open_handle: OpenHandle, commits: bool
) -> None:
    one, two = await open_handle(), await open_handle()
    await one.begin()
    assert await one.first("clerk", "m-1")
    await one.write()
    await two.begin()
    second = asyncio.create_task(two.first("clerk", "m-1"))
    if system.database.dialect == "postgresql":

        async def waits() -> bool:
            async with system.database.read() as tx:
                locks = text("SELECT count(*) FROM pg_locks WHERE NOT granted AND pid <> pg_backend_pid()")
                return bool((await tx.execute(locks)).scalar_one())

        await eventually(waits, "the second transaction waits for the first")
    assert not second.done()
    await (one.commit() if commits else one.rollback())
    assert await second is not commits
    await two.commit()
    async with system.database.read() as tx:
        assert (await tx.execute(text("SELECT count(*) FROM hf_inbox"))).scalar_one() == 1


async def test_a_message_handled_in_the_users_transaction_has_its_effect_once(
    system: System, open_handle: OpenHandle
) -> None:
    """The plain handler's own transaction claims, writes and sends; a copy of the message finds it done."""
    handle = await open_handle()
    one_by_one = asyncio.Lock()
    answers: list[bool] = []

    async def handler(incoming: Incoming) -> None:
        async with one_by_one:
            await handle.begin()
            first = await handle.first("clerk", incoming.delivery.message.message_id)
            if first:
                await handle.write()
                await handle.add("reply", delay_ms=3_600_000)
            await handle.commit()
            answers.append(first)

    await send(system, "order", message_id="m-1")
    await send(system, "order", message_id="m-1")
    system.listen(plainly(handler, "clerk"))

    async def both() -> bool:
        return len(answers) == 2

    await eventually(both, "both copies were handled")
    assert sorted(answers) == [False, True]
    assert await Ledger(system).entries() == ["own row"]
    await counts_become(system, (0, 0, 1))
