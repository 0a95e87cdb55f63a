"""What is put back or parked is settled in company while there are acks, and waits for no more than a few of them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, cast

from holdfast.messaging.message import Delivery, Message, Settlement, ack, park, retry
from holdfast.messaging.settler import ROUNDS, Settler
from holdfast.messaging.transport import Subscription

PATIENCE_S = 20


class Gate:
    """Settles one batch each time it is told to."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.under_way: list[asyncio.Event] = []

    async def settle(self, settlements: Sequence[Settlement]) -> None:
        self.batches.append([each.kind for each in settlements])
        done = asyncio.Event()
        self.under_way.append(done)
        await done.wait()

    async def let_through(self) -> None:
        """End the oldest that is under way, and let happen what follows from it."""
        self.under_way.pop(0).set()
        await turns()


async def turns() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def delivery() -> Delivery:
    message = Message(exchange="x", routing_key="k", body=b"1", message_id="m", timestamp_us=0)
    return Delivery(message=message, queue="q", attempt=1, deliveries=1, receipt=None)


def settler(gate: Gate) -> Settler:
    async def pause() -> None:
        raise AssertionError("nothing fails here")

    return Settler(cast("Subscription", cast("Any", gate)), pause, asyncio.Event())


async def test_without_acks_it_is_settled_at_once() -> None:
    gate = Gate()
    settling = settler(gate)
    settling.add(retry(delivery(), 5))
    await turns()
    assert gate.batches == [["retry"]]
    await gate.let_through()
    await asyncio.wait_for(settling.finish(), PATIENCE_S)


async def test_while_acks_are_settled_it_gathers_company() -> None:
    gate = Gate()
    settling = settler(gate)
    settling.add(ack(delivery()))
    await turns()
    for each in (retry(delivery(), 5), park(delivery(), "bad"), retry(delivery(), 5)):
        settling.add(each)
        await turns()
    assert gate.batches == [["ack"]]
    await gate.let_through()  # no more acks: nothing to wait for
    assert gate.batches == [["ack"], ["retry", "park", "retry"]]
    await gate.let_through()
    await asyncio.wait_for(settling.finish(), PATIENCE_S)


async def test_acks_without_an_end_hold_it_up_for_a_few_rounds_only() -> None:
    gate = Gate()
    settling = settler(gate)
    settling.add(ack(delivery()))
    await turns()
    settling.add(park(delivery(), "bad"))
    rounds = 0
    while ["park"] not in gate.batches:
        settling.add(ack(delivery()))
        await gate.let_through()
        rounds += 1
        assert rounds <= ROUNDS
    assert rounds == ROUNDS
    settling.add(park(delivery(), "bad too"))  # the next one waits for its own company
    await turns()
    assert gate.batches.count(["park"]) == 1
    while gate.under_way:
        await gate.let_through()
    assert gate.batches.count(["park"]) == 2
    await asyncio.wait_for(settling.finish(), PATIENCE_S)
