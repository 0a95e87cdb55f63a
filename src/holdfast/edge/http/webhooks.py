"""Routes of webhooks, for staff: where events are sent, and what became of them."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

import msgspec
from litestar import Request, Router, delete, get, patch, post
from litestar.di import NamedDependency
from litestar.params import FromPath, RawBody

from holdfast.bootstrap import System
from holdfast.clock import microseconds
from holdfast.edge.http.auth import Caller, staff
from holdfast.edge.http.events import asked, number
from holdfast.edge.http.reading import body_of
from holdfast.errors import InvalidInput
from holdfast.services.webhooks.model import (
    DeliveryLog,
    DeliveryView,
    EndpointChange,
    EndpointView,
    EndpointWithSecret,
    NewEndpoint,
    WebhookNotFound,
)

WEBHOOKS = "webhooks:write"
ID_MAX = 2**63 - 1
LIMIT = 100


class ReplayBody(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """One delivery, or all that failed since an instant."""

    delivery: str | None = None
    failed_since: datetime | None = None


class Replayed(msgspec.Struct, frozen=True, kw_only=True):
    """How many deliveries begin anew."""

    replayed: int


_read_new = body_of(NewEndpoint)
_read_change = body_of(EndpointChange)
_read_replay = body_of(ReplayBody)


@get("/webhooks", summary="Where events are sent (staff)", **staff(WEBHOOKS))
async def every(caller: NamedDependency[Caller], system: NamedDependency[System]) -> list[EndpointView]:
    """Every webhook, without secrets."""
    return await system.webhooks.every()


@post("/webhooks", summary="Send events to a URL (staff)", **staff(WEBHOOKS))
async def add(body: RawBody, caller: NamedDependency[Caller], system: NamedDependency[System]) -> EndpointWithSecret:
    """Add a webhook; this answer alone tells its secret."""
    return await system.webhooks.add(_read_new(body))


@get("/webhooks/{webhook_id:str}", summary="One webhook (staff)", **staff(WEBHOOKS))
async def read(
    webhook_id: FromPath[str], caller: NamedDependency[Caller], system: NamedDependency[System]
) -> EndpointView:
    """One webhook, without its secret."""
    return await system.webhooks.get(parse_id(webhook_id))


@patch("/webhooks/{webhook_id:str}", summary="Change a webhook (staff)", **staff(WEBHOOKS))
async def change(
    webhook_id: FromPath[str], body: RawBody, caller: NamedDependency[Caller], system: NamedDependency[System]
) -> EndpointView:
    """Change what is given; `"enabled": true` lets one go on that was disabled."""
    return await system.webhooks.change(parse_id(webhook_id), _read_change(body))


@delete("/webhooks/{webhook_id:str}", summary="Remove a webhook (staff)", **staff(WEBHOOKS))
async def remove(webhook_id: FromPath[str], caller: NamedDependency[Caller], system: NamedDependency[System]) -> None:
    """Send nothing there any more."""
    await system.webhooks.remove(parse_id(webhook_id))


@post(
    "/webhooks/{webhook_id:str}/rotate",
    summary="Give a webhook a new secret (staff)",
    **staff(WEBHOOKS),
    status_code=200,
)
async def rotate(
    webhook_id: FromPath[str], caller: NamedDependency[Caller], system: NamedDependency[System]
) -> EndpointWithSecret:
    """The former secret signs too, until `previousSecretUntil`."""
    return await system.webhooks.rotate(parse_id(webhook_id))


@post("/webhooks/{webhook_id:str}/replay", summary="Send again (staff)", **staff(WEBHOOKS), status_code=200)
async def replay(
    webhook_id: FromPath[str], body: RawBody, caller: NamedDependency[Caller], system: NamedDependency[System]
) -> Replayed:
    """Send one delivery again, or all that failed since an instant."""
    wish = _read_replay(body)
    since_us = None
    if wish.failed_since is not None:
        try:
            since_us = max(0, microseconds(wish.failed_since))
        except ValueError as error:
            raise InvalidInput(f"failedSince: {error}") from None
    delivery_id = None if wish.delivery is None else parse_id(wish.delivery)
    found = await system.webhooks.replay(parse_id(webhook_id), delivery_id=delivery_id, failed_since_us=since_us)
    return Replayed(replayed=found)


@get("/webhooks/{webhook_id:str}/deliveries", summary="What was sent (staff)", **staff(WEBHOOKS))
async def deliveries(
    request: Request[Any, Any, Any],
    webhook_id: FromPath[str],
    caller: NamedDependency[Caller],
    system: NamedDependency[System],
) -> list[DeliveryView]:
    """Deliveries, the newest first."""
    given = asked(request, "status", "before", "limit")
    return await system.webhooks.deliveries(
        parse_id(webhook_id),
        status=given.get("status"),
        before=number(given, "before", 0),
        limit=number(given, "limit", LIMIT),
    )


@get("/webhooks/{webhook_id:str}/deliveries/{delivery_id:str}", summary="One delivery (staff)", **staff(WEBHOOKS))
async def delivery(
    webhook_id: FromPath[str],
    delivery_id: FromPath[str],
    caller: NamedDependency[Caller],
    system: NamedDependency[System],
) -> DeliveryLog:
    """One delivery with its body and every attempt."""
    return await system.webhooks.delivery(parse_id(webhook_id), parse_id(delivery_id))


def parse_id(text: str) -> int:
    """An id from a path; what is no id names nothing."""
    if not re.fullmatch(r"[1-9][0-9]{0,18}", text) or int(text) > ID_MAX:
        raise WebhookNotFound
    return int(text)


def router() -> Router:
    """The routes below /v1."""
    handlers: list[Any] = [every, add, read, change, remove, rotate, replay, deliveries, delivery]
    return Router(path="/v1", route_handlers=handlers, tags=["webhooks"])
