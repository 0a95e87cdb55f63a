"""Errors as RFC 9457 problems: one table from error to status, the error's own code and sentence in the body."""

from __future__ import annotations

import secrets
from typing import Any

import msgspec
from litestar import MediaType, Request, Response
from litestar.exceptions import HTTPException, ValidationException

from holdfast import observe
from holdfast.errors import (
    Conflict,
    HoldfastError,
    InvalidInput,
    OutcomeUnknown,
    Refused,
    Unavailable,
)
from holdfast.services.contracts.refusals import KeyReused
from holdfast.services.orders.model import MixedCurrencies, OrderNotFound
from holdfast.services.orders.model import UnknownSku as UnknownSkuOnLine
from holdfast.services.payments.service import PaymentNotFound, UnknownProvider
from holdfast.services.stock.actions import UnknownSku

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = "1"

log = observe.logger("http")


class Problem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The body of a refusal."""

    type: str
    title: str
    status: int
    code: str
    detail: str
    instance: str | None = None


class Unauthorized(HoldfastError):
    """The bearer token is missing, wrong or expired; get a new one."""

    code = "unauthorized"


class Forbidden(HoldfastError):
    """The token lacks the scope that this needs."""

    code = "forbidden"


class BodyTooLarge(HoldfastError):
    """The body is larger than this server takes."""

    code = "body_too_large"


# The first class that an error belongs to gives the status.
STATUS: tuple[tuple[type[HoldfastError], int], ...] = (
    (Unauthorized, 401),
    (Forbidden, 403),
    (OrderNotFound, 404),
    (UnknownSku, 404),
    (UnknownProvider, 404),
    (PaymentNotFound, 404),
    (KeyReused, 422),
    (UnknownSkuOnLine, 422),
    (MixedCurrencies, 422),
    (InvalidInput, 400),
    (Refused, 409),
    (BodyTooLarge, 413),
    (Conflict, 503),
    (Unavailable, 503),
    (OutcomeUnknown, 503),
)

_TITLES = {
    400: "The request is wrong",
    401: "Not signed in",
    403: "Not allowed",
    404: "Not found",
    405: "Method not allowed",
    408: "Too slow",
    409: "Not possible",
    413: "Too large",
    415: "Wrong content type",
    422: "Cannot be processed",
    431: "Too large",
    500: "Our fault",
    503: "Try again",
}
_CODES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large", 415: "unsupported_media_type"}


def status_of(error: HoldfastError) -> int:
    """The HTTP status of one of our errors; one the table does not know is our fault."""
    return next((status for kind, status in STATUS if isinstance(error, kind)), 500)


def problem(status: int, code: str, detail: str) -> Problem:
    """A problem document; its type is a URN of ours, one for each code."""
    title = _TITLES.get(status, "Not possible")
    return Problem(type=f"urn:holdfast:problem:{code}", title=title, status=status, code=code, detail=detail)


def answer(error: Exception) -> tuple[Problem, dict[str, str]]:
    """The problem and the headers for an error; what is not ours is a bug, logged in full and told without content."""
    status = status_of(error) if isinstance(error, HoldfastError) else 500
    if status == 500 or not isinstance(error, HoldfastError):
        return _unexpected(error), {}
    headers = {}
    if status == 503:
        headers["retry-after"] = RETRY_AFTER_S
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return problem(status, error.code, error.detail), headers


def from_error(_: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """Any error, as the framework wants it."""
    return _respond(*answer(error))


def from_framework(_: Request[Any, Any, Any], error: HTTPException) -> Response[bytes]:
    """What the framework refuses: unknown paths, bodies that do not fit, too large ones."""
    status = error.status_code
    if status == 500 and "client disconnected" in str(error.detail).lower():
        # Nobody is there to read it, but it is no fault of ours either.
        return _respond(problem(400, "invalid_input", "the client went away before its body was complete"), {})
    if status == 500:
        return from_error(_, error)
    code = _CODES.get(status, "invalid_input")
    detail = _fields(error) if isinstance(error, ValidationException) else str(error.detail)
    return _respond(problem(status, code, detail), dict(error.headers or {}))


def page_not_found(response: Response[Any]) -> Response[Any]:
    """The framework's pages of the schema answer an unknown path in HTML; the same problem as anywhere else then."""
    if response.status_code == 404 and response.media_type == MediaType.HTML:
        return _respond(problem(404, _CODES[404], "there is no such page of the schema"), {})
    return response


def _unexpected(error: Exception) -> Problem:
    incident = secrets.token_hex(8)
    log.error("unexpected_error", incident=incident, exc_info=error)
    body = problem(500, "internal_error", "something went wrong on our side; ask again with the same idempotency key")
    return msgspec.structs.replace(body, instance=f"urn:holdfast:incident:{incident}")


def _fields(error: ValidationException) -> str:
    """Name each wrong field; the framework's text alone says only that something is wrong."""
    extra = error.extra if isinstance(error.extra, list) else []
    named = [f"{each.get('key', 'body')}: {each.get('message', '')}" for each in extra if isinstance(each, dict)]
    return "; ".join(named)[:1_000] or str(error.detail)


def _respond(body: Problem, headers: dict[str, str]) -> Response[bytes]:
    return Response(content=msgspec.json.encode(body), status_code=body.status, media_type=MEDIA_TYPE, headers=headers)
