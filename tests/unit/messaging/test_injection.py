"""Injection: every handler that is wrong is refused when its listener is built, by name and with what to do."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any, NewType, Protocol

import msgspec
import pytest

from holdfast.clock import Clock
from holdfast.db.database import Tx
from holdfast.errors import InvalidInput
from holdfast.messaging.handlers import AckMode, bind
from holdfast.messaging.injection import Incoming, PerMessage
from holdfast.messaging.message import Delivery, Message
from tests.unit.messaging.orders import CLOCK, LISTENER, Closed, Mailer, Placed, bound, refused

if TYPE_CHECKING:
    from decimal import Decimal

FREE = Placed(0)
Money = NewType("Money", int)


class Desk:
    """A handler as a method."""

    async def handle(self, placed: Placed) -> None: ...


def no_coroutine(placed: Placed) -> None: ...
async def generator(placed: Placed) -> AsyncIterator[int]:
    yield 1


async def nothing() -> None: ...
async def only_clock(clock: Clock) -> None: ...
async def default_only(placed: Placed = FREE) -> None: ...
async def two(placed: Placed, closed: Closed) -> None: ...
async def unannotated(placed) -> None: ...  # type: ignore[no-untyped-def]
async def unprovided(placed: Placed, mailer: Mailer) -> None: ...
async def no_body(mailer: Mailer) -> None: ...
async def star(placed: Placed, *more: Placed) -> None: ...
async def stars(placed: Placed, **more: Placed) -> None: ...
async def bare(whole: Incoming) -> None: ...
async def bare_batch(placed: Sequence) -> None: ...  # type: ignore[type-arg]
async def bare_wholes(whole: Sequence[Incoming]) -> None: ...
async def whole_batch(whole: Incoming[Sequence[Placed]]) -> None: ...
async def anything(body: Any) -> None: ...
async def an_object(body: object) -> None: ...
async def list_of_any(body: list[Any]) -> None: ...
async def new_type(money: Money) -> None: ...
async def two_batches(placed: Sequence[Placed] | Sequence[Closed]) -> None: ...
async def a_tuple(placed: tuple[Placed, ...]) -> None: ...
async def one_delivery(placed: Sequence[Placed], delivery: Delivery) -> None: ...
async def deliveries(placed: Placed, deliveries: Sequence[Delivery]) -> None: ...
async def messages(tx: Tx, placed: Placed, messages: list[Message]) -> None: ...
async def whole_effect(tx: Tx, whole: Incoming[Placed]) -> None: ...
async def hidden(price: Decimal) -> None: ...
async def broken(placed: Placed | "Closed") -> None: ...  # noqa: UP037


REFUSALS: list[tuple[Any, str]] = [
    (no_coroutine, "no coroutine function; write it with `async def`"),
    (generator, "no coroutine function; write it with `async def` and without `yield`"),
    (Desk, "is a class; give an instance"),
    (5, "handler int is no coroutine function"),
    (Desk.handle, r"parameter 'self' has no annotation; .*\(a method is given bound to its object"),
    (nothing, "has no parameter for the body; add one"),
    (only_clock, "has no parameter for the body; add one"),
    (default_only, "has no parameter for the body; add one without a default"),
    (two, "parameters 'placed' and 'closed' could both be the body.* add Closed to"),
    (unannotated, "parameter 'placed' has no annotation; annotate it"),
    (unprovided, "parameter 'mailer': nobody provides Mailer; add it to the listener's `provide`"),
    (no_body, "no parameter is the body; 'mailer' is none, and nobody provides it: Mailer cannot be a body"),
    (star, "parameter 'more' takes whatever comes"),
    (stars, "parameter 'more' takes whatever comes"),
    (bare, r"'whole' is none.*: write Incoming\[X\] with the class X"),
    (bare_batch, r"'placed' is none.*: write Sequence\[X\] with the class X"),
    (bare_wholes, r"'whole' is none.*: write Incoming\[X\] with the class X"),
    (whole_batch, r"'whole' is none.*: write Sequence\[X\] with the class X"),
    (anything, "'body' is none.*: Any is not the class of a body$"),
    (an_object, "'body' is none.*: object cannot be a body; use a msgspec struct"),
    (list_of_any, "'body' is none.*: Any is not the class of a body; one body that is a list is written `list`"),
    (new_type, "'money' is none.*Money is not the class of a body"),
    (two_batches, "'placed' is none.*Placed.* is not the class of a body"),
    (a_tuple, r"'placed' is none.*tuple\[.*\] is not the class of a body"),
    (one_delivery, r"parameter 'delivery': its body is a batch, so write Sequence\[Delivery\]"),
    (deliveries, "parameter 'deliveries': its body is no batch, so write Delivery$"),
    (messages, "parameter 'messages': its body is no batch, so write Message$"),
    (whole_effect, "parameter 'tx': what runs in a transaction is settled by it, so take the body itself"),
    (hidden, "parameter 'price' is annotated 'Decimal', and 'Decimal' is no name of the module .*TYPE_CHECKING"),
    (broken, "parameter 'placed' is annotated .*, which cannot be read: unsupported operand"),
]


@pytest.mark.parametrize(("handler", "told"), REFUSALS, ids=lambda each: getattr(each, "__name__", None))
def test_a_wrong_handler_is_refused_by_name_with_what_to_do(handler: Any, told: str) -> None:
    with pytest.raises(
        InvalidInput, match=rf"^listener 'welcome', handler {getattr(handler, '__qualname__', 'int')}\b"
    ):
        bound(handler)
    with pytest.raises(InvalidInput, match=told):
        bound(handler)


def test_a_class_inside_a_function_is_refused_with_the_reason() -> None:
    class Local(msgspec.Struct):
        number: int

    async def local(body: Local) -> None: ...

    assert "'Local' is no name of the module" in (told := refused(local))
    assert "define the class at the top of a module, not inside a function" in told


def test_two_handlers_of_one_class_are_refused() -> None:
    async def first(placed: Placed) -> None: ...
    async def second(event: Closed | Placed) -> None: ...

    with pytest.raises(InvalidInput, match=r"two handlers for Placed: .*first and .*second; give one of them to"):
        bind(LISTENER, [first, second], {}, CLOCK)


@pytest.mark.parametrize("ack", ["manual", "none"])
def test_a_transaction_wants_ack_auto(ack: AckMode) -> None:
    async def book(placed: Placed, tx: Tx) -> None: ...

    assert f"parameter 'tx': what runs in a transaction is acked within it, which ack='{ack}' forbids" in refused(
        book, ack=ack
    )
    assert bound(book, ack="auto").kind == "effect"


@pytest.mark.parametrize("key", [Message, Delivery, Tx, Clock, Incoming])
def test_what_the_listener_gives_cannot_be_provided(key: type) -> None:
    with pytest.raises(InvalidInput, match=f"listener 'welcome': provide: {key.__name__} comes from the listener"):
        bind(LISTENER, [], {key: object()}, CLOCK)


class Send(Protocol):
    """A dependency that is called."""

    async def __call__(self, address: str) -> None: ...


class Post(Protocol):
    """A dependency with a method."""

    async def send(self, address: str) -> None: ...


async def send(address: str) -> None: ...


def test_a_class_or_function_in_place_of_an_instance_is_refused() -> None:
    async def posting(placed: Placed, post: Post) -> None: ...

    async def sending(placed: Placed, send: Send) -> None: ...

    assert "provide: Mailer is given the class Mailer; give an instance, or PerMessage(Mailer)" in refused(
        unprovided, {Mailer: Mailer}
    )
    assert "provide: Post is given the class Mailer" in refused(posting, {Post: Mailer})
    assert "provide: Post is given the function send; give an instance, or PerMessage(send)" in refused(
        posting, {Post: send}
    )
    assert bound(sending, {Send: send}).kind == "plain"  # what is called may be a function


def test_one_handler_without_its_list_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"listener 'welcome': handlers is a list; write handlers=\[default_only\]"):
        bind(LISTENER, default_only, {}, CLOCK)  # type: ignore[arg-type]


def test_a_body_class_that_is_provided_is_no_body() -> None:
    async def welcome(placed: Placed, terms: Closed) -> None: ...

    assert bound(welcome, {Closed: Closed(1)}).kind == "plain"
    assert "has no parameter for the body" in refused(welcome, {Closed: Closed(1), Placed: Placed(1)})


def test_what_cannot_be_opened_is_refused() -> None:
    async def coroutine() -> None: ...

    async def generator() -> AsyncIterator[int]:
        yield 1

    with pytest.raises(InvalidInput, match="not Desk; write PerMessage"):
        PerMessage(Desk())  # type: ignore[arg-type]
    for factory in (coroutine, generator):
        with pytest.raises(InvalidInput, match=f"{factory.__name__} gives no context manager; decorate it"):
            PerMessage(factory)  # type: ignore[arg-type]
