"""Exchange, Queue and Binding: declarations as data, in AMQP's words."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import msgspec

from holdfast.errors import InvalidInput, TopologyMismatch

NAME_BYTES_MAX = 255  # a short string in AMQP 0-9-1
MILLISECONDS_MAX = 100 * 366 * 86_400_000
LENGTH_MAX = 1 << 53

ExchangeKind = Literal["direct", "topic", "fanout", "headers"]
Overflow = Literal["drop-head", "reject-publish"]


class Exchange(msgspec.Struct, frozen=True, kw_only=True):
    """Where messages are published; its kind says how the routing key chooses queues.

    What no queue takes goes to the exchange `alternate`, if there is one. Nobody may publish to an `internal` one.
    """

    name: str
    kind: ExchangeKind = "topic"
    alternate: str | None = None
    durable: bool = True
    auto_delete: bool = False
    internal: bool = False

    def __post_init__(self) -> None:
        _check_name("exchange", self.name)
        if self.alternate is not None:
            _check_name("alternate exchange", self.alternate)

    def features(self) -> Iterator[str]:
        """What a transport must offer for it, beyond plain exchanges."""
        yield from _asked(
            headers_exchange=self.kind == "headers",
            alternate_exchange=self.alternate is not None,
            transient_exchange=not self.durable,
            auto_delete_exchange=self.auto_delete,
            internal_exchange=self.internal,
        )


class Queue(msgspec.Struct, frozen=True, kw_only=True):
    """A queue whose consumers share the messages; times are in milliseconds.

    `message_ttl_ms`: a message that waits longer expires. `max_length` counts the messages that are ready; more push
    the oldest out (`drop-head`) or are refused (`reject-publish`). What is rejected, expires or is pushed out goes to
    `dead_letter_exchange`, under its own key or `dead_letter_routing_key`. An `exclusive` queue belongs to the instance
    that declared it and dies with it; `auto_delete` removes it after its last consumer, `expires_ms` when nobody has
    consumed from it or declared it for so long. With `single_active_consumer` one consumer has all messages, and
    another takes over when it is gone.
    """

    name: str
    durable: bool = True
    exclusive: bool = False
    auto_delete: bool = False
    expires_ms: int | None = None
    message_ttl_ms: int | None = None
    max_length: int | None = None
    max_length_bytes: int | None = None
    overflow: Overflow = "drop-head"
    dead_letter_exchange: str | None = None
    dead_letter_routing_key: str | None = None
    single_active_consumer: bool = False
    max_priority: int | None = None

    def __post_init__(self) -> None:
        _check_name("queue", self.name)
        for name, lowest, highest in (
            ("expires_ms", 1, MILLISECONDS_MAX),
            ("message_ttl_ms", 0, MILLISECONDS_MAX),
            ("max_length", 0, LENGTH_MAX),
            ("max_length_bytes", 0, LENGTH_MAX),
            ("max_priority", 1, 255),
        ):
            value = getattr(self, name)
            if value is not None and not lowest <= value <= highest:
                raise InvalidInput(f"queue {self.name!r}: {name} must be in {lowest}..{highest}, not {value}")
        if self.dead_letter_routing_key is not None:
            _check_key(self.dead_letter_routing_key)
            if self.dead_letter_exchange is None:
                raise InvalidInput(
                    f"queue {self.name!r} has a dead_letter_routing_key and no dead_letter_exchange; name the exchange"
                )

    @classmethod
    def anonymous(cls, prefix: str = "anonymous") -> Queue:
        """A queue of this instance alone, gone with it: bound to an exchange, every instance gets every message."""
        return cls(name=f"{prefix}.gen-{secrets.token_hex(8)}", durable=False, exclusive=True, auto_delete=True)

    @property
    def passes(self) -> bool:
        """Whether it may be removed by the system."""
        return self.exclusive or self.auto_delete or self.expires_ms is not None

    def features(self) -> Iterator[str]:
        """What a transport must offer for it, beyond plain durable queues."""
        yield from _asked(
            exclusive=self.exclusive,
            auto_delete=self.auto_delete,
            queue_expires=self.expires_ms is not None,
            message_ttl=self.message_ttl_ms is not None,
            max_length=self.max_length is not None,
            max_length_bytes=self.max_length_bytes is not None,
            dead_letter_exchange=self.dead_letter_exchange is not None,
            single_active_consumer=self.single_active_consumer,
            max_priority=self.max_priority is not None,
        )


class Binding(msgspec.Struct, frozen=True, kw_only=True):
    """Messages of `exchange` whose key fits `routing_key` go to `queue`, or to another exchange `to_exchange`.

    `headers` are for an exchange of the kind headers: all of them must be equal.
    """

    exchange: str
    queue: str = ""
    routing_key: str = ""
    to_exchange: str | None = None
    headers: Mapping[str, str] = {}

    def __post_init__(self) -> None:
        _check_key(self.routing_key)
        if bool(self.queue) == (self.to_exchange is not None):
            raise InvalidInput(f"a binding of exchange {self.exchange!r} names either a queue or to_exchange")

    def features(self) -> Iterator[str]:
        """What a transport must offer for it, beyond bindings of queues by key."""
        yield from _asked(exchange_to_exchange=self.to_exchange is not None, headers_exchange=bool(self.headers))


class Topology(msgspec.Struct, frozen=True, kw_only=True):
    """A set of declarations."""

    exchanges: Sequence[Exchange] = ()
    queues: Sequence[Queue] = ()
    bindings: Sequence[Binding] = ()

    def __post_init__(self) -> None:
        exchanges: dict[str, Exchange] = {}
        for exchange in self.exchanges:
            _refuse_other("exchange", exchanges.setdefault(exchange.name, exchange), exchange)
        queues: dict[str, Queue] = {}
        for queue in self.queues:
            _refuse_other("queue", queues.setdefault(queue.name, queue), queue)
        for binding in self.bindings:
            for name in (binding.exchange, binding.to_exchange):
                if name is not None and name not in exchanges:
                    raise InvalidInput(f"a binding names the undeclared exchange {name!r}; declare it beside")
            if binding.queue and binding.queue not in queues:
                raise InvalidInput(f"binding to {binding.exchange!r} names the undeclared queue {binding.queue!r}")

    def __add__(self, other: Topology) -> Topology:
        return Topology(
            exchanges=(*self.exchanges, *other.exchanges),
            queues=(*self.queues, *other.queues),
            bindings=(*self.bindings, *other.bindings),
        )

    def refuse_unless(self, transport: str, offered: frozenset[str]) -> None:
        """Raise `TopologyMismatch` that names each declaration that needs what `transport` does not offer."""
        asked: list[tuple[str, Iterator[str]]] = [
            *((f"exchange {each.name!r}", each.features()) for each in self.exchanges),
            *((f"queue {each.name!r}", each.features()) for each in self.queues),
            *((f"a binding of {each.exchange!r}", each.features()) for each in self.bindings),
        ]
        missing = [f"{what} ({feature})" for what, features in asked for feature in features if feature not in offered]
        if missing:
            raise TopologyMismatch(
                f"the {transport} transport does not offer what these ask for: {', '.join(missing)}; "
                "leave it out, or use a broker that has it"
            )


def differences(known: Exchange | Queue, wanted: Exchange | Queue) -> list[tuple[str, Any, Any]]:
    """The arguments in which two declarations of one name differ: (argument, of `known`, of `wanted`)."""
    pairs = ((name, getattr(known, name), getattr(wanted, name)) for name in known.__struct_fields__)
    return [(name, ours, theirs) for name, ours, theirs in pairs if ours != theirs]


def _refuse_other(what: str, first: Exchange | Queue, second: Exchange | Queue) -> None:
    for name, ours, theirs in differences(first, second):
        raise InvalidInput(f"{what} {first.name!r} is declared twice, with {name}={ours!r} and with {name}={theirs!r}")


def _asked(**features: bool) -> Iterator[str]:
    return (name for name, asked in features.items() if asked)


def _check_name(what: str, name: str) -> None:
    if not name:
        raise InvalidInput(f"the {what} needs a name")
    if len(name.encode()) > NAME_BYTES_MAX:
        raise InvalidInput(f"{what} name {name[:40]!r}… is longer than {NAME_BYTES_MAX} bytes")
    if name.startswith("amq."):
        raise InvalidInput(f"{what} name {name!r}: names that begin with amq. belong to the broker")


def _check_key(routing_key: str) -> None:
    if len(routing_key.encode()) > NAME_BYTES_MAX:
        raise InvalidInput(f"routing key {routing_key[:40]!r}… is longer than {NAME_BYTES_MAX} bytes")
