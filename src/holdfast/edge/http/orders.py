"""Routes of orders."""

from __future__ import annotations

import re
from typing import Any

import msgspec
from litestar import Router, get, post
from litestar.di import NamedDependency, Provide
from litestar.params import FromPath

from holdfast.bootstrap import System
from holdfast.edge.http.auth import Caller, Tokens, caller
from holdfast.edge.http.hot import Handler, Headers, ReadBody, Reply
from holdfast.edge.http.reading import body_of, idempotency_key
from holdfast.services.orders.model import OrderLine, OrderNotFound, OrderStatus, OrderView, PlaceRequest

_ID = re.compile(r"[1-9][0-9]{0,18}")
ID_MAX = 2**63 - 1
PLACE_PATH = "/v1/orders"
CONFIRMING = "confirming"


class PlaceBody(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """What a buyer sends: lines, and nothing that is ours to say."""

    lines: list[OrderLine]


_read_body = body_of(PlaceBody)


def placing(system: System, tokens: Tokens) -> Handler:
    """`POST /v1/orders`: hold the stock and open the payment; the same key and lines again give the same answer."""

    async def place(headers: Headers, raw: ReadBody) -> Reply:
        caller = tokens.caller(headers.get("authorization", ""))
        key = idempotency_key(headers)
        body = _read_body(await raw())
        wish = PlaceRequest(buyer=caller.subject, idempotency_key=key, lines=tuple(body.lines))
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
    """The caller's own order; another's does not exist for him. A payer never reads that he has not paid."""
    view = await system.orders.get(parse_id(order_id), caller.subject)
    if view.status is not OrderStatus.PENDING_PAYMENT or not await system.payments.captured(int(view.id)):
        return view
    payment = msgspec.structs.replace(view.payment, pay_url=None)
    return OrderShown(**msgspec.structs.asdict(view) | {"status": CONFIRMING, "payment": payment})


@post("/orders/{order_id:str}/cancel", summary="Cancel an order", status_code=200)
async def cancel(
    order_id: FromPath[str], caller: NamedDependency[Caller], system: NamedDependency[System]
) -> OrderView:
    """Cancel the caller's own unpaid order; again does no harm."""
    return await system.orders.cancel(parse_id(order_id), caller.subject)


def parse_id(text: str) -> int:
    """An order id from a path; what is no id names no order."""
    if not _ID.fullmatch(text) or int(text) > ID_MAX:
        raise OrderNotFound
    return int(text)


def router() -> Router:
    """The routes below /v1."""
    handlers: list[Any] = [read, cancel]
    return Router(
        path="/v1",
        route_handlers=handlers,
        dependencies={"caller": Provide(caller, sync_to_thread=False)},
        tags=["orders"],
    )
