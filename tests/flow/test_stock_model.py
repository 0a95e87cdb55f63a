"""Random sequences of stock's verbs, held against a small model: in any order of arrival the three books agree."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from holdfast.audit import audit
from holdfast.bootstrap import System
from holdfast.db.database import Tx
from holdfast.errors import HoldfastError, InvalidInput
from holdfast.services.contracts.refusals import KeyReused
from holdfast.services.contracts.values import Line, Shortage, Wanted
from holdfast.services.stock.actions import Stock
from holdfast.services.stock.model import DEDUCTED, HELD, HoldDiffers, HoldEnded, HoldMissing
from holdfast.settings import Settings
from tests.conftest import StartSystem, eventually
from tests.shop import clean, detail_states, order, pay, rows, stock_up, two_systems

SKUS = ("A", "B")
SHELVES = {"A": (2, 3), "B": (4, 1)}  # units in east and west


class Step(NamedTuple):
    """One call: its verb, its order, and what it is about."""

    verb: str
    order: int
    lines: tuple[tuple[str, int], ...] = ()
    key: str = ""


LINES = st.dictionaries(st.sampled_from(SKUS), st.integers(1, 4), min_size=1).map(lambda lines: tuple(lines.items()))
ORDERS = st.integers(0, 2)
STEPS = st.one_of(
    st.builds(Step, st.just("reserve"), ORDERS, LINES, st.just("")),
    st.builds(Step, st.sampled_from(["release", "deduct"]), ORDERS, st.just(()), st.just("")),
    st.builds(Step, st.sampled_from(["deduct_part", "release_part"]), ORDERS, LINES, st.sampled_from(["k1", "k2"])),
)


class Order:
    """What the model knows of an order."""

    def __init__(self) -> None:
        self.lines: dict[str, int] | None = None
        self.held: Counter[str] = Counter()
        self.sold: Counter[str] = Counter()
        self.closed = False  # it gave back what it never had
        self.parts: dict[str, tuple[str, dict[str, int]]] = {}


class Model:
    """Two SKUs and three orders, without warehouses, rows or messages."""

    def __init__(self) -> None:
        self.available = Counter({sku: sum(units) for sku, units in SHELVES.items()})
        self.orders = [Order() for _ in range(3)]

    def apply(self, step: Step) -> Any:
        """Do it; answers what the verb is to answer: a class of error, or for `reserve` None."""
        return getattr(self, f"_{step.verb.partition('_')[0]}")(self.orders[step.order], step)

    def _reserve(self, order: Order, step: Step) -> Any:
        lines = dict(step.lines)
        if order.closed or (order.lines is not None and not +order.held and not +order.sold):
            return HoldEnded
        if order.lines is not None:
            return None if order.lines == lines else HoldDiffers
        if any(self.available[sku] < quantity for sku, quantity in lines.items()):
            return Shortage
        self.available.subtract(lines)
        order.lines = lines
        order.held.update(lines)
        return None

    def _release(self, order: Order, step: Step) -> Any:
        if step.key:
            return self._part(order, step, self.available)
        order.closed = order.closed or order.lines is None
        self.available.update(order.held)
        order.held.clear()
        return None

    def _deduct(self, order: Order, step: Step) -> Any:
        if step.key:
            return self._part(order, step, order.sold)
        if not +order.held and not +order.sold:
            return HoldMissing
        order.sold.update(order.held)
        order.held.clear()
        return None

    def _part(self, order: Order, step: Step, to: Counter[str]) -> Any:
        quantities = dict(step.lines)
        if step.key in order.parts:
            return None if order.parts[step.key] == (step.verb, quantities) else KeyReused
        if any(order.held[sku] < quantity for sku, quantity in quantities.items()):
            return HoldMissing
        order.parts[step.key] = (step.verb, quantities)
        order.held.subtract(quantities)
        to.update(quantities)
        return None


class Shop:
    """The same on the database; SKUs and orders are new for each sequence."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.stock = Stock(system.clock, system.ids, system.outbox)
        self.orders = [system.ids.next() for _ in range(3)]
        self.prefix = str(self.orders[0])

    async def apply(self, step: Step) -> Any:
        try:
            async with self.system.database.transaction() as tx:
                return await self._call(tx, step)
        except HoldfastError as error:
            return type(error)

    async def _call(self, tx: Tx, step: Step) -> Any:
        order_id = self.orders[step.order]
        if step.verb == "reserve":
            lines = tuple(Line(sku=self.sku(sku), quantity=quantity) for sku, quantity in step.lines)
            (outcome,) = await self.stock.reserve(tx, [Wanted(order_id=order_id, lines=lines)])
            return None if outcome is None else type(outcome)
        if step.key:
            part: Callable[..., Awaitable[int]] = getattr(self.stock, step.verb)
            await part(tx, order_id, {self.sku(sku): quantity for sku, quantity in step.lines}, step.key)
        else:
            whole: Callable[..., Awaitable[int]] = getattr(self.stock, step.verb)
            await whole(tx, [order_id])
        return None

    def sku(self, name: str) -> str:
        return f"{name}-{self.prefix}"

    async def books(self) -> dict[str, tuple[int, int, int]]:
        """(available, held, sold) of each SKU by its counters; the ledger and the details are to say the same."""
        by_levels: dict[str, tuple[int, int, int]] = {}
        for name in SKUS:
            sku = self.sku(name)
            levels = await self.system.stock.levels(sku)
            assert all(min(each.available, each.held, each.sold) >= 0 for each in levels)
            by_levels[name] = (
                sum(each.available for each in levels),
                sum(each.held for each in levels),
                sum(each.sold for each in levels),
            )
            (entry,) = await rows(
                self.system,
                """SELECT sum(available_delta) AS available, sum(held_delta) AS held, sum(sold_delta) AS sold
                   FROM stock_ledger WHERE sku = :sku""",
                sku=sku,
            )
            assert (entry["available"], entry["held"], entry["sold"]) == by_levels[name]
            (detail,) = await rows(
                self.system,
                """SELECT coalesce(sum(CASE status WHEN 1 THEN quantity END), 0) AS held,
                          coalesce(sum(CASE status WHEN 3 THEN quantity END), 0) AS sold
                   FROM stock_task_detail WHERE sku = :sku""",
                sku=sku,
            )
            assert (detail["held"], detail["sold"]) == by_levels[name][1:]
        return by_levels


