"""The sandbox in a server of its own, asked over HTTP: every call has a deadline, and a lost answer is unknown."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import date
from typing import TypeVar

import httpx
import msgspec

from holdfast import observe
from holdfast.clock import Clock
from holdfast.errors import InvalidSettings, Unavailable
from holdfast.services.contracts.values import TradeEnd
from holdfast.services.payments.model import PaymentOrder
from holdfast.services.payments.needs import ForgedNotice, RefundAnswer, RefundEnd, StatementLine, TradeAnswer
from holdfast.services.payments.sandbox import SIGNATURE_HEADER, Signing, asked_of, refund_wish
from holdfast.services.payments.sandbox_book import Trade

PATH = "/api"
CONNECTIONS_MAX = 64

T = TypeVar("T")

log = observe.logger("payments")


class TradeFound(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The server's answer about a trade; none when nobody paid or closed it yet."""

    trade: Trade | None = None


class DayAsked(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """Which day's statement is wanted."""

    day: date


class StatementFound(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The server's answer to that."""

    lines: tuple[StatementLine, ...]


class SandboxRemote(Signing):
    """The provider protocol, spoken over HTTP to `holdfast sandbox-provider`; answers are believed only when signed."""

    def __init__(
        self, url: str, clock: Clock, secret: str, merchant_id: str, tolerance_ms: int, timeout_ms: int
    ) -> None:
        if not is_address(url):
            raise InvalidSettings(f"HOLDFAST_PAYMENTS__SANDBOX_URL: {url!r} is no address; write http://host:port")
        super().__init__(clock, secret, merchant_id, tolerance_ms, page=f"{url.rstrip('/')}/pay")
        self._timeout_s = timeout_ms / 1_000
        limits = httpx.Limits(max_connections=CONNECTIONS_MAX)
        self._client = httpx.AsyncClient(base_url=url, timeout=self._timeout_s, limits=limits, trust_env=False)

    async def aclose(self) -> None:
        """Close its connections."""
        await self._client.aclose()

    async def query(self, payment: PaymentOrder) -> TradeAnswer:
        found = await self._ask("query", asked_of(payment), TradeFound)
        return TradeAnswer(end=TradeEnd.UNKNOWN) if found is None else self.answer_of(found.trade)

    async def close(self, payment: PaymentOrder) -> TradeAnswer:
        found = await self._ask("close", asked_of(payment), TradeFound)
        return TradeAnswer(end=TradeEnd.UNKNOWN) if found is None else self.answer_of(found.trade)

    async def refund(self, payment: PaymentOrder, refund_id: int, amount_minor: int) -> RefundAnswer:
        answer = await self._ask("refund", refund_wish(payment, refund_id, amount_minor), RefundAnswer)
        return answer or RefundAnswer(end=RefundEnd.UNKNOWN)

    async def statement(self, day: date) -> Sequence[StatementLine]:
        found = await self._ask("statement", DayAsked(day=day), StatementFound)
        if found is None:
            raise Unavailable(f"the sandbox did not answer with its statement of {day}; ask again later")
        return found.lines

    async def _ask(self, verb: str, wish: msgspec.Struct, kind: type[T]) -> T | None:
        """Post a signed wish and read the signed answer; None when nobody knows what became of it."""
        body = msgspec.json.encode(wish)
        headers = {SIGNATURE_HEADER: self.signature(body), "content-type": "application/json"}
        try:
            async with asyncio.timeout(self._timeout_s):  # the client's own limits are for each read, not for the whole
                answer = await self._client.post(f"{PATH}/{verb}", content=body, headers=headers)
            if answer.status_code != 200:
                log.warning("provider_answered", provider=self.name, verb=verb, status=answer.status_code)
                return None
            self.verify(answer.headers.get(SIGNATURE_HEADER, ""), answer.content)
            return msgspec.json.decode(answer.content, type=kind)
        except (httpx.HTTPError, TimeoutError, msgspec.DecodeError, ForgedNotice) as error:
            log.warning("provider_unknown", provider=self.name, verb=verb, error=repr(error)[:300])
            return None


def is_address(url: str) -> bool:
    """Whether requests can be sent there."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        return False
    return parsed.scheme in ("http", "https") and bool(parsed.host)
