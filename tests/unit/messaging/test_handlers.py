"""Handlers: what each parameter gets, what is opened and left, and one outcome for each message of a batch."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any

import pytest
from sqlalchemy import Column, MetaData, String, Table, insert, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from typing_extensions import TypeAliasType

from holdfast.clock import Clock
from holdfast.db.database import Tx
from holdfast.errors import InvalidInput
from holdfast.messaging.handlers import bind
from holdfast.messaging.injection import Incoming, PerMessage
from holdfast.messaging.message import Delivery, Message, ack
from holdfast.messaging.retry import Reject, Retry, is_fatal
from tests.unit.messaging.orders import CLOCK, LISTENER, TX, Closed, Mailer, Paid, Placed, bound, incoming

Either = TypeAliasType("Either", Placed | Closed)


class Session:
    """A dependency that is opened anew for each call; how it ended is noted."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    async def __aenter__(self) -> Session:
        self.log.append("opened")
        return self

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.log.append(f"left with {error!r}")


# -- plain ------------------------------------------------------------------------------------------------------------


async def test_a_handler_of_the_body_alone_gets_it_in_one_call() -> None:
    got = []

    async def welcome(placed: Placed) -> None:
        got.append(placed)

    bounds = bind(LISTENER, [welcome], {}, CLOCK)
    assert list(bounds) == [Placed]
    assert bounds[Placed].kind == "plain"
    await bounds[Placed].call(incoming(Placed(1)))
    assert got == [Placed(1)]
    assert bounds[Placed].handler.endswith("welcome")


async def test_each_parameter_gets_what_its_annotation_asks_for() -> None:
    got: list[Any] = []
    mailer = Mailer()

    async def welcome(placed: Placed, delivery: Delivery, message: Message, clock: Clock, mailer: Mailer) -> None:
        got.extend((placed, delivery, message, clock, mailer))

    given = incoming(Placed(1))
    await bound(welcome, {Mailer: mailer}).call(given)
    assert got == [Placed(1), given.delivery, given.delivery.message, CLOCK, mailer]


async def test_any_order_of_parameters_will_do() -> None:
    got: list[Any] = []
    mailer = Mailer()

    async def mixed(
        clock: Clock, delivery: Delivery, mailer: Mailer, placed: Placed, tries: int = 3, *, message: Message
    ) -> None:
        got.extend((clock, delivery, mailer, placed, tries, message))

    async def by_position(clock: Clock, placed: Placed, tries: int = 4, mailer: Mailer | None = None, /) -> None:
        got.extend((clock, placed, tries, mailer))

    given = incoming(Placed(1))
    await bound(mixed, {Mailer: mailer}).call(given)
    assert got == [CLOCK, given.delivery, mailer, Placed(1), 3, given.delivery.message]
    got.clear()
    await bound(by_position, {Mailer: mailer}).call(given)
    assert got == [CLOCK, Placed(1), 4, mailer]


async def test_a_default_stays_where_nothing_is_injected_and_gives_way_where_something_is() -> None:
    got: list[Any] = []
    mailer = Mailer()

    async def welcome(
        placed: Placed, tries: int = 3, closed: Closed | None = None, mailer: Mailer | None = None
    ) -> None:
        got.extend((placed, tries, closed, mailer))

    async def untyped(placed: Placed, note="x") -> None:  # type: ignore[no-untyped-def]
        got.extend((placed, note))

    await bound(welcome).call(incoming(Placed(1)))
    await bound(welcome, {Mailer: mailer}).call(incoming(Placed(2)))
    await bound(untyped).call(incoming(Placed(3)))
    assert got == [Placed(1), 3, None, None, Placed(2), 3, None, mailer, Placed(3), "x"]


class Desk:
    """A handler as a method, and as an object."""

    def __init__(self) -> None:
        self.got: list[Any] = []

    async def handle(self, placed: Placed, mailer: Mailer) -> None:
        self.got.append((placed, mailer))

    async def __call__(self, closed: Closed) -> None:
        self.got.append(closed)