@pytest.fixture
async def idle(start_system: Callable[..., Awaitable[System]]) -> System:
    return await start_system(work=False)


@examples(max_examples=25, deadline=None, print_blob=False, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(STEPS, min_size=3, max_size=14))
async def test_the_books_agree_in_any_order_of_arrival(idle: System, steps: Sequence[Step]) -> None:
    shop, model = Shop(idle), Model()
    for name, (east, west) in SHELVES.items():
        await stock_up(idle, shop.sku(name), east, "east")
        await stock_up(idle, shop.sku(name), west, "west")
    for step in steps:
        wanted = model.apply(step)
        assert await shop.apply(step) is wanted, f"{step} of {steps}"
        books = await shop.books()
        for name in SKUS:
            held = sum(order.held[name] for order in model.orders)
            sold = sum(order.sold[name] for order in model.orders)
            assert books[name] == (model.available[name], held, sold), f"after {step} of {steps}"
    found = (await audit(idle.database, idle.clock, 0)).findings
    # These orders exist for stock only; whatever is checked within stock holds.
    assert [each.name for each in found if each.name not in {"stock.ghost_holds", "stock.orders"}] == []


async def test_a_part_of_nothing_is_refused(idle: System) -> None:
    shop = Shop(idle)
    for name, (east, _) in SHELVES.items():
        await stock_up(idle, shop.sku(name), east, "east")
    assert await shop.apply(Step("reserve", 0, (("A", 2),))) is None
    for lines in ((), (("A", 0),), (("A", -1),)):
        assert await shop.apply(Step("deduct_part", 0, lines, "k")) is InvalidInput
    assert await shop.books() == {"A": (0, 2, 0), "B": (4, 0, 0)}


