"""Routes of payments: notices of providers, and the sandbox's pay page where it is switched on."""

from __future__ import annotations

from typing import Any

from litestar import MediaType, Request, Router, post

from holdfast.bootstrap import System
from holdfast.services.payments.sandbox import SignedNotice


@post("/v1/notices/{provider:str}", summary="A provider's notice", status_code=200, media_type=MediaType.TEXT)
async def notice(provider: str, request: Request[Any, Any, Any], system: System) -> str:
    """Verify the signature over the raw body, store the notice and apply it once; `success` means committed."""
    await system.payments.notice(provider, dict(request.headers), await request.body())
    return "success"


@post("/sandbox/pay/{token:str}", summary="Pay at the sandbox", status_code=200)
async def pay(token: str, system: System) -> SignedNotice:
    """Pay by link; answers the signed notice that the payer's side is to post to /v1/notices/sandbox."""
    return await system.sandbox.pay(token)


def router() -> Router:
    """The routes; the sandbox is the only provider of this version, so its page is always there."""
    handlers: list[Any] = [notice, pay]
    return Router(path="/", route_handlers=handlers, tags=["payments"])
