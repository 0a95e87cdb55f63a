"""Rules of stock: how an order's lines are spread over warehouses. Pure: no await, no clock, no I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from holdfast.errors import HoldfastError, InvalidInput, Refused
from holdfast.services.contracts.values import Code, Currency, Line, Quantity, Shortage

# States of a work order's detail, with the numbers of the course notes.
HELD = 1
RELEASED = 2
DEDUCTED = 3


class UnknownSku(Refused):
    """There is no such SKU."""

    code = "sku_not_found"


class UnknownLevel(Refused):
    """There never was a unit of this SKU in this warehouse."""

    code = "level_not_found"


class LevelChanged(Refused):
    """The level is not as you saw it any more; read it again and decide again."""

    code = "precondition_failed"


class TooFewUnits(Refused):
    """That would take away units that are held for orders, or that are not there."""

    code = "too_few_units"


class HoldMissing(HoldfastError):
    """A paid order has no held stock to deduct; a human has to look."""

    code = "hold_missing"


class HoldEnded(Refused):
    """What this order held was given back; its number holds nothing again."""

    code = "hold_ended"


class HoldDiffers(Refused):
    """This order holds other units already."""

    code = "hold_differs"


Title = Annotated[str, Meta(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f-\x9f]+\Z")]
UnitPrice = Annotated[int, Meta(ge=0, le=1_000_000_000_000)]
TimeOut = Annotated[int, Meta(ge=100, le=366 * 86_400_000)]


class Sku(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """What can be sold, and its price."""

    sku: Code
    title: Title
    price_minor: UnitPrice
    currency: Currency
    order_max: Quantity | None = None  # units in one order
    buyer_max: Quantity | None = None  # units of one buyer, over all his orders that are open or paid
    time_out_ms: TimeOut | None = None  # time to pay, where it is not the usual one


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """Units that came in; `key` makes it count once."""

    key: str
    sku: Code
    warehouse: Code
    quantity: Quantity
    actor: str


class Received(msgspec.Struct, frozen=True, kw_only=True):
    """A receipt as it stands in the ledger."""

    key: str
    sku: str
    warehouse: str
    quantity: int
    actor: str
    at: str


Delta = Annotated[int, Meta(ge=-1_000_000, le=1_000_000)]
Counted = Annotated[int, Meta(ge=0, le=1_000_000_000)]
Reason = Title
Priority = Annotated[int, Meta(ge=0, le=1_000_000)]


class Adjustment(msgspec.Struct, frozen=True, kw_only=True):
    """Units that turned up or are gone, and why; `key` makes it count once, `tags` are the levels it was decided on."""

    key: str
    sku: Code
    warehouse: Code
    delta: Delta
    reason: Reason
    actor: str
    tags: frozenset[str] | None  # None: whatever the level is


class Count(msgspec.Struct, frozen=True, kw_only=True):
    """How many units are physically there: those available and those held; `key` makes it count once."""

    key: str
    sku: Code
    warehouse: Code
    counted: Counted
    reason: Reason | None
    actor: str
    tags: frozenset[str] | None = None


class Warehouse(msgspec.Struct, frozen=True, kw_only=True):
    """Where units lie; the lowest priority is drawn upon first."""

    code: Code
    priority: Priority


class Level(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One SKU in one warehouse; available + held + sold = total at every commit, and each change raises the version."""

    sku: str
    warehouse: str
    available: int
    held: int
    sold: int
    total: int
    version: int

    def refuse_unless(self, tags: frozenset[str] | None) -> Refused | None:
        """Why what was decided on other levels than this one is not done."""
        if tags is None or str(self.version) in tags:
            return None
        return LevelChanged(
            f"{self.sku} in {self.warehouse} is at version {self.version} now; read it and decide again"
        )


class Detail(msgspec.Struct, frozen=True, kw_only=True):
    """Units of a SKU in one warehouse held for an order."""

    sku: str
    warehouse: str
    quantity: int


class Hold(msgspec.Struct, frozen=True, kw_only=True):
    """What an order was given when it asked: units by SKU, and whether all of it was given back since."""

    lines: Mapping[str, int]
    ended: bool


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """A detail that is held."""

    id: int
    sku: str
    quantity: int


Shelf = dict[tuple[str, str], int]
"""(SKU, warehouse) -> units available; in the order in which warehouses are drawn upon."""


def allocate(
    shelf: Shelf, by_sku: Mapping[str, Sequence[tuple[str, str]]], lines: Iterable[Line]
) -> list[Detail] | Shortage:
    """Take an order's lines from the shelf, all or nothing, splitting a line over warehouses where one is not enough.

    `shelf` is lowered only when every line fits. The last unit can be sold: so many are enough as are wanted.
    """
    details: list[Detail] = []
    for line in lines:
        missing = line.quantity
        for place in by_sku.get(line.sku, ()):
            taken = min(missing, shelf[place])
            if taken > 0:
                details.append(Detail(sku=line.sku, warehouse=place[1], quantity=taken))
                missing -= taken
            if missing == 0:
                break
        if missing:
            return Shortage(sku=line.sku, wanted=line.quantity, available=line.quantity - missing)
    for detail in details:
        shelf[detail.sku, detail.warehouse] -= detail.quantity
    return details


def units(lines: Iterable[Line]) -> dict[str, int]:
    """The lines' quantities by SKU."""
    by_sku: dict[str, int] = {}
    for line in lines:
        by_sku[line.sku] = by_sku.get(line.sku, 0) + line.quantity
    return by_sku


def again(hold: Hold, lines: Iterable[Line]) -> Refused | None:
    """The answer to an order that asks for stock once more: None says that it is held, as before."""
    if hold.ended:
        return HoldEnded()
    return None if hold.lines == units(lines) else HoldDiffers()


def take_part(held: Sequence[Held], quantities: Mapping[str, int]) -> dict[int, int]:
    """How many units each held detail gives when part of an order moves on, in the given order of details.

    Raises `InvalidInput` for a part of nothing, `HoldMissing` for more than is held.
    """
    if not quantities or min(quantities.values()) < 1:
        raise InvalidInput("a part of an order has at least one SKU, with at least one unit of each")
    taken: dict[int, int] = {}
    for sku, wanted in sorted(quantities.items()):
        missing = wanted
        for detail in held:
            if detail.sku == sku and missing:
                taken[detail.id] = min(missing, detail.quantity)
                missing -= taken[detail.id]
        if missing:
            raise HoldMissing(f"of SKU {sku!r} {wanted - missing} units are held, {wanted} are to move on")
    return taken


def check_delta(delta: int) -> None:
    """Refuse an adjustment that changes nothing: `InvalidInput`."""
    if delta == 0:
        raise InvalidInput("delta is 0; an adjustment adds units or takes some away")


def adjusted(level: Level, delta: int) -> TooFewUnits | None:
    """Why the level cannot be adjusted by so many units."""
    if level.available + delta >= 0:
        return None
    return TooFewUnits(f"{level.available} units are available and {level.held} held; {-delta} cannot be taken away")


def difference(level: Level, counted: int) -> int | TooFewUnits:
    """How many units more (or less) are there than the books say; what is held cannot be missing."""
    if counted < level.held:
        return TooFewUnits(f"{counted} units were counted and {level.held} are held for orders; look into these first")
    return counted - level.available - level.held
