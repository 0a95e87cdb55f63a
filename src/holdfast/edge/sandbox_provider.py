"""The sandbox provider as a server of its own: pay page, signed API, notices, and faults on request.

It keeps the same book as the sandbox within a shop. It is for trying out and testing a shop, where no stranger reaches
it: whoever does may order faults.
"""

from __future__ import annotations

import asyncio
import contextlib
import html
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any, Literal, TypeVar

import httpx
import msgspec
from litestar import Litestar, MediaType, Request, Response, get, post
from litestar.exceptions import HTTPException
from litestar.params import FromPath
from litestar.types import ASGIApp
from msgspec import Meta

from holdfast import observe
from holdfast.clock import Clock, SystemClock, rfc3339
from holdfast.db.connect import connect
from holdfast.db.group_commit import GroupCommit
from holdfast.edge.http.problems import from_error, from_framework
from holdfast.edge.http.reading import body_of
from holdfast.edge.server import listening_on, stop_event
from holdfast.errors import HoldfastError, InvalidSettings
from holdfast.services.payments.sandbox import SECRET_CHARS_MIN, SIGNATURE_HEADER, Signing
from holdfast.services.payments.sandbox_book import Asked, PayLink, RefundWish, SandboxBook, Trade, TradeClosed
from holdfast.services.payments.sandbox_remote import PATH, DayAsked, StatementFound, TradeFound, is_address
from holdfast.settings import DatabaseSettings, HttpSettings, Secret

TOLERANCE_MS = 300_000
NOTICE_TIMEOUT_S = 5.0
WITHOUT_CENTS = frozenset({"CLP", "ISK", "JPY", "KRW", "PYG", "UGX", "VND", "XAF", "XOF", "XPF"})
NOTICE_AGAIN_S = (1, 5, 30, 120, 600, 3_600)  # a notice that was not answered with `success` is sent again after these

W = TypeVar("W", bound=msgspec.Struct)
Verb = Literal["query", "close", "refund", "statement"]

log = observe.logger("sandbox")