def logged(handler: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(handler)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        return await handler(*args, **kwargs)

    return wrapper


async def test_methods_objects_partials_and_decorated_functions_are_handlers() -> None:
    desk, mailer, other = Desk(), Mailer(), Mailer()
    got: list[Any] = []

    async def prefixed(prefix: str, placed: Placed, mailer: Mailer, clock: Clock) -> None:
        got.append((prefix, placed, mailer, clock))

    provide = {Mailer: mailer}
    await bound(desk.handle, provide).call(incoming(Placed(1)))
    await bound(logged(desk.handle), provide).call(incoming(Placed(2)))
    await bound(desk).call(incoming(Closed(3)))
    assert desk.got == [(Placed(1), mailer), (Placed(2), mailer), Closed(3)]
    await bound(functools.partial(functools.partial(prefixed, "a"), mailer=other), provide).call(incoming(Placed(4)))
    assert got == [("a", Placed(4), other, CLOCK)]  # what the partial gives is not injected over
    assert bound(desk).handler == "Desk"


async def test_one_handler_takes_several_classes_of_bodies() -> None:
    got = []

    async def either(event: Placed | Closed | None) -> None:
        got.append(event)

    async def aliased(event: Either) -> None:
        got.append(event)

    bounds = bind(LISTENER, [either], {}, CLOCK)
    assert list(bounds) == [Placed, Closed, type(None)]
    assert bounds[Placed] is bounds[Closed]
    for body in (Placed(1), Closed(2), None):
        await bounds[type(body)].call(incoming(body))
    assert got == [Placed(1), Closed(2), None]
    assert list(bind(LISTENER, [aliased], {}, CLOCK)) == [Placed, Closed]


async def test_what_a_body_can_be() -> None:
    async def model(paid: Paid) -> None: ...
    async def fields(values: dict[str, Any]) -> None: ...
    async def number(value: int) -> None: ...
    async def values(values: list) -> None: ...  # type: ignore[type-arg]
    async def many_lists(values: Sequence[list[int]]) -> None: ...
    async def marked(placed: Annotated[Placed, "a mark"]) -> None: ...

    kinds = [
        (*((each, found.kind) for each, found in bind(LISTENER, [handler], {}, CLOCK).items()),)
        for handler in (model, fields, number, values, many_lists, marked)
    ]
    assert kinds == [
        ((Paid, "plain"),),
        ((dict, "plain"),),
        ((int, "plain"),),
        ((list, "plain"),),
        ((list, "batch"),),
        ((Placed, "plain"),),
    ]


async def test_annotations_that_are_no_strings_are_read_too() -> None:
    got = []

    async def welcome(placed, clock) -> None:  # type: ignore[no-untyped-def]
        got.append((placed, clock))

    welcome.__annotations__ = {"placed": Placed, "clock": Clock, "return": "Nowhere"}
    await bound(welcome).call(incoming(Placed(1)))
    assert got == [(Placed(1), CLOCK)]


async def test_a_whole_message_can_be_settled_by_its_handler() -> None:
    async def full(whole: Incoming[Placed | Closed]) -> None:
        await whole.settle(ack(whole.delivery))

    bounds = bind(LISTENER, [full], {}, CLOCK, ack="manual")
    assert list(bounds) == [Placed, Closed]
    assert bounds[Placed].call is full
    given = incoming(Placed(1))
    await bounds[Placed].call(given)
    assert given.delivery.settled


# -- effects ----------------------------------------------------------------------------------------------------------


async def test_an_effect_gets_the_messages_of_its_batch_one_at_a_time() -> None:
    got: list[Any] = []

    async def book(tx: Tx, placed: Placed) -> None:
        got.append((tx, placed))

    async def noted(placed: Placed, message: Message, mailer: Mailer, tx: Tx) -> None:
        got.append((tx, placed, message.message_id, mailer))

    batch = [incoming(Placed(1)), incoming(Placed(2))]
    assert bound(book).kind == "effect"
    await bound(book).call(TX, batch)
    assert got == [(TX, Placed(1)), (TX, Placed(2))]
    got.clear()
    mailer = Mailer()
    await bound(noted, {Mailer: mailer}).call(TX, batch)
    assert got == [(TX, each.body, each.delivery.message.message_id, mailer) for each in batch]


async def test_an_effect_gets_its_whole_batch() -> None:
    got: list[Any] = []

    async def book_all(tx: Tx, placed: Sequence[Placed]) -> None:
        got.append((tx, placed))

    async def noted(deliveries: Sequence[Delivery], placed: list[Placed], messages: list[Message], *, tx: Tx) -> None:
        got.append((tx, deliveries, placed, messages))

    batch = [incoming(Placed(1)), incoming(Placed(2))]
    assert bound(book_all).kind == "effect"
    await bound(book_all).call(TX, batch)
    await bound(noted).call(TX, batch)
    bodies, deliveries = [each.body for each in batch], [each.delivery for each in batch]
    assert got == [(TX, bodies), (TX, deliveries, bodies, [each.message for each in deliveries])]


async def test_an_effect_that_answers_outcomes_fails_since_nobody_would_look_at_them() -> None:
    async def book_all(tx: Tx, placed: Sequence[Placed]) -> list[Exception | None]:
        return [None for _ in placed]

    with pytest.raises(InvalidInput, match="answers nothing; raise, and the batch is split"):
        await bound(book_all).call(TX, [incoming(Placed(1))])


# -- batches ----------------------------------------------------------------------------------------------------------


class Index:
    """A batch handler that answers as told."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.got: list[Any] = []

    async def index_all(self, placed: Sequence[Placed]) -> Any:
        self.got.append(list(placed))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


async def answered(answer: Any) -> Any:
    index = Index(answer)
    batch = [incoming(Placed(each)) for each in (1, 2, 3)]
    found = bound(index.index_all)
    assert found.kind == "batch"
    outcomes = await found.call(batch)
    assert index.got == [[Placed(1), Placed(2), Placed(3)]]
    return outcomes


async def test_a_batch_answers_for_each_of_its_messages() -> None:
    later, never = Retry(1_000), Reject("closed")
    assert await answered(None) == [None, None, None]
    assert await answered([None, later, never]) == [None, later, never]
    assert await answered((None, None, never)) == [None, None, never]


async def test_a_batch_that_raises_failed_for_all() -> None:
    error = RuntimeError("the index is away")
    assert await answered(error) == [error, error, error]


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ([None, None], "answered 2 outcomes for 3 messages"),
        ([], "answered 0 outcomes for 3 messages"),
        (True, "answered bool"),
        ("abc", "answered str"),
        ({Placed(1): None}, "answered dict"),
        ([None, "secret", None], "outcome 1 is of class str"),
        ([None, None, Reject], "outcome 2 is of class type"),
        ([KeyboardInterrupt(), None, None], "outcome 0 is of class KeyboardInterrupt"),
    ],
)
async def test_a_wrong_answer_fails_all_for_good_and_is_told_by_its_class_only(answer: Any, told: str) -> None:
    outcomes = await answered(answer)
    assert len(outcomes) == 3
    for each in outcomes:
        assert is_fatal(each)
        assert told in each.detail
        assert "handler Index.index_all" in each.detail
        assert "secret" not in each.detail


async def test_a_batch_gets_deliveries_messages_and_whole_messages_in_the_order_of_the_bodies() -> None:
    got: list[Any] = []

    async def index_all(
        clock: Clock, placed: Sequence[Placed | Closed], deliveries: Sequence[Delivery], messages: Sequence[Message]
    ) -> None:
        got.extend((clock, placed, deliveries, messages))

    async def whole(whole: Sequence[Incoming[Paid]]) -> None:
        got.append(whole)

    batch = [incoming(Placed(1)), incoming(Closed(2))]
    bounds = bind(LISTENER, [index_all, whole], {}, CLOCK)
    assert bounds[Placed] is bounds[Closed]
    assert await bounds[Placed].call(batch) == [None, None]
    deliveries = [each.delivery for each in batch]
    assert got == [CLOCK, [Placed(1), Closed(2)], deliveries, [each.message for each in deliveries]]
    got.clear()
    assert await bounds[Paid].call(batch) == [None, None]
    assert got == [batch]


# -- what is opened for each call -------------------------------------------------------------------------------------


async def test_what_is_opened_for_a_call_is_left_after_it_with_its_error() -> None:
    log: list[str] = []

    async def store(placed: Placed, session: Session, again: Session) -> None:
        assert session is again  # one of each class in a call
        session.log.append(f"stores {placed.number}")
        if placed.number == 2:
            raise LookupError("two")

    call = bound(store, {Session: PerMessage(lambda: Session(log))}).call
    await call(incoming(Placed(1)))
    with pytest.raises(LookupError):
        await call(incoming(Placed(2)))
    assert log == ["opened", "stores 1", "left with None", "opened", "stores 2", "left with LookupError('two')"]


async def test_effects_open_for_each_message_and_batches_once() -> None:
    log: list[str] = []

    async def book(tx: Tx, placed: Placed, session: Session) -> None:
        session.log.append(f"books {placed.number}")

    async def index_all(placed: Sequence[Placed], session: Session) -> None:
        session.log.append(f"indexes {len(placed)}")
        raise LookupError("all")

    provide = {Session: PerMessage(lambda: Session(log))}
    batch = [incoming(Placed(1)), incoming(Placed(2))]
    await bound(book, provide).call(TX, batch)
    assert log == ["opened", "books 1", "left with None", "opened", "books 2", "left with None"]
    log.clear()
    outcomes = await bound(index_all, provide).call(batch)
    assert log == ["opened", "indexes 2", "left with LookupError('all')"]
    assert [repr(each) for each in outcomes] == ["LookupError('all')"] * 2


async def test_several_are_left_in_reverse_and_an_error_on_leaving_is_the_handlers() -> None:
    log: list[str] = []

    @asynccontextmanager
    async def mailer() -> AsyncIterator[Mailer]:
        log.append("mailer")
        yield Mailer()
        log.append("mailer left")
        raise ConnectionError("not sent")

    async def store(placed: Placed, *, session: Session, mailer: Mailer) -> None:
        log.append("stores")

    provide = {Mailer: PerMessage(mailer), Session: PerMessage(lambda: Session(log))}
    with pytest.raises(ConnectionError):
        await bound(store, provide).call(incoming(Placed(1)))
    assert log == ["opened", "mailer", "stores", "mailer left", "left with ConnectionError('not sent')"]


async def test_a_session_of_sqlalchemy_commits_for_a_handler_that_worked_only(tmp_path: Any) -> None:
    metadata = MetaData()
    orders = Table("orders", metadata, Column("number", String, primary_key=True))
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/shop.db")
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
    sessions = async_sessionmaker(engine)

    async def store(placed: Placed, session: AsyncSession) -> None:
        await session.execute(insert(orders).values(number=str(placed.number)))
        if placed.number == 2:
            raise LookupError

    call = bound(store, {AsyncSession: PerMessage(sessions.begin)}).call
    await call(incoming(Placed(1)))
    with pytest.raises(LookupError):
        await call(incoming(Placed(2)))
    async with sessions() as session:
        assert list((await session.execute(select(orders.c.number))).scalars()) == ["1"]
    await engine.dispose()
