"""Routes of orders."""

from __future__ import annotations

import re
from typing import Annotated, Any

import msgspec
from litestar import Response, Router, get, post
from litestar.di import Provide
from litestar.params import Parameter

from holdfast.bootstrap import System
from holdfast.edge.http.auth import Caller, caller
from holdfast.services.orders.model import IdempotencyKey, OrderLine, OrderNotFound, OrderView, PlaceRequest

_ID = re.compile(r"[1-9][0-9]{0,18}")
ID_MAX = 2**63 - 1


class PlaceBody(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """What a buyer sends: lines, and nothing that is ours to say."""

    lines: list[OrderLine]


@post("/orders", summary="Place an order", status_code=201)
async def place(
    data: PlaceBody,
    caller: Caller,
    system: System,
    idempotency_key: Annotated[IdempotencyKey, Parameter(header="Idempotency-Key")],
) -> Response[bytes]:
    """Hold the stock and open the payment; the same key and lines again give the same answer."""
    placed = await system.orders.place(
        PlaceRequest(buyer=caller.subject, idempotency_key=idempotency_key, lines=tuple(data.lines))
    )
    headers = {"Location": f"/v1/orders/{placed.order_id}"}
    if placed.replayed:
        headers["Idempotent-Replayed"] = "true"
    return Response(content=placed.body, status_code=201, media_type="application/json", headers=headers)


@get("/orders/{order_id:str}", summary="Read an order")
async def read(order_id: str, caller: Caller, system: System) -> OrderView:
    """The caller's own order; another's does not exist for him."""
    return await system.orders.get(parse_id(order_id), caller.subject)


@post("/orders/{order_id:str}/cancel", summary="Cancel an order", status_code=200)
async def cancel(order_id: str, caller: Caller, system: System) -> OrderView:
    """Cancel the caller's own unpaid order; again does no harm."""
    return await system.orders.cancel(parse_id(order_id), caller.subject)


def parse_id(text: str) -> int:
    """An order id from a path; what is no id names no order."""
    if not _ID.fullmatch(text) or int(text) > ID_MAX:
        raise OrderNotFound
    return int(text)


def router() -> Router:
    """The routes below /v1."""
    handlers: list[Any] = [place, read, cancel]
    return Router(
        path="/v1",
        route_handlers=handlers,
        dependencies={"caller": Provide(caller, sync_to_thread=False)},
        tags=["orders"],
    )
