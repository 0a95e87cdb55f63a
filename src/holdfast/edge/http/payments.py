"""Routes of payments: notices of providers, payment orders, and the pay link of the sandbox within the shop."""

from __future__ import annotations

import re
from typing import Any

import msgspec
from litestar import Router, get, post
from litestar.di import NamedDependency, Provide
from litestar.params import FromPath

from holdfast.bootstrap import System
from holdfast.clock import rfc3339
from holdfast.edge.http.auth import Caller, caller
from holdfast.edge.http.hot import Handler, Headers, ReadBody, Reply
from holdfast.services.payments.model import ENDED, NOT_SUBMITTED, SUCCEEDED, WAITING, PaymentDetails
from holdfast.services.payments.needs import Provider
from holdfast.services.payments.sandbox import SignedNotice
from holdfast.services.payments.service import PaymentNotFound

_ID = re.compile(r"[1-9][0-9]{0,18}")
ID_MAX = 2**63 - 1
PAY_TYPE_WEB = 1  # a page in a browser, in the numbers of the mall's other services
_STATES = {NOT_SUBMITTED: "waiting", WAITING: "waiting", ENDED: "ended", SUCCEEDED: "succeeded"}


class PayOrder(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A payment order with the names that the mall's other services know; amounts in minor units."""

    id: str
    biz_order_no: str
    pay_order_no: str
    biz_user_id: str
    pay_channel_code: str
    amount: int
    currency: str
    pay_type: int
    status: int  # 0 not submitted, 1 waiting, 2 timed out or cancelled, 3 succeeded
    expand_json: str | None
    result_code: str | None
    result_msg: str | None
    pay_success_time: str | None
    pay_over_time: str
    qr_code_url: str | None
    create_time: str
    update_time: str


class PaymentView(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A payment as its buyer sees it: waiting, succeeded or ended."""

    id: str
    order_id: str
    provider: str
    status: str
    amount_minor: int
    currency: str
    captured_minor: int
    refunded_minor: int
    captured_at: str | None
    pay_by: str
    pay_url: str | None
    created_at: str


def notice_routes(system: System) -> dict[tuple[str, str], Handler]:
    """Where each configured provider sends its notices."""
    return {("POST", f"/v1/notices/{name}"): noticing(system, provider) for name, provider in system.providers.items()}


def noticing(system: System, provider: Provider) -> Handler:
    """`POST /v1/notices/{provider}`: verify the signature over the raw body, store the notice and apply it once.

    The plain answer that the provider waits for (`success`) means that all of that is committed; anything else asks it
    to send the notice again.
    """

    async def notice(headers: Headers, raw: ReadBody) -> Reply:
        await system.payments.notice(provider.name, headers, await raw())
        return Reply(status=200, body=provider.notice_answer, media_type="text/plain; charset=utf-8")

    return notice


@post("/sandbox/pay/{token:str}", summary="Pay at the sandbox", status_code=200)
async def pay(token: FromPath[str], system: NamedDependency[System]) -> SignedNotice:
    """Pay by link; answers the signed notice that the payer's side is to post to /v1/notices/sandbox."""
    return await system.sandbox.pay(token)


@get("/pay-orders/biz/{biz_order_no:str}", summary="The payment order of an order")
async def of_order(
    biz_order_no: FromPath[str], caller: NamedDependency[Caller], system: NamedDependency[System]
) -> PayOrder:
    """The payment order of the caller's own order, or of any with the scope orders:read."""
    buyer = None if "orders:read" in caller.scopes else caller.subject
    return pay_order(await system.payments.of_order(_parse_id(biz_order_no), buyer))


@get("/v1/payments/{payment_id:str}", summary="Read a payment")
async def read(
    payment_id: FromPath[str], caller: NamedDependency[Caller], system: NamedDependency[System]
) -> PaymentView:
    """The caller's own payment; another's does not exist for him."""
    return payment_view(await system.payments.get(_parse_id(payment_id), caller.subject))


def pay_order(details: PaymentDetails) -> PayOrder:
    """A payment order in the words of the mall's other services."""
    order = details.order
    extra = None if order.trade_no is None else msgspec.json.encode({"tradeNo": order.trade_no}).decode()
    return PayOrder(
        id=str(order.id),
        biz_order_no=str(order.order_id),
        pay_order_no=str(order.id),
        biz_user_id=order.buyer,
        pay_channel_code=order.provider,
        amount=order.amount_minor,
        currency=order.currency,
        pay_type=PAY_TYPE_WEB,
        status=order.status,
        expand_json=extra,
        result_code=None if order.captured_us is None else "SUCCESS",
        result_msg=None,
        pay_success_time=None if order.captured_us is None else rfc3339(order.captured_us),
        pay_over_time=rfc3339(order.pay_by_us),
        qr_code_url=details.pay_url,
        create_time=rfc3339(details.created_us),
        update_time=rfc3339(details.changed_us),
    )


def payment_view(details: PaymentDetails) -> PaymentView:
    """A payment order as its buyer sees it."""
    order = details.order
    return PaymentView(
        id=str(order.id),
        order_id=str(order.order_id),
        provider=order.provider,
        status=_STATES[order.status],
        amount_minor=order.amount_minor,
        currency=order.currency,
        captured_minor=order.captured_minor,
        refunded_minor=order.refunded_minor,
        captured_at=None if order.captured_us is None else rfc3339(order.captured_us),
        pay_by=rfc3339(order.pay_by_us),
        pay_url=details.pay_url,
        created_at=rfc3339(details.created_us),
    )


def _parse_id(text: str) -> int:
    if not _ID.fullmatch(text) or int(text) > ID_MAX:
        raise PaymentNotFound
    return int(text)


def router() -> Router:
    """The routes; the sandbox's page answers 404 where the sandbox is not within this process."""
    owned: list[Any] = [of_order, read]
    handlers: list[Any] = [
        pay,
        Router(path="/", route_handlers=owned, dependencies={"caller": Provide(caller, sync_to_thread=False)}),
    ]
    return Router(path="/", route_handlers=handlers, tags=["payments"])
