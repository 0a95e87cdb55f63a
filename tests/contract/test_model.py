"""A seeded random walk over everything queues do, held against a plain model after every step."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec
import pytest

from holdfast.bootstrap import System
from holdfast.clock import US_PER_S, ManualClock
from holdfast.errors import NoSuchExchange, PublishError, PublishRejected, Unroutable
from holdfast.messaging.message import Delivery, Outgoing, Settlement
from holdfast.messaging.topology import Binding, Exchange, Queue, Topology
from holdfast.messaging.transports.sql.subscription import SqlSubscription
from holdfast.settings import Settings
from tests.conftest import StartSystem
from tests.contract.notes import counts, manual_clock, note, office, parked_everywhere, turn, vanish, with_messaging
from tests.contract.queue_model import Consumer, Lying, Model
from tests.faults.conftest import FULL, Scenario, line_of

STEPS = 10_000 if FULL else 200
LEASE_S, POLL_S, CRASHES_MAX = 30, 0.2, 3
LYING_MAX, CONSUMERS_MAX, TOLD = 40, 5, 40

WALK = Topology(
    exchanges=[
        Exchange(name="topic", kind="topic", alternate="rest"),
        Exchange(name="direct", kind="direct"),
        Exchange(name="rest", kind="fanout"),
    ],
    queues=[
        Queue(name="plain"),
        Queue(name="dying", message_ttl_ms=20_000, dead_letter_exchange="direct", dead_letter_routing_key="dead"),
        Queue(name="drops", max_length=3, dead_letter_exchange="", dead_letter_routing_key="full"),
        Queue(name="full", max_length=3, overflow="reject-publish", dead_letter_exchange="topic"),
        Queue(name="ping", message_ttl_ms=4_000, dead_letter_exchange="", dead_letter_routing_key="pong"),
        Queue(name="pong", message_ttl_ms=4_000, dead_letter_exchange="", dead_letter_routing_key="ping", max_length=2),
        Queue(name="ordered", single_active_consumer=True, dead_letter_exchange="missing"),
    ],
    bindings=[
        Binding(exchange="topic", queue="plain", routing_key="a.#"),
        Binding(exchange="direct", queue="drops", routing_key="dead"),
    ],
)
QUEUES = [queue.name for queue in WALK.queues]
KEYS = ["a", "a.b", "b", "dead", ""]
PATTERNS = ["a", "*", "#", "a.*", "#.b", "dead"]
OUTCOMES: dict[type[PublishError] | type[None], str] = {
    type(None): "ok",
    PublishRejected: "full",
    Unroutable: "unroutable",
    NoSuchExchange: "no exchange",
}


@pytest.fixture
def scenario(request: pytest.FixtureRequest) -> Iterator[Scenario]:
    yield from line_of(request)


@dataclass
class Walk:
    """The transport and its model, doing the same."""

    system: System
    clock: ManualClock
    model: Model
    random: random.Random
    subscriptions: dict[Consumer, SqlSubscription] = field(default_factory=dict)
    deliveries: dict[Lying, Delivery] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    sent: int = 0

    async def step(self) -> None:
        """One thing, chosen at random, and what follows of it at once."""
        crowded = len(self.model.lying) > LYING_MAX
        weights = {
            self.publish: 2 if crowded else 22,
            self.cancel: 4,
            self.bind: 1,
            self.enter: 0 if len(self._alive()) >= CONSUMERS_MAX else 12,
            self.take: 35,
            self.settle: 20,
            self.leave: 3,
            self.crash: 4,
            self.advance: 12,
        }
        (action,) = self.random.choices(list(weights), list(weights.values()))
        told = await action()
        self.kinds[action.__name__] += told is not None
        self.done.append(f"{action.__name__} {told}")
        await asyncio.sleep(0)  # what was started begins before time passes
        if self.model.overdue():  # let go of after its end: polling finds it
            await self._pass(POLL_S)

    async def publish(self) -> str:
        batch = [self._note() for _ in range(self.random.randint(1, 4))]
        outcomes = [OUTCOMES[type(each)] for each in await self.system.transport.publish(batch)]
        await turn(self.system)
        expected = self.model.publish(batch)
        self.model.sweep()  # one that may not wait at all expires at once
        sent = [(each.message.exchange, each.message.routing_key, each.delay_ms, each.expires_ms) for each in batch]
        assert outcomes == expected, f"outcomes of publishing {sent}"
        return f"{sent}: {outcomes}"

    def _note(self) -> Outgoing:
        self.sent += 1
        chosen = self.random
        exchange = chosen.choice(["", "", "", "topic", "direct", "missing"])
        outgoing = note(
            self.system,
            exchange=exchange,
            key=chosen.choice(KEYS if exchange else [*QUEUES, *QUEUES, "nobody"]),
            message_id=f"m{self.sent}",
            delay_ms=chosen.choice([0, 0, 0, 500, 5_000, 15_000]),
            mandatory=chosen.random() < 0.7,
            cancel_key=chosen.choice([None, "k1", "k2"]),
        )
        return msgspec.structs.replace(outgoing, expires_ms=chosen.choice([None, None, None, 0, 1_000, 12_000]))

    async def cancel(self) -> str:
        keys = self.random.sample(["k1", "k2", "unknown"], self.random.randint(1, 2))
        async with self.system.database.transaction() as tx:
            cancelled = await self.system.transport.cancel_in(tx, keys)
        assert cancelled == self.model.cancel(keys), f"cancelled under {keys}"
        return f"{keys}: {cancelled}"

    async def bind(self) -> str:
        exchange = self.random.choice(["topic", "direct", "rest"])
        queue, key = self.random.choice(QUEUES), self.random.choice(PATTERNS)
        binding = Binding(exchange=exchange, queue=queue, routing_key=key)
        await self.system.transport.declare(msgspec.structs.replace(WALK, bindings=[binding]))
        self.model.bindings.add((exchange, queue, key))
        return f"{exchange} -> {queue} by {key}"

    async def enter(self) -> str:
        busy = [each.queue for each in self.model.lying if each.due <= self.model.now]
        queue, prefetch = self.random.choice([*QUEUES, *busy]), self.random.randint(1, 4)
        subscription = self.system.transport.subscribe(queue, prefetch=prefetch)
        assert isinstance(subscription, SqlSubscription)
        await subscription.__aenter__()
        consumer = Consumer(queue, prefetch, self.model.now + self.model.lease // 3, self.kinds["enter"] + 1)
        self.model.consumers.append(consumer)
        self.subscriptions[consumer] = subscription
        return f"{consumer}"

    def _alive(self) -> list[Consumer]:
        return [each for each in self.model.consumers if each.alive]

    async def take(self) -> str | None:
        if not (alive := self._alive()):
            return None
        promising = [each for each in alive if self.model.counts(each.queue)[0]]
        consumer = self.random.choice(promising * 3 + alive)
        taking = asyncio.create_task(self.subscriptions[consumer].take())
        await turn(self.system)
        expected = self.model.take(consumer)
        if not expected:
            surplus = [each.message.message_id for each in taking.result()] if taking.done() else []
            assert not surplus, f"{consumer} was to get nothing and got {surplus}"
            taking.cancel()
            await asyncio.wait([taking])
            return f"{consumer}: nothing"
        assert taking.done(), f"{consumer} was to get {expected} and waits"
        deliveries = taking.result()
        self.deliveries |= dict(zip(expected, deliveries, strict=False))
        came = [
            (each.message.message_id, each.message.routing_key, each.attempt, each.deliveries) for each in deliveries
        ]
        wanted = [(each.name, each.key, each.attempt, each.deliveries) for each in expected]
        assert came == wanted, f"deliveries to {consumer}"
        return f"{consumer}: {came}"

    async def settle(self) -> str | None:
        holding = [each for each in self._alive() if self.model.held(each)]
        if not holding:
            return None
        consumer = self.random.choice(holding)
        held = self.model.held(consumer)
        chosen = [
            (each, self.random.choice(["ack", "ack", "retry", "reject", "park"]), self.random.choice([0, 700, 8_000]))
            for each in self.random.sample(held, self.random.randint(1, len(held)))
        ]
        settlements = [
            Settlement(delivery=self.deliveries.pop(each), kind=kind, after_ms=after_ms, reason="no good")  # type: ignore[arg-type]
            for each, kind, after_ms in chosen
        ]
        await self.subscriptions[consumer].settle(settlements)
        self.model.settle(chosen)
        self.kinds.update(kind for _, kind, _ in chosen)
        return f"{consumer}: {[(each.name, kind, after_ms) for each, kind, after_ms in chosen]}"

    async def leave(self) -> str | None:
        if not (alive := self._alive()):
            return None
        consumer = self.random.choice(alive)
        await self.subscriptions.pop(consumer).__aexit__(None, None, None)
        self.model.leave(consumer)
        return f"{consumer}"

    async def crash(self) -> str | None:
        if not (alive := self._alive()):
            return None
        consumer = self.random.choice(alive)
        vanish(self.subscriptions[consumer])
        consumer.alive = False
        return f"{consumer}"

    async def advance(self) -> str:
        seconds = self.random.choice([0.2, 0.5, 1, 2, 4, 10])
        for _ in range(self.random.choice([1, 1, 1, 4])):
            await self._pass(seconds)
        return f"{seconds} s"

    async def _pass(self, seconds: float) -> None:
        self.clock.advance(seconds)
        await turn(self.system)
        self.model.advance(round(seconds * US_PER_S))

    async def compare(self) -> None:
        """Every queue's counts, and what is parked."""
        for queue in QUEUES:
            assert await counts(self.system, queue) == self.model.counts(queue), f"(ready, unacked, delayed) of {queue}"
        assert await parked_everywhere(self.system) == sorted(self.model.parked), "what is parked"