class Faults(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """What goes wrong from now on; the defaults are that nothing does."""

    notice_delay_ms: Annotated[int, Meta(ge=0, le=86_400_000)] = 0
    notice_copies: Annotated[int, Meta(ge=0, le=100)] = 1  # 0: lost, 2: twice
    notice_forged: bool = False  # with a wrong signature instead of the right one
    notice_held: Annotated[int, Meta(ge=0, le=1_000)] = 0  # so many are held back, then sent last one first
    answers_lost: frozenset[Verb] = frozenset()  # the work is done, the answer never comes
    query_unknown: bool = False  # a question is answered with an error


class ProviderServer:
    """The server's parts; `app` is served, `notify_url` is where notices go."""

    def __init__(self, book: SandboxBook, signing: Signing, clock: Clock, notify_url: str) -> None:
        self.book = book
        self.signing = signing
        self.notify_url = notify_url
        self.faults = Faults()
        self._clock = clock
        self._held: list[Trade] = []
        self._sending: set[asyncio.Task[None]] = set()
        self._client = httpx.AsyncClient(timeout=NOTICE_TIMEOUT_S, trust_env=False)
        self.app = self._app()

    async def aclose(self) -> None:
        """Give up the notices that are still to be sent, as a provider that stops would."""
        for task in self._sending:
            task.cancel()
        await asyncio.gather(*self._sending, return_exceptions=True)
        await self._client.aclose()

    def _app(self) -> ASGIApp:
        @get("/pay/{token:str}", media_type=MediaType.HTML)
        async def page(token: FromPath[str]) -> Response[str]:
            return _page(await self._shown(self.signing.read_link(token)))

        @post("/pay/{token:str}", media_type=MediaType.HTML, status_code=200)
        async def pay(token: FromPath[str]) -> Response[str]:
            link = self.signing.read_link(token)
            with contextlib.suppress(TradeClosed):  # the page says so
                self._tell(await self.book.pay(link))
            return _page(await self._shown(link))

        @post(f"{PATH}/query", status_code=200)
        async def query(request: Request[Any, Any, Any]) -> Response[bytes]:
            if self.faults.query_unknown:
                return Response(b"", status_code=500)
            return await self._answer(request, "query", Asked, self._find)

        @post(f"{PATH}/close", status_code=200)
        async def close(request: Request[Any, Any, Any]) -> Response[bytes]:
            return await self._answer(request, "close", Asked, self._close)

        @post(f"{PATH}/refund", status_code=200)
        async def refund(request: Request[Any, Any, Any]) -> Response[bytes]:
            return await self._answer(request, "refund", RefundWish, self.book.refund)

        @post(f"{PATH}/statement", status_code=200)
        async def statement(request: Request[Any, Any, Any]) -> Response[bytes]:
            return await self._answer(request, "statement", DayAsked, self._statement)

        @post("/control/faults", status_code=200)
        async def control(request: Request[Any, Any, Any]) -> Faults:
            self.faults = body_of(Faults)(await request.body())
            return self.faults

        return Litestar(
            [page, pay, query, close, refund, statement, control],
            exception_handlers={HoldfastError: from_error, HTTPException: from_framework, Exception: from_error},
            openapi_config=None,
            logging_config=None,
        )

    async def _find(self, asked: Asked) -> TradeFound:
        return TradeFound(trade=await self.book.find(asked.payment_id))

    async def _close(self, asked: Asked) -> TradeFound:
        return TradeFound(trade=await self.book.close(asked))

    async def _statement(self, asked: DayAsked) -> StatementFound:
        return StatementFound(lines=tuple(await self.book.statement(asked.day)))

    async def _answer(
        self,
        request: Request[Any, Any, Any],
        verb: Verb,
        kind: type[W],
        work: Callable[[W], Awaitable[msgspec.Struct]],
    ) -> Response[bytes]:
        raw = await request.body()
        self.signing.verify(request.headers.get(SIGNATURE_HEADER, ""), raw)
        body = msgspec.json.encode(await work(body_of(kind)(raw)))
        if verb in self.faults.answers_lost:
            while (await request.receive())["type"] != "http.disconnect":
                pass  # the client's deadline ends it
        headers = {SIGNATURE_HEADER: self.signing.signature(body)}
        return Response(body, media_type=MediaType.JSON, headers=headers)

    async def _shown(self, link: PayLink) -> dict[str, str]:
        """What the pay page says of a trade."""
        trade = await self.book.find(link.payment_id)
        over = self._clock.now_us() >= link.pay_by_us
        state = trade.status if trade is not None else "over" if over else "open"
        return {
            "amount": _money(link.amount_minor, link.currency),
            "currency": link.currency,
            "payment": str(link.payment_id),
            "until": rfc3339(link.pay_by_us),
            "state": state,
        }

    def _tell(self, trade: Trade) -> None:
        """Send the notice of a paid trade, as the faults of this moment have it."""
        faults = self.faults
        if len(self._held) < faults.notice_held:
            self._held.append(trade)
            if len(self._held) < faults.notice_held:
                return
        told = [*reversed(self._held)] if self._held else [trade]
        self._held.clear()
        task = asyncio.create_task(self._send_all(told, faults), name="sandbox-notices")
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _send_all(self, told: list[Trade], faults: Faults) -> None:
        await self._clock.sleep(faults.notice_delay_ms / 1_000)
        for trade in told:
            for _ in range(faults.notice_copies):
                await self._send(trade, forged=faults.notice_forged)

    async def _send(self, trade: Trade, *, forged: bool) -> None:
        for again_s in (*NOTICE_AGAIN_S, None):
            notice = self.signing.sign(self.signing.notice_of(trade))
            signature = notice.signature[:-4] + "0000" if forged else notice.signature
            headers = {SIGNATURE_HEADER: signature, "content-type": "application/json"}
            try:
                answer = await self._client.post(self.notify_url, content=notice.body, headers=headers)
                if answer.content == self.signing.notice_answer:
                    return
                log.warning("notice_refused", trade_no=trade.trade_no, status=answer.status_code)
            except httpx.HTTPError as error:
                log.warning("notice_not_sent", trade_no=trade.trade_no, error=repr(error)[:300])
            if again_s is None or forged:
                return
            await self._clock.sleep(again_s)


class Given(msgspec.Struct, frozen=True, kw_only=True):
    """What the server has to know: the shop's secret and name, where notices go, and where its book is."""

    secret: Secret
    merchant_id: str
    notify_url: str
    book_url: str = "sqlite://"  # in memory


@contextlib.asynccontextmanager
async def providing(clock: Clock, given: Given) -> AsyncIterator[ProviderServer]:
    """The server's parts over a book of its own; raises `InvalidSettings` for a secret or address that will not do."""
    secret = given.secret.reveal()
    if len(secret) < SECRET_CHARS_MIN:
        raise InvalidSettings(f"the sandbox's secret needs at least {SECRET_CHARS_MIN} characters")
    if not is_address(given.notify_url):
        raise InvalidSettings(f"--notify-url {given.notify_url!r} is no address; write http://host:port/path")
    database = await connect(DatabaseSettings(url=given.book_url))
    group = GroupCommit(database, clock, name="sandbox")
    book = SandboxBook(database, group, clock)
    signing = Signing(clock, secret, given.merchant_id, TOLERANCE_MS, page="/pay")
    try:
        await book.create_tables()
        group.start()
        server = ProviderServer(book, signing, clock, given.notify_url)
        try:
            yield server
        finally:
            await server.aclose()
            await group.close()
    finally:
        await database.close()


async def serve(settings: HttpSettings, given: Given, on_ready: Callable[[str], None]) -> int:
    """Serve the provider until a signal asks to stop; `on_ready` gets the URL once it listens."""
    stop = stop_event()
    clock = SystemClock()
    async with providing(clock, given) as provider, listening_on(provider.app, settings, clock, drain_s=1) as url:
        on_ready(url)
        await stop.wait()
    return 0


_SAYS = {
    "paid": "Paid. You can close this page.",
    "closed": "This payment was closed; nothing was charged.",
    "over": "The time to pay is over; nothing was charged.",
    "open": "",
}
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;background:#f3f4f6;color:#111827;display:grid;place-items:center;"
    "min-height:95vh;margin:0}main{background:#fff;border-radius:12px;box-shadow:0 4px 24px #0002;padding:2rem 2.5rem;"
    "min-width:18rem}h1{font-size:1rem;font-weight:600;color:#6b7280;margin:0}.amount{font-size:2.5rem;font-weight:700;"
    "margin:.25rem 0 1rem}small{color:#6b7280;display:block}button{width:100%;border:0;border-radius:8px;padding:.8rem;"
    "margin-top:1.5rem;font:inherit;font-weight:600;color:#fff;background:#2563eb;cursor:pointer}"
    "p{margin:1.5rem 0 0;font-weight:600}"
)


def _money(amount_minor: int, currency: str) -> str:
    if currency in WITHOUT_CENTS:
        return f"{amount_minor:,}"
    return f"{amount_minor // 100:,}.{amount_minor % 100:02}"


def _page(shown: dict[str, str]) -> Response[str]:
    safe = {name: html.escape(value) for name, value in shown.items()}
    form = '<form method="post"><button>Pay</button></form>' if shown["state"] == "open" else ""
    content = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Sandbox payment</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body><main>'
        f'<h1>Sandbox payment</h1><div class="amount">{safe["amount"]} {safe["currency"]}</div>'
        f"<small>Payment {safe['payment']}</small><small>Until {safe['until']}</small>"
        f"{form}<p>{_SAYS[shown['state']]}</p></main></body></html>"
    )
    policy = "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'"
    return Response(content, media_type=MediaType.HTML, headers={"content-security-policy": policy})
