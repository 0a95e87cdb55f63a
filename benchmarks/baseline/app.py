"""The baseline order service over HTTP: FastAPI, SQLAlchemy 2, one transaction per request.

It sells correctly.  Stock changes by conditional UPDATE, an idempotency key is a row under a unique
constraint, and a pay notice settles order, payment and stock in one transaction.  Durability is that
of holdfast: ``synchronous_commit=on`` (the default of PostgreSQL), ``synchronous=FULL`` on SQLite.

Orders not paid in time are closed by a background task that polls once a second.  A production
system of this shape would often give each order a Celery countdown.  The poller stands in for it and
flatters the baseline, which then pays for no broker and no second process.

Run it with ``uvicorn benchmarks.baseline.app:app --loop uvloop --http httptools --no-access-log``.
It reads ``BASELINE_DATABASE``, ``BASELINE_TOKEN_SECRET`` and ``BASELINE_NOTICE_SECRET``, and if set
``BASELINE_STYLE`` (``orm`` or ``core``), ``BASELINE_SKUS``, ``BASELINE_UNITS``, ``BASELINE_POOL`` and
``BASELINE_PAY_WINDOW`` (seconds).
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, Self

import jwt
from fastapi import Depends, FastAPI, Header, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from jwt.types import Options
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from benchmarks.baseline.core import CoreOrders
from benchmarks.baseline.orm import OrmOrders
from benchmarks.baseline.tables import Database, create_tables, open_database
from benchmarks.baseline.values import PROVIDER, Cart, Order, OrderService, PaidNotice, Refused

MERCHANT_ID = "holdfast-demo"
POLL_SECONDS = 1.0
STYLES: dict[str, Callable[[Database, timedelta], OrderService]] = {"orm": OrmOrders, "core": CoreOrders}
CLAIMS: Options = {"require": ["sub", "exp"]}
SIGNATURE_TOLERANCE_SECONDS = 300

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Settings:
    """What the environment says."""

    database: str
    token_secret: str
    notice_secret: bytes
    skus: int
    units: int
    style: str
    pool_size: int
    pay_window: timedelta

    @classmethod
    def from_environment(cls) -> Self:
        """Read the settings; a missing secret or database is an error, not a default."""
        return cls(
            database=os.environ["BASELINE_DATABASE"],
            token_secret=os.environ["BASELINE_TOKEN_SECRET"],
            notice_secret=os.environ["BASELINE_NOTICE_SECRET"].encode(),
            skus=int(os.environ.get("BASELINE_SKUS", "100")),
            units=int(os.environ.get("BASELINE_UNITS", "1000000")),
            style=os.environ.get("BASELINE_STYLE", "orm"),
            pool_size=int(os.environ.get("BASELINE_POOL", "8")),
            pay_window=timedelta(seconds=float(os.environ.get("BASELINE_PAY_WINDOW", "900"))),
        )


class Wire(BaseModel):
    """A model with camelCase names on the wire."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True)


class LineIn(Wire):
    """A line of a place request."""

    sku: str = Field(min_length=1, max_length=64)
    quantity: int = Field(ge=1, le=999)


class PlaceIn(Wire):
    """The body of a place request."""

    lines: list[LineIn] = Field(min_length=1, max_length=50)


class NoticeIn(Wire):
    """The body of a pay notice."""

    event_id: str
    merchant_id: str
    payment_id: int
    trade_no: str
    amount_minor: int
    currency: str
    paid_at: datetime


class LineOut(Wire):
    """A line of an order."""

    sku: str
    quantity: int
    unit_price_minor: int


class PaymentOut(Wire):
    """The payment of an order."""

    id: str
    provider: str
    status: str
    amount_minor: int


