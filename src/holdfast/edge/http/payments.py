"""Routes of payments: notices of providers, and the sandbox's pay page where it is switched on."""

from __future__ import annotations

from typing import Any

from litestar import Router, post
from litestar.di import NamedDependency
from litestar.params import FromPath

from holdfast.bootstrap import System
from holdfast.edge.http.hot import Handler, Headers, ReadBody, Reply
from holdfast.services.payments.needs import Provider
from holdfast.services.payments.sandbox import SignedNotice


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


def router() -> Router:
    """The routes; the sandbox's page answers 404 where the sandbox is not within this process."""
    handlers: list[Any] = [pay]
    return Router(path="/", route_handlers=handlers, tags=["payments"])
