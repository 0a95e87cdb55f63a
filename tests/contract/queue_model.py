"""What queues do, in plain Python without a database: the model that test_model.py holds the transport against."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from holdfast.messaging.message import Outgoing
from holdfast.messaging.topology import Queue, Topology
from tests.routing_model import reached

MS, SUSPECT_CRASHES, SUSPECT_WAIT_US = 1_000, 2, 1_000_000


@dataclass(eq=False)
class Lying:
    """One message in one queue; `place` is the order in which messages came."""

    name: str
    queue: str
    key: str
    place: int
    due: int
    expires: int | None
    cancel_key: str | None = None
    history: tuple[tuple[str, str], ...] = ()  # (queue, reason), the latest death first
    attempt: int = 1
    deliveries: int = 0
    crashes: int = 0
    holder: Consumer | None = None

    def __post_init__(self) -> None:
        self.ready = self.due


@dataclass(eq=False)
class Consumer:
    queue: str
    prefetch: int
    renews: int
    number: int
    alive: bool = True

    def __str__(self) -> str:
        return f"consumer {self.number} of {self.queue} (prefetch {self.prefetch})"


@dataclass
class Model:
    topology: Topology
    now: int
    lease: int
    crashes_max: int
    lying: list[Lying] = field(default_factory=list)
    parked: list[tuple[str, str]] = field(default_factory=list)
    consumers: list[Consumer] = field(default_factory=list)
    active: dict[str, tuple[Consumer, int]] = field(default_factory=dict)  # who alone consumes, until when
    places: int = 0

    def __post_init__(self) -> None:
        self.queues = {queue.name: queue for queue in self.topology.queues}
        self.exchanges = {exchange.name: exchange for exchange in self.topology.exchanges}
        self.bindings = {(each.exchange, each.queue, each.routing_key) for each in self.topology.bindings}

    # -- looking ------------------------------------------------------------------------------------------------------

    def counts(self, queue: str) -> tuple[int, int, int]:
        here = [each for each in self.lying if each.queue == queue]
        later = [each for each in here if each.due > self.now]
        unacked = sum(each.holder is not None for each in later)
        return len(here) - len(later), unacked, len(later) - unacked

    def held(self, consumer: Consumer) -> list[Lying]:
        return [each for each in self.lying if each.holder is consumer]

    def overdue(self) -> list[Lying]:
        """What has expired and nobody holds, the earliest first."""
        free = [each for each in self.lying if each.holder is None or each.due <= self.now]
        ended = [each for each in free if each.expires is not None and each.expires <= self.now]
        return sorted(ended, key=lambda each: (each.expires, each.place))

    def _ready(self, queue: str) -> list[Lying]:
        here = [each for each in self.lying if each.queue == queue and each.due <= self.now]
        return sorted(here, key=lambda each: (each.due, each.place))

    def _targets(self, exchange: str, key: str) -> list[str]:
        if not exchange:
            return [key] if key in self.queues else []
        return sorted(reached(self.exchanges, self.bindings, exchange, key))

    # -- sending ------------------------------------------------------------------------------------------------------

    def publish(self, batch: Sequence[Outgoing]) -> list[str]:
        """One outcome for each: "ok", "full", "unroutable" or "no exchange"; the batch is decided as one."""
        outcomes, coming, sent = [], dict.fromkeys(self.queues, 0), []
        for each in batch:
            message = each.message
            if message.exchange and message.exchange not in self.exchanges:
                outcomes.append("no exchange")
                continue
            targets = self._targets(message.exchange, message.routing_key)
            limits = {name: self.queues[name] for name in targets if self.queues[name].overflow == "reject-publish"}
            if any(self.counts(name)[0] + coming[name] >= (limits[name].max_length or 0) for name in limits):
                outcomes.append("full")
                continue
            for name in targets:
                coming[name] += not each.delay_ms
            outcomes.append("ok" if targets or not each.mandatory else "unroutable")
            due = self.now + each.delay_ms * MS
            sent += [self._new(each, self.queues[name], due) for name in targets]
        self._add(sent)
        return outcomes

    def _new(self, sent: Outgoing, queue: Queue, due: int) -> Lying:
        times = [time for time in (sent.expires_ms, queue.message_ttl_ms) if time is not None]
        expires = due + min(times) * MS if times else None
        message = sent.message
        return Lying(message.message_id, queue.name, message.routing_key, 0, due, expires, sent.cancel_key)

    def _add(self, coming: Iterable[Lying]) -> None:
        names = []
        for each in coming:
            self.places += 1
            each.place = self.places
            self.lying.append(each)
            names.append(each.queue)
        for name in dict.fromkeys(names):
            limit = self.queues[name].max_length
            if limit is not None and self.queues[name].overflow == "drop-head":
                ready = self._ready(name)
                self._bury(ready[: max(0, len(ready) - limit)], "maxlen")

    def _bury(self, dead: Sequence[Lying], reason: str) -> None:
        again = []
        for each in dead:
            self.lying.remove(each)
            queue = self.queues[each.queue]
            if queue.dead_letter_exchange is None:
                if reason == "rejected":
                    self.parked.append((each.queue, each.name))
                continue
            key = each.key if queue.dead_letter_routing_key is None else queue.dead_letter_routing_key
            targets = self._targets(queue.dead_letter_exchange, key)
            if not targets:
                self.parked.append((each.queue, each.name))
            death = (each.queue, reason)
            history = (death, *(other for other in each.history if other != death))
            for name in targets:
                if not _circles(history, name):
                    ttl = self.queues[name].message_ttl_ms
                    expires = None if ttl is None else self.now + ttl * MS
                    again.append(Lying(each.name, name, key, 0, self.now, expires, history=history))
        self._add(again)

    def cancel(self, keys: Collection[str]) -> int:
        gone = [each for each in self.lying if each.cancel_key in keys and each.holder is None]
        self.lying = [each for each in self.lying if each not in gone]
        return len(gone)

    # -- consuming ----------------------------------------------------------------------------------------------------

    def take(self, consumer: Consumer) -> list[Lying]:
        while found := self._claimed(consumer):
            alone = not any(each.crashes >= SUSPECT_CRASHES for each in self.held(consumer))
            kept = []
            for each in sorted(found, key=lambda each: (each.ready, each.place)):
                each.deliveries += 1
                each.crashes += each.holder is not None
                each.holder, each.due = consumer, self.now + self.lease
                if each.crashes >= self.crashes_max:
                    self.lying.remove(each)
                    self.parked.append((each.queue, each.name))
                elif each.crashes < SUSPECT_CRASHES or alone:
                    alone = alone and each.crashes < SUSPECT_CRASHES
                    kept.append(each)
                else:
                    each.holder, each.due = None, self.now + SUSPECT_WAIT_US
            if kept:
                return kept
        return []

    def _claimed(self, consumer: Consumer) -> list[Lying]:
        room = consumer.prefetch - len(self.held(consumer))
        if room > 0 and self.queues[consumer.queue].single_active_consumer:
            active, until = self.active.get(consumer.queue, (consumer, 0))
            if active is not consumer and until > self.now:
                return []
            self.active[consumer.queue] = consumer, self.now + self.lease
        open_ = [each for each in self._ready(consumer.queue) if each.expires is None or each.expires > self.now]
        return open_[:room]

    def settle(self, kinds: Sequence[tuple[Lying, str, int]]) -> None:
        """Of (message, kind, delay in ms): rejected ones go first, one by one."""
        for each, kind, after_ms in sorted(kinds, key=lambda settled: settled[1] != "reject"):
            each.holder = None
            if kind == "reject":
                self._bury([each], "rejected")
            elif kind == "retry":
                each.due = each.ready = self.now + after_ms * MS
                each.attempt += 1
            else:
                self.lying.remove(each)
                self.parked += [(each.queue, each.name)] * (kind == "park")

    def leave(self, consumer: Consumer) -> None:
        """It gives back what it holds, to where it was in the queue."""
        for each in self.held(consumer):
            each.holder, each.due = None, each.ready
        self.consumers.remove(consumer)
        if self.active.get(consumer.queue, (None, 0))[0] is consumer:
            del self.active[consumer.queue]

    def advance(self, us: int) -> None:
        """By a third of a lease at most."""
        self.now += us
        for consumer in self.consumers:
            if consumer.alive and consumer.renews <= self.now:
                consumer.renews = self.now + self.lease // 3
                for each in self.held(consumer):
                    each.due = self.now + self.lease
                if self.active.get(consumer.queue, (None, 0))[0] is consumer:
                    self.active[consumer.queue] = consumer, self.now + self.lease
        self.sweep()

    def sweep(self) -> None:
        self._bury(self.overdue(), "expired")


def _circles(history: Sequence[tuple[str, str]], queue: str) -> bool:
    """Whether it was in the queue before, and no consumer's rejection has moved it since."""
    for name, reason in history:
        if reason == "rejected":
            return False
        if name == queue:
            return True
    return False
