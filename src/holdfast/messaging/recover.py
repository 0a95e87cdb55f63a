"""Recoverers: what becomes of a message when every attempt failed, or when no attempt can help."""

from __future__ import annotations

import traceback
from typing import Protocol

import msgspec

from holdfast import observe
from holdfast.errors import InvalidInput
from holdfast.messaging.message import Delivery, Outgoing, Settlement, ack, handed_on, park, reject, retry
from holdfast.messaging.retry import RetryPolicy
from holdfast.messaging.topology import Binding, Exchange, Queue, Topology
from holdfast.messaging.transport import Transport

ERROR_EXCHANGE = "error.direct"
MESSAGE_CHARS_MAX = 500
TRACE_CHARS_MAX = 8_000
AGAIN_MS = 5_000

log = observe.logger("recover")


class Recoverer(Protocol):
    """Decides about a delivery that is given up on; what it sends must be confirmed before it answers `ack`."""

    async def recover(self, transport: Transport, delivery: Delivery, error: BaseException) -> Settlement:
        """The settlement of a delivery whose handler ended with `error`."""
        ...


class Park(msgspec.Struct, frozen=True):
    """Keep it in the error store, where a human finds it; the default."""

    async def recover(self, transport: Transport, delivery: Delivery, error: BaseException) -> Settlement:
        return park(delivery, describe(error))


class DeadLetter(msgspec.Struct, frozen=True):
    """Reject it: it goes to its queue's dead-letter exchange, and to the error store where there is none."""

    async def recover(self, transport: Transport, delivery: Delivery, error: BaseException) -> Settlement:
        return reject(delivery, describe(error))


class Discard(msgspec.Struct, frozen=True):
    """Drop it, with a line in the log: for messages that are worth nothing once they failed."""

    async def recover(self, transport: Transport, delivery: Delivery, error: BaseException) -> Settlement:
        log.warning(
            "message_discarded",
            queue=delivery.queue,
            message_id=delivery.message.message_id,
            type=delivery.message.type[:80],
            error=type(error).__name__,
        )
        return ack(delivery)


class Requeue(msgspec.Struct, frozen=True, kw_only=True):
    """Put it back for ever, each wait twice the last, up to `interval_ms_max`: it neither blocks others nor spins."""

    interval_ms: int = 5_000
    interval_ms_max: int = 300_000

    async def recover(self, transport: Transport, delivery: Delivery, error: BaseException) -> Settlement:
        waits = RetryPolicy(
            tries=1 << 31, interval_ms=self.interval_ms, multiplier=2.0, interval_ms_max=self.interval_ms_max
        )
        return retry(delivery, waits.wait_ms(delivery.attempt), reason=describe(error))


class Republish(msgspec.Struct, frozen=True, kw_only=True):
    """Send it to the error exchange with what went wrong in its headers, and ack it once that is confirmed.

    The routing key is the service's name; `error_topology` declares exchange and queue. The headers are Spring's, so
    that Java tools of the same mall can read them. While the error exchange takes nothing the message stays in its
    queue and is tried again.
    """

    service: str
    exchange: str = ERROR_EXCHANGE
    stack_trace: bool = True

    async def recover(self, transport: Transport, delivery: Delivery, error: BaseException) -> Settlement:
        message = delivery.message
        told = {
            "x-exception-message": f"{type(error).__name__}: {error}"[:MESSAGE_CHARS_MAX],
            "x-original-exchange": message.exchange,
            "x-original-routingKey": message.routing_key,
            "x-original-queue": delivery.queue,
        }
        if self.stack_trace:
            told["x-exception-stacktrace"] = _trace(error)[-TRACE_CHARS_MAX:]
        headers = {**handed_on(message.headers)} | {name: _plain(value) for name, value in told.items()}
        copy = msgspec.structs.replace(message, exchange=self.exchange, routing_key=self.service, headers=headers)
        (problem,) = await transport.publish([Outgoing(message=copy)])
        if problem is None:
            return ack(delivery)
        log.error("not_republished", queue=delivery.queue, message_id=message.message_id, error=problem.detail)
        return retry(delivery, AGAIN_MS, counts=False, reason=f"the error exchange did not take it: {problem.detail}")


def error_topology(service: str, exchange: str = ERROR_EXCHANGE) -> Topology:
    """What `Republish` needs for a service: the direct exchange, the queue `{service}.error.queue`, the binding."""
    if not service:
        raise InvalidInput("the error queue is named by its service; give the service's name")
    queue = Queue(name=f"{service}.error.queue")
    return Topology(
        exchanges=[Exchange(name=exchange, kind="direct")],
        queues=[queue],
        bindings=[Binding(exchange=exchange, queue=queue.name, routing_key=service)],
    )


def describe(error: BaseException) -> str:
    """The error and its last frames, for the human who finds the message."""
    return f"{type(error).__name__}: {error}"[:MESSAGE_CHARS_MAX] + "\n" + _trace(error)[-3_000:]


def _trace(error: BaseException) -> str:
    """The last frames, without the marks below each line: to place them Python parses the line again, every time."""
    whole = traceback.TracebackException.from_exception(error, limit=-5)
    told: list[traceback.TracebackException | None] = [whole]
    for each in told:
        if each is not None:
            for frame in each.stack:
                frame.colno = None
            told += [each.__cause__, each.__context__, *(each.exceptions or ())]
    return "".join(whole.format())


def _plain(text: str) -> str:
    """Text that any transport stores: an error may say anything, NUL and half a surrogate pair included."""
    return text.replace("\x00", "").encode("utf-8", "replace").decode()
