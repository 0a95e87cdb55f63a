"""Routes of refunds, all for staff."""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import Request, Response, Router, get, post, route
from litestar.di import NamedDependency
from litestar.params import FromPath, RawBody

from holdfast.bootstrap import System
from holdfast.edge.http.auth import Caller, staff
from holdfast.edge.http.reading import body_of, idempotency_key, page_of, row_id, wanted_id
from holdfast.services.payments.model import (
    Reason,
    RefundAmount,
    RefundNotFound,
    RefundView,
    RefundWish,
    as_booked,
)
from holdfast.services.payments.refund_service import LIST_MAX

REFUNDS = "refunds:write"


class RefundBody(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """What to give back: of a payment, or of an order's; all that is left where no amount is named."""

    reason: Reason
    payment_id: str | None = None
    order_id: str | None = None
    amount_minor: RefundAmount | None = None


class RefundPage(msgspec.Struct, frozen=True, kw_only=True):
    """Refunds in order of id; `next` is the `after` of the next page, if there may be one."""

    items: list[RefundView]
    next: str | None


_read_refund = body_of(RefundBody)


@post("/refunds", summary="Give money back (staff)", **staff(REFUNDS))
async def create(
    request: Request[Any, Any, Any],
    body: RawBody,
    caller: NamedDependency[Caller],
    system: NamedDependency[System],
) -> Response[RefundView]:
    """Put a refund on the books, once per key; the provider is asked right after."""
    key = idempotency_key(request.headers)
    data = _read_refund(body)
    wish = RefundWish(
        key=key,
        actor=caller.subject,
        reason=data.reason,
        payment_id=wanted_id("paymentId", data.payment_id),
        order_id=wanted_id("orderId", data.order_id),
        amount_minor=data.amount_minor,
    )
    booked = await system.refunds.request(wish)
    headers = {"Location": f"/v1/refunds/{booked.refund.id}"}
    if booked.replayed:
        headers["Idempotent-Replayed"] = "true"
    return Response(content=as_booked(booked.refund), status_code=201, headers=headers)


@get("/refunds", summary="All refunds (staff)", **staff(REFUNDS))
async def page(
    request: Request[Any, Any, Any], caller: NamedDependency[Caller], system: NamedDependency[System]
) -> RefundPage:
    """Refunds in order of id, of one payment or of all."""
    query = request.query_params
    after, limit = page_of(query, LIST_MAX)
    payment_id = wanted_id("paymentId", query.get("paymentId"))
    items = list(await system.refunds.list(after=after, limit=limit, payment_id=payment_id))
    return RefundPage(items=items, next=items[-1].id if len(items) == limit else None)


@route("/refunds", http_method=["OPTIONS"], include_in_schema=False, status_code=204)
async def methods() -> Response[None]:
    """Two routes share this path, and the framework would tell of one of them only."""
    return Response(content=None, headers={"Allow": "GET, OPTIONS, POST"})


@get("/refunds/{refund_id:str}", summary="Read a refund (staff)", **staff(REFUNDS))
async def read(
    refund_id: FromPath[str], caller: NamedDependency[Caller], system: NamedDependency[System]
) -> RefundView:
    """One refund, as it is now."""
    known = row_id(refund_id)
    if known is None:
        raise RefundNotFound
    return await system.refunds.get(known)


def router() -> Router:
    """The routes below /v1."""
    handlers: list[Any] = [methods, create, page, read]
    return Router(path="/v1", route_handlers=handlers, tags=["refunds"])
