"""What a sender sees while the broker is away: on the SQL transports PostgreSQL itself, or a queue that has no room."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from structlog.testing import capture_logs

from holdfast.clock import SystemClock
from holdfast.errors import PublishRejected
from holdfast.messaging.publisher import Publisher
from holdfast.messaging.topology import Queue, Topology
from tests.conftest import WAIT_S, StartSystem, quick_settings
from tests.contract.notes import (
    EXCHANGE,
    KEY,
    Ledger,
    Note,
    counts,
    counts_become,
    effectively,
    manual_clock,
    office,
    opened,
    pass_time,
    send,
)
from tests.servers.postgres import PostgresServer

REQUEST_S = 0.1


def tries(logs: Sequence[Any]) -> list[tuple[int, str]]:
    """Of the failed tries that were logged: their numbers and what went wrong."""
    return [(line["attempt"], line["error"]) for line in logs if line["event"] == "publish_failed"]


async def test_H1_publishing_tries_three_times_each_logged_while_postgresql_is_down(  # noqa: N802  # the row
    postgres_to_crash: PostgresServer,
) -> None:
    """The first half of row H1; the outbox cannot keep what its own database is away for, so the caller is told."""
    url = postgres_to_crash.url(postgres_to_crash.create_database())
    clock = SystemClock()
    async with opened(quick_settings(url)) as system:
        ledger = await Ledger.of(system)
        system.listen(effectively(ledger.write))
        publisher = Publisher(system.transport, system.codec, clock, system.ids)
        postgres_to_crash.crash()
        started = clock.monotonic()
        with capture_logs() as logs, pytest.raises(PublishRejected):
            await publisher.publish(EXCHANGE, KEY, Note("a secret"), message_id="same", deadline_s=WAIT_S)
        took_s = clock.monotonic() - started
        assert tries(logs) == [(attempt, "publish_rejected") for attempt in (1, 2, 3)]
        assert "a secret" not in str(logs)
        assert took_s >= 2.0  # two waits of a second between three tries
        postgres_to_crash.restart()
        await publisher.publish(EXCHANGE, KEY, Note("a secret"), message_id="same", deadline_s=WAIT_S)
        await ledger.holds(1)
        await counts_become(system, (0, 0, 0))
        assert await ledger.entries() == ["a secret"]


async def test_H1_the_tries_are_one_second_apart_and_each_is_logged(start_system: StartSystem) -> None:  # noqa: N802
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    await system.transport.declare(Topology(queues=[Queue(name="full", max_length=0, overflow="reject-publish")]))
    publisher = Publisher(system.transport, system.codec, clock, system.ids)
    with capture_logs() as logs:
        publishing = asyncio.create_task(publisher.publish("", "full", Note("no room"), deadline_s=WAIT_S))
        await pass_time(system, clock, 0)
        for attempt in (1, 2):
            assert len(tries(logs)) == attempt
            await pass_time(system, clock, 0.999)
            assert len(tries(logs)) == attempt
            await pass_time(system, clock, 0.001)
        with pytest.raises(PublishRejected):
            await publishing
    assert tries(logs) == [(attempt, "publish_rejected") for attempt in (1, 2, 3)]


async def test_H2_a_request_that_sends_through_the_outbox_waits_for_no_retries(start_system: StartSystem) -> None:  # noqa: N802
    """Row H2 as far as it goes without a broker: nobody consumes, a publisher is in its retries; a request is quick."""
    system = await office(start_system)
    ledger = await Ledger.of(system)
    await system.transport.declare(Topology(queues=[Queue(name="full", max_length=0, overflow="reject-publish")]))
    publisher = Publisher(system.transport, system.codec, system.clock, system.ids)
    retrying = asyncio.create_task(publisher.publish("", "full", Note("no room"), deadline_s=WAIT_S))
    await send(system, "warm")
    took_s = []
    for number in range(10):
        started = system.clock.monotonic()
        async with system.database.transaction() as tx:
            await ledger.write(tx, [Note(f"business {number}")])
            await system.outbox.add(tx, EXCHANGE, KEY, Note(f"event {number}"))
        took_s.append(system.clock.monotonic() - started)
    assert not retrying.done()
    assert sorted(took_s)[len(took_s) // 2] < REQUEST_S
    assert await counts(system) == (11, 0, 0)
    with pytest.raises(PublishRejected):
        await retrying
    system.listen(effectively(ledger.write))
    await counts_become(system, (0, 0, 0))
    entries = await ledger.entries()
    assert sorted(entries[10:]) == sorted(["warm", *(f"event {number}" for number in range(10))])
