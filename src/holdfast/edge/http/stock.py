"""Routes of stock: what is left, for everybody; the shelves, for staff."""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import Request, Response, Router, get, post, put, route
from litestar.di import NamedDependency
from litestar.params import FromPath, RawBody

from holdfast.bootstrap import System
from holdfast.edge.http.auth import Caller, staff
from holdfast.edge.http.reading import body_of, idempotency_key, if_match
from holdfast.errors import InvalidInput
from holdfast.services.contracts.values import Code, Currency, Quantity
from holdfast.services.stock.model import (
    Adjustment,
    Count,
    Counted,
    Delta,
    Level,
    Priority,
    Reason,
    Receipt,
    Sku,
    TimeOut,
    Title,
    UnitPrice,
    Warehouse,
)


class Availability(msgspec.Struct, frozen=True, kw_only=True):
    """How many units of a SKU can be ordered now."""

    sku: str
    available: int


class SkuBody(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """A SKU's title and price."""

    title: Title
    price_minor: UnitPrice
    currency: Currency
    order_max: Quantity | None = None
    buyer_max: Quantity | None = None
    time_out_ms: TimeOut | None = None


class ReceiptBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Units that came in."""

    sku: Code
    quantity: Quantity
    warehouse: Code = "main"


class AdjustmentBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Units that turned up or are gone, and why."""

    sku: Code
    delta: Delta
    reason: Reason
    warehouse: Code = "main"


class CountBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many units lie on the shelf: those available and those held."""

    sku: Code
    counted: Counted
    warehouse: Code = "main"
    reason: Reason | None = None


class WarehouseBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A warehouse's place in the order in which they are drawn upon."""

    priority: Priority


STOCK = "stock:write"

_read_sku = body_of(SkuBody)
_read_receipt = body_of(ReceiptBody)
_read_adjustment = body_of(AdjustmentBody)
_read_count = body_of(CountBody)
_read_warehouse = body_of(WarehouseBody)


@get("/stocks/{sku:str}", summary="How many are left")
async def available(sku: FromPath[str], system: NamedDependency[System]) -> Availability:
    """Units of a SKU that can be ordered now, over all warehouses."""
    return await _availability(checked(sku), system)


def _shared_path(name: str) -> list[Any]:
    """A SKU may be called `receipts`, although receipts are posted to that path; and so with the others."""

    @get(f"/stocks/{name}", summary=f"How many of the SKU called {name} are left", operation_id=f"available_{name}")
    async def available_of_it(system: NamedDependency[System]) -> Availability:
        """Units of that SKU that can be ordered now, over all warehouses."""
        return await _availability(name, system)

    @route(f"/stocks/{name}", http_method=["OPTIONS"], include_in_schema=False, status_code=204)
    async def methods() -> Response[None]:
        """Two routes share this path, and the framework would tell of one of them only."""
        return Response(content=None, headers={"Allow": "GET, OPTIONS, POST"})

    return [methods, available_of_it]


@get(
    "/stocks",
    summary="All levels (staff)",
    **staff(STOCK),
)
async def levels(caller: NamedDependency[Caller], system: NamedDependency[System]) -> list[Level]:
    """Every SKU in every warehouse with its counters."""
    return await system.stock.levels()


@put(
    "/skus/{sku:str}",
    summary="Create or change a SKU (staff)",
    **staff(STOCK),
)
async def keep(
    sku: FromPath[str], body: RawBody, caller: NamedDependency[Caller], system: NamedDependency[System]
) -> Sku:
    """Set title and price; orders keep the price they were placed at."""
    data = _read_sku(body)
    return await system.stock.keep_sku(Sku(sku=checked(sku), **msgspec.structs.asdict(data)))


@post(
    "/stocks/receipts",
    summary="Book units that came in (staff)",
    **staff(STOCK),
)
async def receive(
    request: Request[Any, Any, Any],
    body: RawBody,
    caller: NamedDependency[Caller],
    system: NamedDependency[System],
) -> list[Level]:
    """Book a receipt once per key; answers the SKU's levels."""
    key = idempotency_key(request.headers)
    data = _read_receipt(body)
    receipt = Receipt(
        key=key,
        sku=data.sku,
        warehouse=data.warehouse,
        quantity=data.quantity,
        actor=caller.subject,
    )
    return await system.stock.receive(receipt)


@get(
    "/levels/{sku:str}/{warehouse:str}",
    summary="One level (staff)",
    **staff(STOCK),
)
async def one_level(
    sku: FromPath[str], warehouse: FromPath[str], caller: NamedDependency[Caller], system: NamedDependency[System]
) -> Response[Level]:
    """A SKU's counters in one warehouse, with the ETag that an adjustment asks for."""
    return _tagged(await system.stock.level(checked(sku), checked(warehouse, "warehouse")), 200)


@post(
    "/stocks/adjustments",
    summary="Add units or take some away (staff)",
    **staff(STOCK),
)
async def adjust(
    request: Request[Any, Any, Any],
    body: RawBody,
    caller: NamedDependency[Caller],
    system: NamedDependency[System],
) -> Response[Level]:
    """Book an adjustment once per key, if the level is as If-Match says; answers the level."""
    key, tags = idempotency_key(request.headers), if_match(request.headers)
    data = _read_adjustment(body)
    adjustment = Adjustment(
        key=key,
        sku=data.sku,
        warehouse=data.warehouse,
        delta=data.delta,
        reason=data.reason,
        actor=caller.subject,
        tags=tags,
    )
    return _tagged(await system.stock.adjust(adjustment), 201)


@post(
    "/stocks/counts",
    summary="Book what was counted (staff)",
    **staff(STOCK),
)
async def count(
    request: Request[Any, Any, Any],
    body: RawBody,
    caller: NamedDependency[Caller],
    system: NamedDependency[System],
) -> Response[Level]:
    """Book the difference between what lies there and what the books say, once per key; answers the level."""
    key = idempotency_key(request.headers)
    tags = if_match(request.headers) if "if-match" in request.headers else None
    data = _read_count(body)
    counted = Count(
        key=key,
        sku=data.sku,
        warehouse=data.warehouse,
        counted=data.counted,
        reason=data.reason,
        actor=caller.subject,
        tags=tags,
    )
    return _tagged(await system.stock.count(counted), 201)


@get(
    "/warehouses",
    summary="All warehouses (staff)",
    **staff(STOCK),
)
async def warehouses(caller: NamedDependency[Caller], system: NamedDependency[System]) -> list[Warehouse]:
    """In the order in which they are drawn upon."""
    return await system.stock.warehouses()


@put(
    "/warehouses/{code:str}",
    summary="Create or change a warehouse (staff)",
    **staff(STOCK),
)
async def keep_warehouse(
    code: FromPath[str], body: RawBody, caller: NamedDependency[Caller], system: NamedDependency[System]
) -> Warehouse:
    """Set its priority; the lowest is drawn upon first, from the next order on."""
    data = _read_warehouse(body)
    return await system.stock.keep_warehouse(Warehouse(code=checked(code, "warehouse"), priority=data.priority))


def _tagged(level: Level, status: int) -> Response[Level]:
    return Response(content=level, status_code=status, headers={"ETag": f'"{level.version}"'})


async def _availability(sku: str, system: System) -> Availability:
    levels = await system.stock.levels(sku)
    return Availability(sku=sku, available=sum(level.available for level in levels))


def checked(given: str, what: str = "sku") -> str:
    """A SKU, or the code of something else, from a path; raises `InvalidInput`."""
    try:
        code: str = msgspec.convert(given, Code)
    except msgspec.ValidationError as error:
        raise InvalidInput(f"{what} in the path: {error}") from None
    return code


def router() -> Router:
    """The routes below /v1."""
    handlers: list[Any] = [available]
    for name in ("receipts", "adjustments", "counts"):
        handlers += _shared_path(name)
    handlers += [levels, one_level, keep, receive, adjust, count, warehouses, keep_warehouse]
    return Router(path="/v1", route_handlers=handlers, tags=["stock"])
