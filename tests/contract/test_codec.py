"""The codec over real queues: what it says of a body travels with the message, and with no other message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import pytest

from holdfast.bootstrap import System
from holdfast.db.database import Tx
from holdfast.messaging.codec import Codec
from holdfast.messaging.draft import Draft
from holdfast.messaging.listen import Listen
from holdfast.messaging.message import Delivery
from holdfast.messaging.outbox import Outbox
from holdfast.messaging.publisher import Publisher
from tests.conftest import StartSystem, eventually
from tests.contract.notes import EXCHANGE, KEY, ONCE, QUEUE, TYPES, Memo, Note, needs_shared_database, office, take

JAVA = {"com.mall.Note": Note}
LONG = Note("long " * 500)


async def office_with(start_system: StartSystem, codec: Codec) -> System:
    """A system whose messages go through this codec."""
    system = await office(start_system)
    bus = system.messaging
    bus = msgspec.structs.replace(
        bus,
        codec=codec,
        outbox=Outbox(bus.transport, codec, bus.clock, bus.ids),
        publisher=Publisher(bus.transport, codec, bus.clock, bus.ids, ONCE),
    )
    return msgspec.structs.replace(system, messaging=bus)


async def taken(system: System, count: int) -> list[Delivery]:
    async with system.transport.subscribe(QUEUE, prefetch=count) as subscription:
        return await take(subscription, count)


@pytest.mark.parametrize("algorithm", ["gzip", "zstd"])
async def test_a_published_body_travels_compressed_under_its_java_name(
    start_system: StartSystem, algorithm: str
) -> None:
    codec = Codec(TYPES, java=JAVA, compress="gzip" if algorithm == "gzip" else "zstd")
    system = await office_with(start_system, codec)
    await system.messaging.publisher.publish(EXCHANGE, KEY, LONG)
    (delivery,) = await taken(system, 1)
    message = delivery.message
    assert (message.type, message.content_type) == ("test.note", "application/json")
    assert message.headers["content-encoding"] == algorithm
    assert message.headers["__TypeId__"] == "com.mall.Note"
    assert len(message.body) < 200
    assert Codec(TYPES).decode(message) == LONG


async def test_what_a_body_causes_does_not_carry_its_headers(start_system: StartSystem) -> None:
    system = await office_with(start_system, Codec(TYPES, java=JAVA, compress="gzip"))
    needs_shared_database(system)
    bus = system.messaging

    async def answer(tx: Tx, notes: Sequence[Note]) -> None:
        # As the services do: the answer goes on in the trace of its cause.
        drafts = [
            Draft(exchange=EXCHANGE, routing_key=KEY, body=body, trace=tx.trace_of(note))
            for note in notes
            for body in (Memo("short"), Memo("long " * 500))
        ]
        await bus.outbox.add_all(tx, drafts)

    memos: list[tuple[str, Mapping[str, str]]] = []

    async def remember(tx: Tx, bodies: Sequence[Memo]) -> None:
        memos.extend((body.text[:5], tx.trace_of(body)) for body in bodies)

    bus.listen(Listen(name="answering", queue=QUEUE, effects={Note: answer, Memo: remember}, local=ONCE, durable=ONCE))
    async with system.database.transaction() as tx:
        trace = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
        await bus.outbox.add_all(tx, [Draft(exchange=EXCHANGE, routing_key=KEY, body=LONG, trace=trace)])

    async def both_came() -> bool:
        return len(memos) == 2

    await eventually(both_came, "both memos came")
    assert sorted(memos) == [("long ", trace), ("short", trace)]
