"""Routes of payments: notices of providers, and the sandbox's pay page where it is switched on."""

from __future__ import annotations

from typing import Any

from litestar import Router, post
from litestar.di import NamedDependency
from litestar.params import FromPath

from holdfast.bootstrap import System
from holdfast.edge.http.hot import Handler, Headers, ReadBody, Reply
from holdfast.services.payments.sandbox import SignedNotice


def notice_path(system: System) -> str:
    """Where the configured provider sends its notices."""
    return f"/v1/notices/{system.sandbox.name}"


def noticing(system: System) -> Handler:
    """`POST /v1/notices/{provider}`: verify the signature over the raw body, store the notice and apply it once.

    The plain answer `success` means that all of that is committed; anything else asks the provider to send it again.
    """

    async def notice(headers: Headers, raw: ReadBody) -> Reply:
        await system.payments.notice(system.sandbox.name, headers, await raw())
        return Reply(status=200, body=b"success", media_type="text/plain; charset=utf-8")

    return notice


@post("/sandbox/pay/{token:str}", summary="Pay at the sandbox", status_code=200)
async def pay(token: FromPath[str], system: NamedDependency[System]) -> SignedNotice:
    """Pay by link; answers the signed notice that the payer's side is to post to /v1/notices/sandbox."""
    return await system.sandbox.pay(token)


def router() -> Router:
    """The routes; the sandbox is the only provider of this version, so its page is always there."""
    handlers: list[Any] = [pay]
    return Router(path="/", route_handlers=handlers, tags=["payments"])
