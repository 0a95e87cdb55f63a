"""Settling what handlers did: few transactions, nothing lost while the database is away, nothing left at a stop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from holdfast import observe
from holdfast.bootstrap import System
from holdfast.db.database import Tx
from holdfast.errors import AlreadySettled, HoldfastError, OutcomeUnknown, Unavailable
from holdfast.messaging import listener as listening
from holdfast.messaging.injection import Incoming
from holdfast.messaging.message import Settlement, ack
from holdfast.messaging.retry import Retry, RetryPolicy
from holdfast.settings import Settings
from tests.conftest import WAIT_S, StartSystem, eventually, quick_settings
from tests.contract.backends import PostgresSession
from tests.contract.notes import (
    QUEUE,
    counts,
    counts_become,
    manual_clock,
    office,
    opened,
    parked_messages,
    pass_time,
    plainly,
    send,
    turn,
    with_messaging,
)
from tests.db.proxy import LossyProxy
from tests.servers.postgres import HOST, USER, require_postgres

PATIENT = {"lease_ms": 600_000, "poll_ms": 60_000}


class Settling:
    """Watches how a system's subscriptions settle; may be told to fail before or after it, or to wait."""

    def __init__(self, system: System, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[list[str]] = []
        self.before: list[Exception] = []
        self.after: list[Exception] = []
        self.open = asyncio.Event()
        self.open.set()
        kind: Any = type(system.transport.subscribe(QUEUE, prefetch=1))
        settle = kind.settle

        async def watched(subscription: Any, settlements: Sequence[Settlement], tx: Tx | None = None) -> None:
            self.batches.append([each.kind for each in settlements])
            await self.open.wait()
            if self.before:
                raise self.before.pop(0)
            await settle(subscription, settlements, tx)
            if self.after:
                raise self.after.pop(0)

        monkeypatch.setattr(kind, "settle", watched)


class Desk:
    """A plain handler that waits until it is opened."""

    def __init__(self) -> None:
        self.got: list[str] = []
        self.open = asyncio.Event()

    async def handle(self, incoming: Incoming) -> None:
        self.got.append(incoming.body.text)
        await self.open.wait()

    async def has(self, count: int) -> None:
        async def reached() -> bool:
            return len(self.got) >= count

        await eventually(reached, f"the handler was called {count} times")


def numbers(count: int) -> list[str]:
    return [str(number) for number in range(count)]


async def test_what_many_handlers_did_is_settled_in_few_transactions(
    start_system: StartSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = await office(start_system)
    settling, desk = Settling(system, monkeypatch), Desk()
    await send(system, *numbers(100))
    system.listen(plainly(desk.handle, concurrency=100, prefetch=200))
    await desk.has(100)
    settling.open.clear()
    desk.open.set()
    await turn(system)
    settling.open.set()
    await counts_become(system, (0, 0, 0))
    assert sum(len(batch) for batch in settling.batches) == 100
    assert len(settling.batches) <= 2


async def test_while_one_batch_is_settled_the_next_gathers(
    start_system: StartSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = await office(start_system)
    settling, desk = Settling(system, monkeypatch), Desk()
    settling.open.clear()
    desk.open.set()
    system.listen(plainly(desk.handle))
    for number in range(4):
        await send(system, str(number))
        await desk.has(number + 1)
        await turn(system)
    assert settling.batches == [["ack"]]
    settling.open.set()
    await counts_become(system, (0, 0, 0))
    assert settling.batches == [["ack"], ["ack"] * 3]


@pytest.mark.parametrize("error", [Unavailable("away"), OutcomeUnknown("the reply was lost")])
@pytest.mark.parametrize("done", [False, True])
async def test_a_database_that_is_away_while_settling_is_asked_again(
    start_system: StartSystem, monkeypatch: pytest.MonkeyPatch, error: HoldfastError, done: bool
) -> None:
    """Also where the settlement had come through, and only its reply was lost."""
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    settling, desk = Settling(system, monkeypatch), Desk()
    desk.open.set()
    (settling.after if done else settling.before).extend([error] if done else [error, error])
    await send(system, *numbers(5))
    system.listen(plainly(desk.handle))
    await desk.has(5)
    await turn(system)
    for _ in range(0 if done else 2):
        assert await counts(system) == (0, 5, 0)
        await pass_time(system, clock, listening.AWAY_S)
    await pass_time(system, clock, listening.AWAY_S)
    await counts_become(system, (0, 0, 0))
    assert sorted(desk.got) == numbers(5)
    assert (settling.before, settling.after) == ([], [])
    await send(system, "next")
    await counts_become(system, (0, 0, 0))
    assert desk.got[5:] == ["next"]


async def test_the_reply_to_an_ack_that_is_lost_costs_neither_the_message_nor_a_second_call(
    postgres_session: PostgresSession,
) -> None:
    require_postgres()
    server = postgres_session.server
    name = server.create_database()
    async with LossyProxy(server.port) as proxy:
        settings = quick_settings(f"postgresql://{USER}@{HOST}:{proxy.port}/{name}")
        async with opened(with_messaging(settings, lease_ms=10_000)) as system:
            desk = Desk()
            system.listen(plainly(desk.handle))
            await send(system, "1")
            await desk.has(1)
            proxy.hold = b"DELETE FROM"
            desk.open.set()
            await asyncio.wait_for(proxy.held.wait(), WAIT_S)
            proxy.hold = None
            proxy.cut()
            proxy.release.set()

            async def gone() -> bool:
                try:
                    return await counts(system) == (0, 0, 0)
                except Unavailable:
                    return False

            await eventually(gone, "it is settled")
            await send(system, "2")
            await desk.has(2)
            await counts_become(system, (0, 0, 0))
            assert desk.got == ["1", "2"]
            assert await parked_messages(system) == []
    server.drop_database(name)


# -- one that cannot be settled ---------------------------------------------------------------------------------------


async def settled_by_the_handler(incoming: Incoming) -> None:
    await incoming.settle(ack(incoming.delivery))


async def test_a_handler_that_settles_by_itself_in_auto_mode_is_not_settled_for(
    start_system: StartSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = await office(start_system)
    settling = Settling(system, monkeypatch)
    await send(system, *numbers(3))
    system.listen(plainly(settled_by_the_handler))
    await counts_become(system, (0, 0, 0))
    await turn(system)
    assert settling.batches == [["ack"]] * 3


async def test_one_that_somebody_settled_meanwhile_leaves_its_neighbours_settled(
    start_system: StartSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = await office(start_system)
    settling, desk = Settling(system, monkeypatch), Desk()
    held: list[Incoming] = []

    async def handle(incoming: Incoming) -> None:
        held.append(incoming)
        await desk.handle(incoming)

    await send(system, *numbers(5))
    system.listen(plainly(handle, prefetch=5))
    await desk.has(5)
    settling.open.clear()
    desk.open.set()
    await turn(system)
    # All five wait to be settled; somebody settles the third before.
    (transport_subscription,) = {id(each.settle.__self__): each.settle.__self__ for each in held}.values()  # type: ignore[attr-defined]
    held[2].delivery.mark_settled()
    settling.open.set()
    await counts_become(system, (0, 1, 0))  # that he did so was told to nobody but the delivery
    assert transport_subscription is not None
    assert [each.delivery.settled for each in held] == [True] * 5
    await send(system, *numbers(4))
    await desk.has(9)  # there is room again for as many as were settled
    await counts_become(system, (0, 1, 0))


async def test_a_settlement_that_no_database_can_store_leaves_its_neighbours_settled(
    start_system: StartSystem,
) -> None:
    """A wait of a hundred million years is a bug of one handler, and no reason to forget what the others did.

    The message itself would stay held for ever and be seen by nobody: it is parked.
    """
    system = await office(start_system)
    desk = Desk()

    async def handle(incoming: Incoming) -> None:
        await desk.handle(incoming)
        if incoming.body.text == "1":
            raise Retry(2**63)

    await send(system, *numbers(4))
    system.listen(plainly(handle, prefetch=4))
    await desk.has(4)
    desk.open.set()
    await counts_become(system, (0, 0, 0))
    (kept,) = await parked_messages(system)
    assert kept.body == b'{"text":"1"}'
    await send(system, "after")
    await counts_become(system, (0, 0, 0))
    assert desk.got[4:] == ["after"]


# -- stopping ---------------------------------------------------------------------------------------------------------


async def test_stop_settles_what_waits_to_be_settled(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(with_messaging(settings, **PATIENT)) as system:
        with monkeypatch.context() as patch:
            settling, desk = Settling(system, patch), Desk()
            desk.open.set()
            settling.open.clear()
            listener = system.listen(plainly(desk.handle))
            await send(system, "1")
            await desk.has(1)
            await turn(system)
            await send(system, "2", "3")
            await desk.has(3)
            await turn(system)
            stopping = asyncio.create_task(listener.stop(WAIT_S))
            await turn(system)
            assert not stopping.done()
            assert await counts(system) == (0, 3, 0)
            settling.open.set()
            await stopping
        assert await counts(system) == (0, 0, 0)
        assert desk.got == ["1", "2", "3"]


async def test_what_is_done_is_acked_and_what_the_drain_cuts_short_is_not(settings: Settings) -> None:
    async with opened(with_messaging(settings, **PATIENT)) as system:
        desk = Desk()

        async def handle(incoming: Incoming) -> None:
            if incoming.body.text == "endless":
                await desk.handle(incoming)
            else:
                desk.got.append(incoming.body.text)

        listener = system.listen(plainly(handle, local=RetryPolicy(tries=3, interval_ms=1)))
        await send(system, "1", "endless", "2")
        await desk.has(3)
        await listener.stop(0.05)
        assert await counts(system) == (1, 0, 0)
        async with system.transport.subscribe(QUEUE, prefetch=5) as subscription:
            (again,) = await subscription.take()
            assert (again.message.body, again.attempt, again.deliveries) == (b'{"text":"endless"}', 1, 2)


async def test_stop_does_not_wait_for_a_database_that_stays_away(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stays unsettled comes again, and is not acked by anybody."""
    async with opened(with_messaging(settings, **PATIENT)) as system:
        with monkeypatch.context() as patch:
            settling, desk = Settling(system, patch), Desk()
            desk.open.set()
            settling.before.extend(Unavailable("away") for _ in range(100))
            listener = system.listen(plainly(desk.handle))
            await send(system, "1", "2")
            await desk.has(2)
            await asyncio.wait_for(listener.stop(WAIT_S), WAIT_S / 2)
        assert await counts(system) == (2, 0, 0)


async def test_settled_twice_at_the_same_time_the_room_of_its_neighbours_is_free(
    start_system: StartSystem, settings: Settings
) -> None:
    system = await office(start_system, with_messaging(settings, **PATIENT))
    in_the_background: list[asyncio.Task[None]] = []
    desk = Desk()

    async def handle(incoming: Incoming) -> None:
        await desk.handle(incoming)
        if incoming.body.text == "0":
            in_the_background.append(asyncio.ensure_future(incoming.settle(ack(incoming.delivery))))

    def in_flight() -> float:
        return observe.registry.get_sample_value("holdfast_messages_in_flight", {"queue": QUEUE}) or 0.0

    before = in_flight()
    system.listen(plainly(handle, prefetch=5))
    await send(system, *numbers(15))
    await desk.has(5)
    desk.open.set()
    await desk.has(15)
    await counts_become(system, (0, 0, 0))
    for told in await asyncio.gather(*in_the_background, return_exceptions=True):
        assert told is None or isinstance(told, AlreadySettled)
    assert in_flight() == before