class OrderOut(Wire):
    """An order."""

    id: str
    status: str
    amount_minor: int
    currency: str
    pay_by: datetime
    lines: list[LineOut]
    payment: PaymentOut

    @classmethod
    def of(cls, order: Order) -> Self:
        """Build the wire form of a stored order."""
        return cls(
            id=str(order.id),
            status=order.status,
            amount_minor=order.amount_minor,
            currency=order.currency,
            pay_by=order.pay_by,
            lines=[
                LineOut(sku=line.sku, quantity=line.quantity, unit_price_minor=line.unit_price_minor)
                for line in order.lines
            ],
            payment=PaymentOut(
                id=str(order.payment_id),
                provider=PROVIDER,
                status=order.payment_status,
                amount_minor=order.amount_minor,
            ),
        )


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open the database, seed it and keep the poller running while the app serves."""
    settings = Settings.from_environment()
    async with open_database(settings.database, settings.pool_size) as database:
        await create_tables(database, settings.skus, settings.units)
        app.state.settings = settings
        app.state.orders = STYLES[settings.style](database, settings.pay_window)
        poller = asyncio.create_task(poll_overdue(app.state.orders))
        try:
            yield
        finally:
            poller.cancel()
            with suppress(asyncio.CancelledError):
                await poller


async def poll_overdue(orders: OrderService) -> None:
    """Close overdue orders once a second; an outage of the database must not end the poller."""
    while True:
        await asyncio.sleep(POLL_SECONDS)
        try:
            await orders.close_overdue()
        except Exception:
            log.exception("closing overdue orders failed")


app = FastAPI(lifespan=lifespan)


@app.exception_handler(Refused)
async def on_refused(_request: Request, refused: Refused) -> JSONResponse:
    """Answer with problem details (RFC 9457)."""
    problem = {"title": refused.code, "status": refused.status, "code": refused.code, "detail": refused.detail}
    return JSONResponse(problem, refused.status, media_type="application/problem+json")


def settings_of(request: Request) -> Settings:
    """Return the settings of the running app."""
    settings: Settings = request.app.state.settings
    return settings


def orders_of(request: Request) -> OrderService:
    """Return the order service of the running app."""
    orders: OrderService = request.app.state.orders
    return orders


# A coroutine, because FastAPI runs dependencies that are plain functions in its thread pool.
async def current_buyer(request: Request, authorization: Annotated[str, Header()] = "") -> str:
    """Return the buyer that the bearer token names."""
    scheme, _, token = authorization.partition(" ")
    if scheme.lower() != "bearer":
        raise Refused(401, "unauthenticated", "a bearer token is required")
    try:
        claims = jwt.decode(token, settings_of(request).token_secret, algorithms=["HS256"], options=CLAIMS)
    except jwt.InvalidTokenError as error:
        raise Refused(401, "unauthenticated", "the token is not valid") from error
    return str(claims["sub"])


Buyer = Annotated[str, Depends(current_buyer)]


@app.post("/v1/orders", status_code=201)
async def place_order(
    request: Request, body: PlaceIn, buyer: Buyer, idempotency_key: Annotated[str, Header(max_length=128)]
) -> OrderOut:
    """Place an order, or return the one that this idempotency key has already made."""
    quantities: dict[str, int] = {}
    for line in body.lines:
        quantities[line.sku] = quantities.get(line.sku, 0) + line.quantity
    request_hash = hashlib.sha256(body.model_dump_json().encode()).hexdigest()
    return OrderOut.of(await orders_of(request).place(Cart(buyer, idempotency_key, request_hash, quantities)))


@app.get("/v1/orders/{order_id}")
async def get_order(request: Request, order_id: int, buyer: Buyer) -> OrderOut:
    """Return one of the buyer's own orders."""
    return OrderOut.of(await orders_of(request).get(buyer, order_id))


@app.post("/v1/notices/sandbox")
async def take_notice(request: Request, sandbox_signature: Annotated[str, Header()] = "") -> PlainTextResponse:
    """Settle the order that a signed pay notice is about."""
    raw = await request.body()
    if not signature_holds(settings_of(request).notice_secret, sandbox_signature, raw, time.time()):
        raise Refused(401, "bad_signature", "the signature does not match")
    try:
        notice = NoticeIn.model_validate_json(raw)
    except ValidationError as error:
        raise Refused(400, "bad_notice", "the notice cannot be read") from error
    if notice.merchant_id != MERCHANT_ID:
        raise Refused(400, "bad_notice", "the notice is for another merchant")
    await orders_of(request).pay(
        PaidNotice(
            payment_id=notice.payment_id,
            event_id=notice.event_id,
            trade_no=notice.trade_no,
            amount_minor=notice.amount_minor,
            currency=notice.currency,
            paid_at=notice.paid_at,
        )
    )
    return PlainTextResponse("success")


def signature_holds(secret: bytes, header: str, raw: bytes, now: float) -> bool:
    """Check ``t=<unix seconds>,v1=<hex>`` against the raw body and the clock."""
    fields = dict(part.partition("=")[::2] for part in header.split(","))
    stamp, given = fields.get("t", ""), fields.get("v1", "")
    if not stamp.isdecimal() or abs(now - int(stamp)) > SIGNATURE_TOLERANCE_SECONDS:
        return False
    expected = hmac.digest(secret, stamp.encode() + b"." + raw, hashlib.sha256).hex()
    return hmac.compare_digest(expected.encode(), given.encode())
