"""Telling a neighbour that is away from a handful of messages that nobody can handle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from holdfast.db.database import Tx
from holdfast.messaging.listen import Listen
from holdfast.messaging.retry import RetryPolicy
from tests.conftest import StartSystem
from tests.contract.notes import (
    QUEUE,
    Note,
    counts_become,
    manual_clock,
    note,
    office,
    parked_messages,
    parks,
    publish,
    turn,
)

POISONOUS = 30  # more than the failures in a row that make an outage
LOCAL_S, DURABLE_S, TRIES = 1, 5, 4


async def plain(body: Note) -> None:
    if body.text == "poison":
        raise ZeroDivisionError


async def effect(tx: Tx, body: Note) -> None:
    await plain(body)


async def effects(tx: Tx, bodies: Sequence[Note]) -> None:
    for each in bodies:
        await plain(each)


async def batch(bodies: Sequence[Note]) -> list[Exception | None]:
    return [ZeroDivisionError() if each.text == "poison" else None for each in bodies]


@pytest.mark.parametrize("handler", [plain, effect, effects, batch])
async def test_many_poisonous_messages_among_good_ones_are_given_up_on_as_fast_as_their_policy_says(
    start_system: StartSystem, handler: Any
) -> None:
    """When all else is done they fail one after the other, again and again; that is no outage."""
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    texts = ["poison" if number % 3 == 1 else "good" for number in range(3 * POISONOUS)]
    await publish(system, [note(system, each) for each in texts])
    listen = Listen(
        name="reader",
        queue=QUEUE,
        handlers=[handler],
        local=RetryPolicy(tries=2, interval_ms=LOCAL_S * 1_000),
        durable=RetryPolicy(tries=TRIES, interval_ms=DURABLE_S * 1_000),
    )
    assert listen.outage_after < POISONOUS
    system.listen(listen)
    for attempt in range(1, TRIES + 1):
        await counts_become(system, (0, POISONOUS, 0))
        await turn(system)
        clock.advance(LOCAL_S)
        if attempt < TRIES:
            await counts_become(system, (0, 0, POISONOUS))
            assert await parked_messages(system) == []
            clock.advance(DURABLE_S)
    kept = await parks(system, POISONOUS)
    assert {each.attempt for each in kept} == {TRIES}
    await counts_become(system, (0, 0, 0))


@pytest.mark.parametrize("handler", [plain, effect, effects, batch])
async def test_where_nothing_has_ever_worked_the_same_failures_are_an_outage(
    start_system: StartSystem, handler: Any
) -> None:
    """Then they are tried one at a time, and most of them are spared."""
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    await publish(system, [note(system, "poison") for _ in range(POISONOUS)])
    system.listen(
        Listen(
            name="reader",
            queue=QUEUE,
            handlers=[handler],
            local=RetryPolicy(tries=2, interval_ms=LOCAL_S * 1_000),
            durable=RetryPolicy(tries=1),
        )
    )
    await counts_become(system, (0, POISONOUS, 0))
    await turn(system)
    for _ in range(5):
        clock.advance(LOCAL_S)
        await turn(system)
    assert len(await parked_messages(system)) <= 5
