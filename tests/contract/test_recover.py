"""Giving up: recoverers, fatal classes, time limits, outages, order by key, pausing, and what must not be retried."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from holdfast.bootstrap import System
from holdfast.db.database import Tx
from holdfast.errors import InvalidInput, NoSuchExchange
from holdfast.messaging.injection import Incoming
from holdfast.messaging.listen import Listen
from holdfast.messaging.message import Delivery, Settlement, ack, retry
from holdfast.messaging.publisher import Publisher
from holdfast.messaging.recover import DeadLetter, Discard, Park, Recoverer, Republish, Requeue, error_topology
from holdfast.messaging.retry import NO_RETRY, Reject, RetryPolicy
from holdfast.messaging.topology import Binding, Exchange, Queue, Topology
from holdfast.messaging.transport import Transport
from holdfast.settings import Settings
from tests.conftest import StartSystem, eventually
from tests.contract.notes import (
    EXCHANGE,
    KEY,
    ONCE,
    QUEUE,
    Ledger,
    Note,
    counts,
    counts_become,
    effectively,
    manual_clock,
    note,
    office,
    parked_messages,
    parks,
    pass_time,
    plainly,
    publish,
    raw,
    send,
    take,
    texts,
    turn,
    vanish,
    with_messaging,
)


async def fail(_: Incoming) -> None:
    raise ZeroDivisionError("it\x00 always fails")


async def ready(system: System, queue: str, count: int = 1) -> Sequence[Delivery]:
    """Wait for messages in a queue and take them."""
    await counts_become(system, (count, 0, 0), queue)
    async with system.transport.subscribe(queue, prefetch=count) as subscription:
        return await take(subscription, count)


# -- recoverers -------------------------------------------------------------------------------------------------------


async def test_republish_keeps_the_message_and_tells_what_went_wrong(start_system: StartSystem) -> None:
    system = await office(start_system)
    await system.transport.declare(error_topology("shop"))
    (message_id,) = await send(system, "broken")
    system.listen(plainly(fail, recover=Republish(service="shop")))
    (failed,) = await ready(system, "shop.error.queue")
    assert failed.message.message_id == message_id
    assert msgspec.json.decode(failed.message.body, type=Note) == Note("broken")
    headers = failed.message.headers
    assert headers["x-exception-message"] == "ZeroDivisionError: it always fails"
    assert "in fail" in headers["x-exception-stacktrace"]
    assert (headers["x-original-exchange"], headers["x-original-routingKey"]) == (EXCHANGE, KEY)
    assert headers["x-original-queue"] == QUEUE
    assert (failed.message.exchange, failed.message.routing_key) == ("error.direct", "shop")
    await counts_become(system, (0, 0, 0))
    assert await parked_messages(system) == []


async def test_while_the_error_exchange_is_missing_the_message_stays(start_system: StartSystem) -> None:
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    await send(system, "broken")
    system.listen(plainly(fail, recover=Republish(service="shop", stack_trace=False)))

    async def waits() -> bool:
        return await counts(system) == (0, 0, 1)

    await eventually(waits, "it waits in its own queue")
    await system.transport.declare(error_topology("shop"))

    async def arrived() -> bool:
        await pass_time(system, clock, 5)
        return await counts(system, "shop.error.queue") == (1, 0, 0)

    await eventually(arrived, "it is republished as soon as that is possible")
    async with system.transport.subscribe("shop.error.queue", prefetch=1) as subscription:
        (failed,) = await take(subscription)
    assert "x-exception-stacktrace" not in failed.message.headers


async def test_dead_letter_discard_and_requeue_leave_the_queues_as_they_say(start_system: StartSystem) -> None:
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    await system.transport.declare(
        Topology(
            exchanges=[Exchange(name="dlx", kind="fanout")],
            queues=[
                Queue(name="dead"),
                Queue(name="lettering", dead_letter_exchange="dlx"),
                Queue(name="dropping"),
                Queue(name="again"),
            ],
            bindings=[Binding(exchange="dlx", queue="dead")],
        )
    )
    calls = 0

    async def count(_: Incoming) -> None:
        nonlocal calls
        calls += 1
        raise ZeroDivisionError

    cases: dict[str, tuple[Recoverer, object]] = {
        "lettering": (DeadLetter(), fail),
        "dropping": (Discard(), fail),
        "again": (Requeue(interval_ms=10_000), count),
    }
    for queue, (recover, handler) in cases.items():
        await send(system, queue, exchange="", key=queue)
        listen = plainly(handler, name=queue, recover=recover)  # type: ignore[arg-type]  # both are handlers
        system.listen(msgspec.structs.replace(listen, queue=queue))
    assert len(await ready(system, "dead")) == 1
    await counts_become(system, (0, 0, 0), "lettering")
    await counts_become(system, (0, 0, 0), "dropping")
    await counts_become(system, (0, 0, 1), "again")
    for wait_s, wanted in ((10, 2), (20, 3), (40, 4)):
        await pass_time(system, clock, wait_s - 0.001)
        assert calls == wanted - 1
        await pass_time(system, clock, 0.001)

        async def called(wanted: int = wanted) -> bool:
            await turn(system)
            return calls == wanted and (await counts(system, "again")) == (0, 0, 1)

        await eventually(called, f"it was tried {wanted} times")
    for queue in cases:
        assert await parked_messages(system, queue) == []


class Broken:
    """A recoverer with a bug."""

    async def recover(self, transport: Transport, delivery: Delivery, error: BaseException) -> Settlement:
        raise LookupError("the recoverer's own bug")


async def test_a_recoverer_that_fails_loses_nothing(start_system: StartSystem) -> None:
    system = await office(start_system)
    await send(system, "broken")
    system.listen(plainly(fail, recover=Broken()))
    (parked,) = await parks(system)
    assert parked.reason.startswith("ZeroDivisionError")


async def test_what_cannot_be_decoded_goes_to_the_recoverer_too(start_system: StartSystem) -> None:
    system = await office(start_system)
    await system.transport.declare(error_topology("shop"))
    await publish(system, [raw(note(system), body=b"{"), raw(note(system), type="nobody.knows")])
    system.listen(plainly(fail, recover=Republish(service="shop")))
    failed = await ready(system, "shop.error.queue", 2)
    assert all(each.message.headers["x-exception-message"].startswith("CannotDecode") for each in failed)


@pytest.mark.parametrize("error", [Reject("hopeless"), KeyError("of the listener's own list")])
async def test_fatal_errors_are_not_tried_again(start_system: StartSystem, error: Exception) -> None:
    system = await office(start_system)
    calls = []

    async def handle(incoming: Incoming) -> None:
        calls.append(incoming.body.text)
        raise error

    many = RetryPolicy(tries=5, interval_ms=1, fatal=(KeyError,))
    await send(system, "once")
    system.listen(plainly(handle, local=many, durable=many, recover=Park()))
    await parks(system)
    assert calls == ["once"]


# -- stateless and stateful -------------------------------------------------------------------------------------------

THRICE = RetryPolicy(tries=3, interval_ms=1_000)


class Tries:
    """A handler that fails and keeps the delivery of each try."""

    def __init__(self) -> None:
        self.deliveries: list[Delivery] = []

    async def handle(self, incoming: Incoming) -> None:
        self.deliveries.append(incoming.delivery)
        raise ZeroDivisionError

    async def are(self, count: int) -> None:
        async def reached() -> bool:
            return len(self.deliveries) >= count

        await eventually(reached, f"{count} tries")
        assert len(self.deliveries) == count


async def test_stateless_retries_are_all_within_one_delivery(start_system: StartSystem) -> None:
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    tries = Tries()
    system.listen(plainly(tries.handle, local=THRICE, durable=NO_RETRY))
    await send(system, "broken")
    for number in (1, 2):
        await tries.are(number)
        await turn(system)
        assert await counts(system) == (0, 1, 0)  # it waits unacked, in the hands of this process
        await pass_time(system, clock, 1)
    await tries.are(3)
    (parked,) = await parks(system)
    assert parked.attempt == 1
    first = tries.deliveries[0]
    assert all(each is first for each in tries.deliveries)
    assert (first.attempt, first.deliveries) == (1, 1)


async def test_stateful_retries_are_a_delivery_each_and_counted_with_the_message(start_system: StartSystem) -> None:
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    tries = Tries()
    listener = system.listen(plainly(tries.handle, local=NO_RETRY, durable=THRICE))
    await send(system, "broken")
    await tries.are(1)
    await counts_become(system, (0, 0, 1))  # it waits in its queue, in nobody's hands
    await listener.stop()
    clock.advance(1)
    system.listen(plainly(tries.handle, local=NO_RETRY, durable=THRICE))  # another one goes on counting
    await tries.are(2)
    await counts_become(system, (0, 0, 1))
    await pass_time(system, clock, 1)
    await tries.are(3)
    (parked,) = await parks(system)
    assert parked.attempt == 3
    assert [each.attempt for each in tries.deliveries] == [1, 2, 3]
    assert len({id(each) for each in tries.deliveries}) == 3


@pytest.mark.parametrize(("local", "durable"), [(THRICE, NO_RETRY), (NO_RETRY, THRICE)], ids=["stateless", "stateful"])
async def test_every_try_of_an_effect_has_a_transaction_of_its_own_stateless_or_stateful(
    start_system: StartSystem, local: RetryPolicy, durable: RetryPolicy
) -> None:
    clock = manual_clock()
    system = await office(start_system, clock=clock)
    ledger = await Ledger.of(system)
    transactions: list[Tx] = []
    failing = True

    async def effect(tx: Tx, notes: Sequence[Note]) -> None:
        transactions.append(tx)
        await ledger.write(tx, notes)
        if failing:
            raise ZeroDivisionError

    async def failed() -> bool:
        return len(transactions) > 0 and await counts(system) == ((0, 1, 0) if durable is NO_RETRY else (0, 0, 1))

    async def handled() -> bool:
        await pass_time(system, clock, 1)
        return await counts(system) == (0, 0, 0)

    system.listen(effectively(effect, local=local, durable=durable))
    await send(system, "second time lucky")
    await eventually(failed, "the first try")
    await turn(system)
    assert await ledger.entries() == []
    first, failing = list(transactions), False
    await eventually(handled, "the second try")
    assert transactions[-1] not in first
    assert await ledger.entries() == ["second time lucky"]
    assert await parked_messages(system) == []


def test_an_error_queue_needs_its_services_name() -> None:
    with pytest.raises(InvalidInput, match="give the service's name"):
        error_topology("")


# -- limits -----------------------------------------------------------------------------------------------------------


async def test_a_handler_over_its_time_is_cancelled_and_has_failed(start_system: StartSystem) -> None:
    system = await office(start_system)
    cancelled = []

    async def hang(_: Incoming) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    await send(system, "slow")
    system.listen(plainly(hang, time_limit_ms=50))
    (parked,) = await parks(system)
    assert parked.reason.startswith("HandlerTimeout: not done within 50 ms")
    assert cancelled == [True]


async def test_a_handlers_own_time_out_is_its_own(start_system: StartSystem) -> None:
    system = await office(start_system)

    async def late(_: Incoming) -> None:
        raise TimeoutError("a neighbour's")

    await send(system, "slow")
    system.listen(plainly(late, time_limit_ms=60_000))
    (parked,) = await parks(system)
    assert parked.reason.startswith("TimeoutError: a neighbour's")


async def test_an_outage_is_met_one_at_a_time_and_the_first_success_restores_speed(start_system: StartSystem) -> None:
    system = await office(start_system)
    away, running, most = True, 0, 0
    together = asyncio.Event()

    async def handle(_: Incoming) -> None:
        nonlocal running, most
        running += 1
        if listener._outage.on:
            most = max(most, running)
        try:
            await asyncio.sleep(0)
            if away:
                raise ConnectionError("the neighbour is away")
            if running > 1:
                together.set()
            if not first:
                await together.wait()  # nobody gets through until two run at once again
            first.clear()
        finally:
            running -= 1

    first = [True]  # the first success restores the speed, so it may come alone
    await send(system, *(str(number) for number in range(30)))
    durable = RetryPolicy(tries=1_000, interval_ms=1)
    listener = system.listen(plainly(handle, durable=durable, concurrency=5, outage_after=10, outage_wait_ms=1))

    async def in_outage() -> bool:
        return listener._outage.failures > 30

    await eventually(in_outage, "everything fails")
    most = 0

    async def longer() -> bool:
        return listener._outage.failures > 60

    await eventually(longer, "and goes on to fail")
    assert most == 1
    away = False
    await counts_become(system, (0, 0, 0))
    assert together.is_set()
    assert await parked_messages(system) == []


# -- order and pace ---------------------------------------------------------------------------------------------------


async def test_one_key_is_handled_in_order_and_different_keys_side_by_side(start_system: StartSystem) -> None:
    system = await office(start_system)
    running: set[str] = set()
    together, done = 0, []

    async def handle(incoming: Incoming) -> None:
        nonlocal together
        key = incoming.body.text[0]
        assert key not in running
        running.add(key)
        together = max(together, len(running))
        for _ in range(5):
            await asyncio.sleep(0)
        running.remove(key)
        done.append(incoming.body.text)

    sent = [f"{key}{number:02d}" for number in range(20) for key in "abc"]
    await send(system, *sent)
    system.listen(plainly(handle, key=lambda body: body.text[0]))
    await counts_become(system, (0, 0, 0))
    assert {key: [text for text in done if text[0] == key] for key in "abc"} == {
        key: [text for text in sent if text[0] == key] for key in "abc"
    }
    assert together == 3


@pytest.mark.parametrize("key", [lambda body: body.missing, lambda body: [body.text]], ids=["raises", "no key"])
async def test_a_key_that_cannot_be_had_is_a_failure_of_its_message(start_system: StartSystem, key: Any) -> None:
    system = await office(start_system)
    handled: list[str] = []

    async def handle(incoming: Incoming) -> None:
        handled.append(incoming.body.text)

    await send(system, "1", "2")
    system.listen(plainly(handle, key=key, durable=RetryPolicy(tries=2, interval_ms=1)))
    kept = await parks(system, 2)
    await counts_become(system, (0, 0, 0))
    assert {each.attempt for each in kept} == {2}
    assert handled == []


async def test_a_paused_listener_takes_nothing_more_and_goes_on_when_resumed(start_system: StartSystem) -> None:
    system = await office(start_system)
    seen: list[str] = []

    async def handle(incoming: Incoming) -> None:
        seen.append(incoming.body.text)

    listener = system.listen(plainly(handle))
    await send(system, "before")
    await counts_become(system, (0, 0, 0))
    listener.pause()
    await turn(system)
    await send(system, "while paused")
    await turn(system)
    assert (seen, await counts(system)) == (["before"], (1, 0, 0))
    listener.resume()
    await counts_become(system, (0, 0, 0))
    assert seen == ["before", "while paused"]


async def test_concurrency_may_be_changed_while_handlers_run(start_system: StartSystem) -> None:
    system = await office(start_system)
    running, gate = 0, asyncio.Event()

    async def handle(_: Incoming) -> None:
        nonlocal running
        running += 1
        await gate.wait()

    await send(system, *"abcdef")
    listener = system.listen(plainly(handle, concurrency=2))

    async def two() -> bool:
        return running == 2

    await eventually(two, "two run")
    listener.concurrency = 5

    async def five() -> bool:
        return running == 5

    await eventually(five, "five run")
    with pytest.raises(InvalidInput, match="use pause"):
        listener.concurrency = 0
    gate.set()
    await counts_become(system, (0, 0, 0))


@pytest.mark.parametrize("name", ["prefetch", "concurrency", "outage_after", "time_limit_ms"])
def test_limits_below_one_are_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidInput, match=name):
        msgspec.structs.replace(plainly(fail), **{name: 0})


@pytest.mark.parametrize("given", [{"time_limit_ms": 5}, {"key": lambda body: body.text}])
def test_what_is_for_other_handlers_is_refused_for_effects_when_the_listener_is_made(given: dict[str, Any]) -> None:
    async def effect(_: Tx, __: Sequence[Note]) -> None: ...

    for listen in (
        Listen(name="x", queue=QUEUE, effects={Note: effect}, **given),
        Listen(name="x", queue=QUEUE, handlers=[effect], **given),
    ):
        with pytest.raises(InvalidInput, match="time_limit_ms and key are not for handlers in a transaction"):
            listen.bound(manual_clock())


def test_a_key_is_refused_for_batches_when_the_listener_is_made() -> None:
    async def batch(_: Sequence[Note]) -> None: ...

    with pytest.raises(InvalidInput, match="key is for handlers of one message"):
        Listen(name="x", queue=QUEUE, handlers=[batch], key=lambda body: body.text).bound(manual_clock())


# -- refusals that used to hang ---------------------------------------------------------------------------------------


async def test_an_unknown_exchange_is_told_at_once_and_not_tried_again(start_system: StartSystem) -> None:
    clock = manual_clock()  # it never moves: any wait between tries would hang
    system = await office(start_system, clock=clock)
    patient = Publisher(system.transport, system.codec, clock, system.ids, RetryPolicy(tries=3, interval_ms=1_000))
    with pytest.raises(NoSuchExchange, match="'nowhere'"):
        await patient.publish("nowhere", KEY, Note("x"))


async def test_publishing_outside_the_transaction_of_an_effect_is_refused_at_once(start_system: StartSystem) -> None:
    system = await office(start_system)
    ledger = await Ledger.of(system)

    async def effect(tx: Tx, notes: Sequence[Note]) -> None:
        await ledger.write(tx, notes)
        await system.publisher.publish(EXCHANGE, KEY, Note("it would wait for itself"))

    await send(system, "x")
    system.listen(effectively(effect, local=ONCE, durable=ONCE))
    (parked,) = await parks(system)
    assert "use the transaction at hand" in parked.reason
    assert await ledger.entries() == []


async def test_a_listener_whose_queue_is_declared_later_begins_then(start_system: StartSystem) -> None:
    system = await office(start_system)
    seen: list[str] = []

    async def handle(incoming: Incoming) -> None:
        seen.append(incoming.body.text)

    system.listen(msgspec.structs.replace(plainly(handle), queue="later"))
    await turn(system)
    await system.transport.declare(Topology(queues=[Queue(name="later")]))
    await send(system, "hello", exchange="", key="later")
    await counts_become(system, (0, 0, 0), "later")
    assert seen == ["hello"]


# -- crash loops ------------------------------------------------------------------------------------------------------


async def test_a_message_that_ends_its_process_is_parked_and_its_innocent_neighbours_are_handled(
    start_system: StartSystem, settings: Settings
) -> None:
    clock = manual_clock()
    system = await office(start_system, with_messaging(settings, lease_ms=5_000, crashes_max=5), clock=clock)
    await send(system, *(f"innocent {number}" for number in range(6)))
    await send(system, "poison")
    done: list[str] = []
    crashes = 0

    async def left() -> int:
        return (await system.transport.stats(QUEUE)).total

    while await left():
        # A consumer that is gone without a word as soon as it meets the poison.
        consumer = system.transport.subscribe(QUEUE, prefetch=10)
        await consumer.__aenter__()
        alive = True
        while alive and await left():
            taking = asyncio.create_task(consumer.take())
            for _ in range(3):
                await turn(system)
                clock.advance(0 if taking.done() else 1)
            if not taking.done():
                taking.cancel()
                continue
            deliveries = taking.result()
            alive = "poison" not in texts(deliveries)
            if alive:
                await consumer.settle([ack(each) for each in deliveries])
                done += texts(deliveries)
        vanish(consumer)
        crashes += not alive
        clock.advance(6)
    (parked,) = await parked_messages(system)
    assert msgspec.json.decode(parked.body, type=Note) == Note("poison")
    assert parked.reason.startswith("CrashLoop: 5 deliveries")
    assert crashes == 5
    assert sorted(done) == [f"innocent {number}" for number in range(6)]


async def test_deliveries_that_end_with_an_outcome_are_no_crashes(
    start_system: StartSystem, settings: Settings
) -> None:
    system = await office(start_system, with_messaging(settings, crashes_max=2))
    await send(system, "again and again")
    for _ in range(6):
        async with system.transport.subscribe(QUEUE, prefetch=1) as subscription:
            (delivery,) = await take(subscription)
            await subscription.settle([retry(delivery, 0)])
        async with system.transport.subscribe(QUEUE, prefetch=1) as subscription:
            await take(subscription)  # given back when the consumer leaves
    assert await parked_messages(system) == []
    assert await counts(system) == (1, 0, 0)
