"""Routes of orders."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any

import msgspec
from litestar import Router, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, RawBody
from msgspec import Meta

from holdfast.bootstrap import System
from holdfast.clock import microseconds
from holdfast.edge.http.auth import Caller, Tokens, staff
from holdfast.edge.http.hot import Handler, Headers, ReadBody, Reply
from holdfast.edge.http.problems import Forbidden
from holdfast.edge.http.reading import body_of, idempotency_key
from holdfast.errors import InvalidInput
from holdfast.services.orders.model import (
    CompleteRequest,
    Entry,
    ExtendRequest,
    OrderLine,
    OrderNotFound,
    OrderStatus,
    OrderView,
    PlaceRequest,
    ShipRequest,
)

_ID = re.compile(r"[1-9][0-9]{0,18}")
ID_MAX = 2**63 - 1
PLACE_PATH = "/v1/orders"
CONFIRMING = "confirming"


READ, WRITE = "orders:read", "orders:write"
PAGE_MAX = 200


class PlaceBody(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """What a buyer sends: lines or his cart, and nothing that is ours to say."""

    lines: list[OrderLine] | msgspec.UnsetType = msgspec.UNSET
    from_cart: bool = False


class ShipBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How an order travels."""

    tracking: Annotated[str, Meta(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f-\x9f]+\Z")]


class ExtendBody(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """A later deadline, with its zone."""

    pay_by: datetime


class OrderPage(msgspec.Struct, frozen=True, kw_only=True):
    """Orders, the newest first; `next` is what to give as `before` for more."""

    orders: list[OrderView]
    next: str | None


_read_body = body_of(PlaceBody)
_read_ship = body_of(ShipBody)
_read_extend = body_of(ExtendBody)


def placing(system: System, tokens: Tokens) -> Handler:
    """`POST /v1/orders`: hold the stock and open the payment; the same key and lines again give the same answer."""

    async def place(headers: Headers, raw: ReadBody) -> Reply:
        caller = tokens.caller(headers.get("authorization", ""))
        key = idempotency_key(headers)
        body = _read_body(await raw())
        if body.from_cart == (body.lines is not msgspec.UNSET):
            raise InvalidInput("send either lines or fromCart: true")
        lines = () if isinstance(body.lines, msgspec.UnsetType) else tuple(body.lines)
        wish = PlaceRequest(buyer=caller.subject, idempotency_key=key, lines=lines, from_cart=body.from_cart)
        placed = await system.orders.place(wish)
        extra = {"location": f"/v1/orders/{placed.order_id}"}
        if placed.replayed:
            extra["idempotent-replayed"] = "true"
        return Reply(status=201, body=placed.body, headers=extra)

    return place


class OrderShown(OrderView, frozen=True, kw_only=True, rename="camel"):
    """An order as its buyer sees it; `confirming` while its money is captured and the order not yet marked paid."""

    status: str  # type: ignore[assignment]  # one word more than an order's own states


@get("/orders/{order_id:str}", summary="Read an order")
async def read(
    order_id: FromPath[str], caller: NamedDependency[Caller], system: NamedDependency[System]
) -> OrderView | OrderShown:
    """The caller's own order, or anybody's with the scope orders:read; another's does not exist for a buyer.

    A payer never reads that he has not paid.
    """
    view = await system.orders.get(parse_id(order_id), _owner(caller, READ))
    if view.status is not OrderStatus.PENDING_PAYMENT or not await system.payments.captured(int(view.id)):
        return view
    payment = msgspec.structs.replace(view.payment, pay_url=None)
    return OrderShown(**msgspec.structs.asdict(view) | {"status": CONFIRMING, "payment": payment})


@get("/orders", summary="List orders")
async def page(
    caller: NamedDependency[Caller],
    system: NamedDependency[System],
    buyer: FromQuery[str | None] = None,
    status: FromQuery[str | None] = None,
    before: FromQuery[str | None] = None,
    limit: FromQuery[int] = 50,
) -> OrderPage:
    """The caller's own orders, the newest first; with the scope orders:read everybody's, or those of one buyer."""
    owner = _owner(caller, READ)
    if owner is not None and buyer not in (None, owner):
        raise Forbidden(f"other buyers' orders need a token with the scope {READ}")
    if not 1 <= limit <= PAGE_MAX:
        raise InvalidInput(f"limit is 1 to {PAGE_MAX}, not {limit}")
    if status is not None and status not in set(OrderStatus):
        raise InvalidInput(f"there is no status {status[:40]!r}; there are: {', '.join(OrderStatus)}")
    if before is not None and not (_ID.fullmatch(before) and int(before) <= ID_MAX):
        raise InvalidInput("before is the id of an order, as in `next` of the page before")
    found = await system.orders.page(
        buyer=owner or buyer,
        status=None if status is None else OrderStatus(status),
        before=ID_MAX if before is None else int(before),
        limit=limit,
    )
    return OrderPage(orders=found, next=found[-1].id if len(found) == limit else None)


@get("/orders/{order_id:str}/timeline", summary="What happened to an order")
async def timeline(
    order_id: FromPath[str], caller: NamedDependency[Caller], system: NamedDependency[System]
) -> list[Entry]:
    """Every transition of the caller's own order, or of anybody's with the scope orders:read, the oldest first."""
    return await system.orders.timeline(parse_id(order_id), _owner(caller, READ))


@post("/orders/{order_id:str}/cancel", summary="Cancel an order", status_code=200)
async def cancel(
    order_id: FromPath[str], caller: NamedDependency[Caller], system: NamedDependency[System]
) -> OrderView:
    """Cancel the caller's own unpaid order, or anybody's with the scope orders:write; again does no harm."""
    owner = _owner(caller, WRITE)
    return await system.orders.cancel(parse_id(order_id), owner, "buyer" if owner else caller.subject)


@post("/orders/{order_id:str}/complete", summary="Say that an order has arrived", status_code=200)
async def complete(
    order_id: FromPath[str], caller: NamedDependency[Caller], system: NamedDependency[System]
) -> OrderView:
    """Complete the caller's own shipped order, or anybody's with the scope orders:write; again does no harm."""
    owner = _owner(caller, WRITE)
    actor = "buyer" if owner else caller.subject
    return await system.orders.complete(CompleteRequest(order_id=parse_id(order_id), buyer=owner, actor=actor))


@post("/orders/{order_id:str}/ship", summary="Say that an order has left (staff)", status_code=200, **staff(WRITE))
async def ship(
    order_id: FromPath[str], body: RawBody, caller: NamedDependency[Caller], system: NamedDependency[System]
) -> OrderView:
    """Mark a paid order shipped; the same tracking again does no harm."""
    tracking = _read_ship(body).tracking
    return await system.orders.ship(ShipRequest(order_id=parse_id(order_id), tracking=tracking, actor=caller.subject))


@post("/orders/{order_id:str}/extend", summary="Give more time to pay (staff)", status_code=200, **staff(WRITE))
async def extend(
    order_id: FromPath[str], body: RawBody, caller: NamedDependency[Caller], system: NamedDependency[System]
) -> OrderView:
    """Give an unpaid order a later deadline; the answer holds the new pay link."""
    try:
        pay_by_us = microseconds(_read_extend(body).pay_by)
    except ValueError as error:
        raise InvalidInput(f"payBy: {error}") from None
    return await system.orders.extend(
        ExtendRequest(order_id=parse_id(order_id), pay_by_us=pay_by_us, actor=caller.subject)
    )


def _owner(caller: Caller, scope: str) -> str | None:
    """Whose orders the caller may see or touch: his own, or with the scope everybody's (None)."""
    return None if scope in caller.scopes else caller.subject


def parse_id(text: str) -> int:
    """An order id from a path; what is no id names no order."""
    if not _ID.fullmatch(text) or int(text) > ID_MAX:
        raise OrderNotFound
    return int(text)


def router() -> Router:
    """The routes below /v1."""
    handlers: list[Any] = [read, page, timeline, cancel, complete, ship, extend]
    return Router(path="/v1", route_handlers=handlers, tags=["orders"])
