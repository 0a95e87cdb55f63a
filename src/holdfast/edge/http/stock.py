"""Routes of stock: what is left, for everybody; the shelves, for staff."""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import Request, Response, Router, get, post, put, route
from litestar.di import NamedDependency
from litestar.params import FromPath, RawBody

from holdfast.bootstrap import System
from holdfast.edge.http.auth import Caller, staff
from holdfast.edge.http.reading import body_of, idempotency_key
from holdfast.errors import InvalidInput
from holdfast.services.contracts.values import Code, Currency, Quantity
from holdfast.services.stock.model import Level, Receipt, Sku, TimeOut, Title, UnitPrice


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


STOCK = "stock:write"

_read_sku = body_of(SkuBody)
_read_receipt = body_of(ReceiptBody)


@get("/stocks/{sku:str}", summary="How many are left")
async def available(sku: FromPath[str], system: NamedDependency[System]) -> Availability:
    """Units of a SKU that can be ordered now, over all warehouses."""
    return await _availability(checked(sku), system)


@get("/stocks/receipts", summary="How many of the SKU called receipts are left")
async def available_of_receipts(system: NamedDependency[System]) -> Availability:
    """A SKU may be called `receipts`, although receipts are posted to that path."""
    return await _availability("receipts", system)


@route("/stocks/receipts", http_method=["OPTIONS"], include_in_schema=False, status_code=204)
async def receipts_methods() -> Response[None]:
    """Two routes share this path, and the framework would tell of one of them only."""
    return Response(content=None, headers={"Allow": "GET, OPTIONS, POST"})


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


async def _availability(sku: str, system: System) -> Availability:
    levels = await system.stock.levels(sku)
    return Availability(sku=sku, available=sum(level.available for level in levels))


def checked(sku: str) -> str:
    """A SKU from a path; raises `InvalidInput`."""
    try:
        code: str = msgspec.convert(sku, Code)
    except msgspec.ValidationError as error:
        raise InvalidInput(f"sku in the path: {error}") from None
    return code


def router() -> Router:
    """The routes below /v1."""
    handlers: list[Any] = [available, receipts_methods, available_of_receipts, levels, keep, receive]
    return Router(path="/v1", route_handlers=handlers, tags=["stock"])
