"""Capabilities of messaging (section 4 of the spec), one test per row, named by it; on SQLite and PostgreSQL."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from holdfast.bootstrap import System
from holdfast.db.database import Tx
from holdfast.messaging.handlers import AckMode
from holdfast.messaging.injection import Incoming
from holdfast.messaging.message import ack
from holdfast.messaging.retry import RetryPolicy
from holdfast.settings import Settings
from tests.conftest import WAIT_S, StartSystem, eventually
from tests.contract.dying_worker import DIED
from tests.contract.notes import (
    EXCHANGE,
    KEY,
    QUEUE,
    Ledger,
    Note,
    counts,
    counts_become,
    effectively,
    office,
    opened,
    parked_messages,
    parks,
    plainly,
    rolled_back,
    send,
    take,
    with_messaging,
)

ROOT = Path(__file__).parents[2]


async def test_H11_ack_modes_none_manual_auto(start_system: StartSystem) -> None:  # noqa: N802  # the row's name
    """A handler that throws: in mode none the message is gone, in manual it stays unacked, in auto it is retried."""
    system = await office(start_system)
    calls: list[int] = []

    async def throw(incoming: Incoming) -> None:
        calls.append(incoming.delivery.attempt)
        raise ZeroDivisionError

    async def thrown(system: System, mode: AckMode, times: int) -> None:
        calls.clear()
        listener = system.listen(plainly(throw, ack=mode, durable=RetryPolicy(tries=3, interval_ms=10)))
        await send(system, mode)

        async def reached() -> bool:
            return len(calls) >= times

        await eventually(reached, f"the handler threw {times} times in mode {mode}")
        if mode == "manual":
            assert await counts(system) == (0, 1, 0)
        if mode == "auto":
            await parks(system)
        await listener.stop()
        assert len(calls) == times

    await thrown(system, "none", 1)
    assert await counts(system) == (0, 0, 0)
    assert await parked_messages(system) == []

    await thrown(system, "manual", 1)
    assert await counts(system) == (1, 0, 0)  # back in the queue once the listener has stopped
    async with system.transport.subscribe(QUEUE, prefetch=1) as subscription:
        (again,) = await take(subscription)
        assert (again.attempt, again.deliveries) == (1, 2)
        await subscription.settle([ack(again)])

    await thrown(system, "auto", 3)
    assert calls == [1, 2, 3]
    assert await counts(system) == (0, 0, 0)
    (kept,) = await parked_messages(system)
    assert kept.attempt == 3


async def test_H16_human_replay_of_parked_messages(start_system: StartSystem) -> None:  # noqa: N802
    """List, inspect, discard, replay; after the fix the effect happens once, and the audit says who did what."""
    system = await office(start_system)
    ledger = await Ledger.of(system)
    store = system.messaging.error_store
    broken = True

    async def effect(tx: Tx, notes: Sequence[Note]) -> None:
        await ledger.write(tx, notes)
        if broken:
            raise ZeroDivisionError

    system.listen(effectively(effect))
    await send(system, "keep", "drop")
    await parks(system, 2)

    (group,) = await store.groups()
    assert (group.queue, group.error, group.type, group.parked) == (QUEUE, "ZeroDivisionError", "test.note", 2)
    shown = [await store.show(each.id) for each in await store.list(group=group.group)]
    keep, drop = sorted(shown, key=lambda each: each.body, reverse=True)
    assert (keep.body, drop.body) == (b'{"text":"keep"}', b'{"text":"drop"}')
    assert "ZeroDivisionError" in keep.error_headers["x-exception-stacktrace"]
    assert (await store.discard([drop.id], actor="ann", reason="a test")).count == 1

    assert (await store.replay(group=group.group, actor="ann")).ids == (keep.id,)  # too early: it fails again

    async def failed_again() -> bool:
        return (await store.show(keep.id)).loops == 1

    await eventually(failed_again, "the replay came back")
    broken = False
    outcomes = await asyncio.gather(*(store.replay([keep.id], actor=name) for name in ("ann", "bob")))
    assert sum(outcome.count for outcome in outcomes) == 1

    async def handled() -> bool:
        return (await store.show(keep.id)).state == "done"

    await eventually(handled, "the replay was handled")
    assert await ledger.entries() == ["keep"]
    assert await counts(system) == (0, 0, 0)
    audit = (await store.show(keep.id)).audit
    assert [each.action for each in audit] == ["replay", "failed again", "replay", "done"]
    assert {each.actor for each in audit if each.action == "replay"} <= {"ann", "bob"}
    assert [(each.actor, each.reason) for each in (await store.show(drop.id)).audit] == [("ann", "a test")]


async def test_H17_unique_message_id(start_system: StartSystem) -> None:  # noqa: N802
    """Every message has an id; delivered twice, with an error between business and ack: one effect."""
    system = await office(start_system)
    ledger = await Ledger.of(system)
    message_ids = [await system.publisher.publish(EXCHANGE, KEY, Note("filler")) for _ in range(10)]
    assert all(message_ids)
    assert len(set(message_ids)) == 10
    await _drop(system)

    tries = 0

    async def crash_once(tx: Tx, notes: Sequence[Note]) -> None:
        nonlocal tries
        tries += 1
        await ledger.write(tx, notes)
        if tries == 1:
            raise ZeroDivisionError  # after the business write, before the ack

    system.listen(effectively(crash_once, durable=RetryPolicy(tries=3, interval_ms=10)))
    await send(system, "once", "once", message_id="same")
    await counts_become(system, (0, 0, 0))
    assert tries > 1
    assert await ledger.entries() == ["once"]


async def test_H17_unique_message_id_when_the_process_is_killed(settings: Settings) -> None:  # noqa: N802
    """Delivered twice, with the process gone between business and commit: one effect."""
    settings = with_messaging(settings, lease_ms=1_000)
    async with opened(settings) as system:
        await Ledger.of(system)
        await send(system, "once", "once", message_id="same")
    worker = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.contract.dying_worker", settings.database.url, cwd=ROOT
    )
    try:
        assert await asyncio.wait_for(worker.wait(), WAIT_S) == DIED
    finally:
        if worker.returncode is None:
            worker.kill()
            await worker.wait()
    async with opened(settings) as system:
        ledger = await Ledger.of(system)
        assert await ledger.entries() == []
        assert (await system.transport.stats(QUEUE)).total == 2
        system.listen(effectively(ledger.write))
        await counts_become(system, (0, 0, 0))
        assert await ledger.entries() == ["once"]
        assert await parked_messages(system) == []


async def test_H31_send_message_in_rolled_back_transaction_sends_nothing(  # noqa: N802
    start_system: StartSystem,
) -> None:
    """The one-line send belongs to the transaction: rolled back it sends nothing, committed it sends once."""
    system = await office(start_system)
    ledger = await Ledger.of(system)
    async with rolled_back(system) as tx:
        await ledger.write(tx, [Note("business")])
        await system.outbox.add(tx, EXCHANGE, KEY, Note("never"))
    assert await counts(system) == (0, 0, 0)
    assert await ledger.entries() == []
    async with system.database.transaction() as tx:
        await ledger.write(tx, [Note("business")])
        await system.outbox.add(tx, EXCHANGE, KEY, Note("sent"))
    assert await counts(system) == (1, 0, 0)
    assert await ledger.entries() == ["business"]


async def test_H32_send_delay_message_arrives_on_time(start_system: StartSystem) -> None:  # noqa: N802
    """Sent with a delay of 3 s it arrives at 3 s, never before, at most 0.3 s after."""
    system = await office(start_system)
    arrived_us: list[int] = []

    async def handle(_: Incoming) -> None:
        arrived_us.append(system.clock.now_us())

    async def came() -> bool:
        return bool(arrived_us)

    system.listen(plainly(handle))
    sent_us = system.clock.now_us()
    async with system.database.transaction() as tx:
        await system.outbox.add(tx, EXCHANGE, KEY, Note("in 3 s"), delay_ms=3_000)
    await eventually(came, "the delayed message arrived")
    assert 3_000_000 <= arrived_us[0] - sent_us <= 3_300_000


async def _drop(system: System) -> None:
    """Empty the queue."""
    async with system.transport.subscribe(QUEUE, prefetch=100) as subscription:
        while (await system.transport.stats(QUEUE)).total:
            await subscription.settle([ack(each) for each in await subscription.take()])