@pytest.mark.torture
async def test_a_random_walk_does_what_the_model_says(
    start_system: StartSystem, settings: Settings, scenario: Scenario
) -> None:
    clock = manual_clock()
    limits = {"lease_ms": LEASE_S * 1_000, "poll_ms": round(POLL_S * 1_000), "crashes_max": CRASHES_MAX}
    system = await office(start_system, with_messaging(settings, **limits), clock=clock)
    await system.transport.declare(WALK)
    model = Model(WALK, clock.now_us(), LEASE_S * US_PER_S, CRASHES_MAX)
    walk = Walk(system, clock, model, random.Random(scenario.seed))
    for scenario.n in range(1, STEPS + 1):
        try:
            await walk.step()
            await walk.compare()
        except AssertionError as error:
            told = "\n".join(walk.done[-TOLD:])
            pytest.fail(f"TORTURE_SEED={scenario.seed}, step {scenario.n}: {error}\nthe last steps:\n{told}")
    scenario.violations = 0
    print(f"{scenario.n} steps: {dict(sorted(walk.kinds.items()))}, {len(model.parked)} parked")
    wanted = {"publish", "cancel", "bind", "enter", "take", "settle", "leave", "crash", "advance"}
    assert set(walk.kinds) >= wanted | {"ack", "retry", "reject", "park"}  # it did all that there is
    assert model.parked
    for consumer in walk._alive():
        await walk.subscriptions[consumer].__aexit__(None, None, None)
