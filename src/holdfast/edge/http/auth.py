"""Who is asking: bearer tokens, JWTs signed with HS256 by the shop's own secret."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import jwt
import msgspec
from litestar import Request
from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler

from holdfast.clock import US_PER_S, Clock
from holdfast.edge.http.problems import Forbidden, Unauthorized
from holdfast.errors import InvalidInput, InvalidSettings

ALGORITHM = "HS256"  # pinned here, never taken from the token
SECRET_BYTES_MIN = 32
SCOPES: Mapping[str, str] = {
    "stock:write": "SKUs, warehouses, receipts, adjustments and counts",
    "orders:read": "every buyer's orders and what happens to them",
    "orders:write": "ship, complete, extend and cancel orders",
    "refunds:write": "give captured money back",
    "reconciliations:write": "see differences between the books and repair them",
    "webhooks:write": "where events are sent",
}
"""What staff may be allowed to do; a buyer's token has none of these and serves his own orders."""
_SUBJECT = re.compile(r"[\x21-\x7e]{1,128}")


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """The one whose token this is."""

    subject: str
    scopes: frozenset[str]

    def require(self, scope: str) -> None:
        """Raises `Forbidden` without the scope."""
        if scope not in self.scopes:
            raise Forbidden(f"this needs a token with the scope {scope}")


class Tokens:
    """Issues and checks tokens."""

    def __init__(self, secret: str, clock: Clock) -> None:
        if len(secret.encode()) < SECRET_BYTES_MIN:
            raise InvalidSettings(
                f"HOLDFAST_HTTP__TOKEN_SECRET needs at least {SECRET_BYTES_MIN} bytes; "
                "make one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
            )
        self._secret = secret
        self._clock = clock

    def issue(self, subject: str, scopes: frozenset[str], valid_s: int) -> str:
        """A token for a subject, valid for so many seconds from now."""
        if not _SUBJECT.fullmatch(subject):
            raise InvalidInput("a token's subject has 1 to 128 visible ASCII characters, no blanks among them")
        claims = {
            "sub": subject,
            "exp": self._clock.now_us() // US_PER_S + valid_s,
            "scope": " ".join(sorted(scopes)),
        }
        return jwt.encode(claims, self._secret, algorithm=ALGORITHM)

    def caller(self, authorization: str) -> Caller:
        """The caller named by an Authorization header; raises `Unauthorized`."""
        kind, _, token = authorization.partition(" ")
        if kind.lower() != "bearer" or not token:
            raise Unauthorized("send the header Authorization: Bearer <token>")
        return self.check(token.strip())

    def check(self, token: str) -> Caller:
        """The caller of a token; raises `Unauthorized` for a forged, expired or odd one."""
        try:
            claims = jwt.decode(
                token, self._secret, algorithms=[ALGORITHM], options={"require": ["exp", "sub"], "verify_exp": False}
            )
        except jwt.PyJWTError:
            raise Unauthorized("the bearer token is not valid; get a new one") from None
        expires = claims["exp"]
        if not isinstance(expires, (int, float)) or not math.isfinite(expires):
            raise Unauthorized("the bearer token names no usable time of expiry")
        if expires * US_PER_S <= self._clock.now_us():
            raise Unauthorized("the bearer token has expired; get a new one")
        subject, scope = claims["sub"], claims.get("scope", "")
        if not isinstance(subject, str) or not _SUBJECT.fullmatch(subject) or not isinstance(scope, str):
            raise Unauthorized("the bearer token names no usable subject")
        return Caller(subject=subject, scopes=frozenset(scope.split()))


def caller(request: Request[Any, Any, Any]) -> Caller:
    """The dependency of every route that serves somebody; raises `Unauthorized`."""
    tokens: Tokens = request.app.state.tokens
    return tokens.caller(request.headers.get("authorization", ""))


def staff(scope: str) -> dict[str, Any]:
    """What a route for staff is declared with: only a token with the scope gets in.

    The guard comes before the body is read; it raises `Unauthorized` or `Forbidden`.
    """
    assert scope in SCOPES

    def guard(connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
        tokens: Tokens = connection.app.state.tokens
        tokens.caller(connection.headers.get("authorization", "")).require(scope)

    return {"guards": [guard]}
