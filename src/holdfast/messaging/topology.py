"""Exchange, Queue and Binding: declarations as data, in AMQP's words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from holdfast.errors import InvalidInput

NAME_BYTES_MAX = 255  # a short string in AMQP 0-9-1

ExchangeKind = Literal["direct", "topic", "fanout"]


class Exchange(msgspec.Struct, frozen=True, kw_only=True):
    """Where messages are published; its kind says how the routing key chooses queues."""

    name: str
    kind: ExchangeKind = "topic"

    def __post_init__(self) -> None:
        _check_name("exchange", self.name)


class Queue(msgspec.Struct, frozen=True, kw_only=True):
    """A durable queue whose workers share the messages."""

    name: str

    def __post_init__(self) -> None:
        _check_name("queue", self.name)


class Binding(msgspec.Struct, frozen=True, kw_only=True):
    """Messages of `exchange` whose key fits `routing_key` go to `queue`."""

    exchange: str
    queue: str
    routing_key: str = ""

    def __post_init__(self) -> None:
        if len(self.routing_key.encode()) > NAME_BYTES_MAX:
            raise InvalidInput(f"routing key {self.routing_key[:40]!r}… is longer than {NAME_BYTES_MAX} bytes")


class Topology(msgspec.Struct, frozen=True, kw_only=True):
    """A set of declarations."""

    exchanges: Sequence[Exchange] = ()
    queues: Sequence[Queue] = ()
    bindings: Sequence[Binding] = ()

    def __post_init__(self) -> None:
        exchanges: dict[str, ExchangeKind] = {}
        for exchange in self.exchanges:
            if exchanges.setdefault(exchange.name, exchange.kind) != exchange.kind:
                raise InvalidInput(
                    f"exchange {exchange.name!r} is declared as {exchanges[exchange.name]} and as {exchange.kind}"
                )
        queues = {queue.name for queue in self.queues}
        for binding in self.bindings:
            if binding.exchange not in exchanges:
                raise InvalidInput(f"binding of {binding.queue!r} names the undeclared exchange {binding.exchange!r}")
            if binding.queue not in queues:
                raise InvalidInput(f"binding to {binding.exchange!r} names the undeclared queue {binding.queue!r}")

    def __add__(self, other: Topology) -> Topology:
        return Topology(
            exchanges=(*self.exchanges, *other.exchanges),
            queues=(*self.queues, *other.queues),
            bindings=(*self.bindings, *other.bindings),
        )


def route(kind: ExchangeKind, bindings: Iterable[tuple[str, str]], routing_key: str) -> list[str]:
    """The queues, each once, that a message with this key reaches over bindings of (queue, binding key)."""
    match kind:
        case "fanout":
            chosen = (queue for queue, _ in bindings)
        case "direct":
            chosen = (queue for queue, key in bindings if key == routing_key)
        case "topic":
            chosen = (queue for queue, key in bindings if topic_matches(key, routing_key))
    return list(dict.fromkeys(chosen))


def topic_matches(pattern: str, routing_key: str) -> bool:
    """Whether a topic binding key fits: `*` is exactly one word, `#` any number of words, also none.

    Words are what stands between dots; an empty key has no words at all, as in RabbitMQ.
    Time is at most words in the pattern times words in the key: only the last `#` is ever taken back.
    """
    wanted, words = _words(pattern), _words(routing_key)
    at = word = 0
    hash_at, hash_word = -1, 0
    while word < len(words):
        if at < len(wanted) and wanted[at] == "#":
            hash_at, hash_word = at, word
            at += 1
        elif at < len(wanted) and wanted[at] in ("*", words[word]):
            at += 1
            word += 1
        elif hash_at >= 0:
            hash_word += 1
            at, word = hash_at + 1, hash_word
        else:
            return False
    return all(rest == "#" for rest in wanted[at:])


def _words(key: str) -> list[str]:
    return key.split(".") if key else []


def _check_name(what: str, name: str) -> None:
    if not name:
        raise InvalidInput(f"the {what} needs a name")
    if len(name.encode()) > NAME_BYTES_MAX:
        raise InvalidInput(f"{what} name {name[:40]!r}… is longer than {NAME_BYTES_MAX} bytes")
    if name.startswith("amq."):
        raise InvalidInput(f"{what} name {name!r}: names that begin with amq. belong to the broker")