async def test_one_order_twice_in_a_batch(idle: System) -> None:
    await stock_up(idle, "SKU-1", 5)
    stock = Stock(idle.clock, idle.ids, idle.outbox)
    same = Wanted(order_id=1, lines=(Line(sku="SKU-1", quantity=2),))
    other = Wanted(order_id=1, lines=(Line(sku="SKU-1", quantity=3),))
    async with idle.database.transaction() as tx:
        first, second, third = await stock.reserve(tx, [same, same, other])
    assert (first, second) == (None, None)
    assert isinstance(third, HoldDiffers)
    (now,) = await idle.stock.levels("SKU-1")
    assert (now.available, now.held) == (3, 2)


async def test_a_paid_order_is_sold_in_parts(start_system: StartSystem) -> None:
    """Part of it moves on first, out of one warehouse and some of another; the payment sells the rest."""
    system = await start_system(work=False)
    await stock_up(system, "SKU-1", 2, "east")
    await stock_up(system, "SKU-1", 5, "west")
    view = await order(system, quantity=5)
    stock = Stock(system.clock, system.ids, system.outbox)
    for _ in range(2):  # the same part again is no news
        async with system.database.transaction() as tx:
            await stock.deduct_part(tx, int(view.id), {"SKU-1": 3}, "parcel-1")
        details = "SELECT warehouse, quantity, status FROM stock_task_detail ORDER BY warehouse, status, quantity"
        assert await rows(system, details) == [
            {"warehouse": "east", "quantity": 2, "status": DEDUCTED},
            {"warehouse": "west", "quantity": 2, "status": HELD},
            {"warehouse": "west", "quantity": 1, "status": DEDUCTED},
        ]
    with pytest.raises(KeyReused):
        async with system.database.transaction() as tx:
            await stock.deduct_part(tx, int(view.id), {"SKU-1": 2}, "parcel-1")
    with pytest.raises(HoldMissing):
        async with system.database.transaction() as tx:
            await stock.deduct_part(tx, int(view.id), {"SKU-1": 3}, "parcel-2")
    levels = {each.warehouse: (each.available, each.held, each.sold) for each in await system.stock.levels("SKU-1")}
    assert levels == {"east": (0, 0, 2), "west": (2, 2, 1)}
    system.work()
    await pay(system, view)

    async def sold() -> bool:
        return set(await detail_states(system, view.id)) == {DEDUCTED}

    await eventually(sold, "the rest is sold")
    await clean(system)


async def test_giving_back_and_asking_at_the_same_moment(start_system: StartSystem, settings: Settings) -> None:
    """Whichever comes first, nothing stays held, and nothing is given back twice."""
    systems = await two_systems(start_system, settings, work=False)
    system = systems[0]
    await stock_up(system, "SKU-1", 30)
    stocks = [Stock(each.clock, each.ids, each.outbox) for each in (systems[0], systems[-1])]
    order_ids = [system.ids.next() for _ in range(20)]

    async def ask(tx: Tx, wishes: Sequence[Wanted]) -> list[Any]:
        return await stocks[0].reserve(tx, wishes)

    async def give_back(tx: Tx, which: Sequence[int]) -> list[Any]:
        return [await stocks[1].release(tx, [order_id]) for order_id in which]

    lines = (Line(sku="SKU-1", quantity=1),)
    await asyncio.gather(
        *(systems[0].group.submit(ask, Wanted(order_id=each, lines=lines)) for each in order_ids),
        *(systems[-1].group.submit(give_back, each) for each in order_ids),
        return_exceptions=True,
    )
    for order_id in order_ids:
        outcome = await systems[0].group.submit_all(ask, [Wanted(order_id=order_id, lines=lines)])
        assert isinstance(outcome[0], HoldEnded)
    (now,) = await system.stock.levels("SKU-1")
    assert (now.available, now.held) == (30, 0)
    await clean(system)
