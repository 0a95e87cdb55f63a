"""Handlers: functions whose parameters decide how they are called, made into calls of one form for the listener.

Three kinds. *plain* gets one message and no transaction. *effect* asks for `Tx` and runs in the transaction of inbox
row and ack. *batch* takes several messages without a transaction and answers for each of them. Everything is read and
checked by `bind`; a call looks nothing up.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from operator import attrgetter
from typing import Any, Literal

import msgspec

from holdfast.clock import Clock
from holdfast.errors import InvalidInput
from holdfast.messaging.injection import Asked, Handler, Want, check_provide, name_of, read_handler, shown

AckMode = Literal["auto", "manual", "none"]
Kind = Literal["plain", "effect", "batch"]

Get = Callable[[Any, Any, Sequence[Any]], Any]
"""Takes an argument out of (the transaction, the message or the batch, what was opened for this call)."""


class Bound(msgspec.Struct, frozen=True, kw_only=True):
    """A handler with all it asks for.

    `call` is, by kind: plain `(Incoming) -> None`; effect `(tx, Sequence[Incoming]) -> None`, which raises when it
    failed; batch `(Sequence[Incoming]) -> list[Exception | None]`, one outcome for each, which raises nothing but a
    cancellation. All are awaited.
    """

    handler: str  # its name, for logs
    kind: Kind
    call: Callable[..., Awaitable[Any]]


def bind(
    name: str, handlers: Sequence[Handler], provide: Mapping[Any, Any], clock: Clock, *, ack: AckMode = "auto"
) -> dict[type, Bound]:
    """The handlers of listener `name` by the class of body; one that takes several classes stands there several times.

    Raises `InvalidInput` for whatever is wrong with a handler, its parameters or `provide`.
    """
    if callable(handlers):
        raise InvalidInput(f"listener {name!r}: handlers is a list; write handlers=[{name_of(handlers)}]")
    check_provide(name, provide)
    bounds: dict[type, Bound] = {}
    for handler in handlers:
        asked = read_handler(name, handler, provide, clock)
        if asked.effect and ack != "auto":
            tx = next(want.name for want in asked.wants if want.source == "tx")
            raise InvalidInput(
                f"{asked.place}: parameter {tx!r}: what runs in a transaction is acked within it, which ack={ack!r} "
                "forbids; use ack='auto', or do without Tx"
            )
        bound = _bound(handler, asked)
        for each in asked.types:
            if each in bounds:
                raise InvalidInput(
                    f"listener {name!r} has two handlers for {shown(each)}: {bounds[each].handler} and "
                    f"{asked.handler}; give one of them to a listener of its own, with a queue of its own"
                )
            bounds[each] = bound
    return bounds


def _bound(handler: Handler, asked: Asked) -> Bound:
    ready, wants = _with_fixed(handler, asked.wants)
    if asked.effect:
        call = _call(ready, wants, asked.many)
        effect = _whole_effect(asked, call) if asked.many else _each_effect(call)
        return Bound(handler=asked.handler, kind="effect", call=effect)
    if asked.many:
        return Bound(handler=asked.handler, kind="batch", call=_batch(asked, _call(ready, wants, many=True)))
    return Bound(handler=asked.handler, kind="plain", call=_plain(ready, wants))


# -- the three kinds ---------------------------------------------------------------------------------------------------

PATHS = {"body": "body", "delivery": "delivery", "message": "delivery.message"}


def _plain(handler: Handler, wants: Sequence[Want]) -> Handler:
    match _by_position(wants):
        case ["incoming"]:
            return handler
        case ["body"]:
            return lambda incoming: handler(incoming.body)
        case [*sources] if sources and all(each in PATHS for each in sources):
            get = attrgetter(*(PATHS[each] for each in sources))  # of several names: a tuple of all, in one call
            return lambda incoming: handler(*get(incoming))
    return partial(_call(handler, wants, many=False), None)


def _each_effect(call: Handler) -> Handler:
    async def effect(tx: Any, batch: Sequence[Any]) -> None:
        for incoming in batch:
            await call(tx, incoming)

    return effect


def _whole_effect(asked: Asked, call: Handler) -> Handler:
    async def effect(tx: Any, batch: Sequence[Any]) -> None:
        if await call(tx, batch) is not None:
            # Outcomes that nobody looks at would be failures that are acked.
            raise InvalidInput(
                f"{asked.place}: what runs in a transaction answers nothing; raise, and the batch is split"
            )

    return effect


def _batch(asked: Asked, call: Handler) -> Handler:
    async def batch(batch: Sequence[Any]) -> list[Exception | None]:
        try:
            outcomes = await call(None, batch)
        except Exception as error:
            return [error] * len(batch)
        if outcomes is None:
            return [None] * len(batch)
        if (fault := _fault(outcomes, len(batch))) is not None:
            return [InvalidInput(f"{asked.place}: {fault}")] * len(batch)
        return list(outcomes)

    return batch


def _fault(outcomes: Any, count: int) -> str | None:
    """What is wrong with the answer of a batch handler; it may hold anything, so only classes are told."""
    wanted = "return one outcome for each message, None or the exception it failed with, or None when all worked"
    if not isinstance(outcomes, (list, tuple)):
        return f"it answered {type(outcomes).__name__}; {wanted}"
    if len(outcomes) != count:
        return f"it answered {len(outcomes)} outcomes for {count} messages; {wanted}"
    for index, each in enumerate(outcomes):
        if each is not None and not isinstance(each, Exception):
            return f"outcome {index} is of class {type(each).__name__}; {wanted}"
    return None


# -- arguments ---------------------------------------------------------------------------------------------------------


def _with_fixed(handler: Handler, wants: Sequence[Want]) -> tuple[Handler, list[Want]]:
    """The handler with what is the same for every call, and what remains to be given."""
    fixed = {want.name: want.value for want in wants if want.source == "fixed" and want.by_name}
    return (partial(handler, **fixed) if fixed else handler), [want for want in wants if want.name not in fixed]


def _by_position(wants: Sequence[Want]) -> list[str]:
    """Where everything is given by position: what, in order; otherwise nothing."""
    return [] if any(want.by_name for want in wants) else [want.source for want in wants]


def _call(handler: Handler, wants: Sequence[Want], many: bool) -> Handler:
    """The handler as `(tx, given)`, given being one message or a batch."""
    match _by_position(wants):
        case ["tx", "body"]:
            if many:
                return lambda tx, given: handler(tx, [each.body for each in given])
            return lambda tx, given: handler(tx, given.body)
        case ["body"] if many:
            return lambda tx, given: handler([each.body for each in given])
    opens = {
        id(want.value): want.value.factory for want in wants if want.source == "opened"
    }  # once for each of provide
    positional = [_get(want, many, list(opens)) for want in wants if not want.by_name]
    named = [(want.name, _get(want, many, list(opens))) for want in wants if want.by_name]

    def call(tx: Any, given: Any, opened: Sequence[Any] = ()) -> Awaitable[Any]:
        arguments = [get(tx, given, opened) for get in positional]
        return handler(*arguments, **{name: get(tx, given, opened) for name, get in named})

    return _opening(call, list(opens.values())) if opens else call


def _opening(call: Handler, factories: Sequence[Any]) -> Handler:
    async def opened(tx: Any, given: Any) -> Any:
        outcome = None  # stays so when what was opened takes the handler's error on itself
        async with AsyncExitStack() as stack:
            outcome = await call(tx, given, [await stack.enter_async_context(factory()) for factory in factories])
        return outcome  # noqa: RET504

    return opened


ONE: Mapping[str, Get] = {
    "tx": lambda tx, given, opened: tx,
    "incoming": lambda tx, given, opened: given,
    "body": lambda tx, given, opened: given.body,
    "delivery": lambda tx, given, opened: given.delivery,
    "message": lambda tx, given, opened: given.delivery.message,
}
MANY: Mapping[str, Get] = {
    "tx": lambda tx, given, opened: tx,
    "incoming": lambda tx, given, opened: given,
    "body": lambda tx, given, opened: [each.body for each in given],
    "delivery": lambda tx, given, opened: [each.delivery for each in given],
    "message": lambda tx, given, opened: [each.delivery.message for each in given],
}


def _get(want: Want, many: bool, opens: Sequence[int]) -> Get:
    if want.source == "fixed":
        return lambda tx, given, opened: want.value
    if want.source == "opened":
        index = opens.index(id(want.value))
        return lambda tx, given, opened: opened[index]
    return (MANY if many else ONE)[want.source]
