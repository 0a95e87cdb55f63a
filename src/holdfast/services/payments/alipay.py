"""Alipay (mainland China, yuan): pay pages on a computer, notices, queries, closing, refunds and daily statements.

Answers are believed only where Alipay signed them. Whatever else comes back, or nothing, is unknown: it is never taken
for paid, nor for unpaid.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from urllib.parse import urlencode

import httpx
import msgspec

from holdfast import observe
from holdfast.clock import US_PER_MS, US_PER_S, Clock
from holdfast.errors import InvalidInput, Unavailable
from holdfast.ids import created_ms
from holdfast.services.contracts.values import TradeEnd
from holdfast.services.payments.alipay_account import Account, read_account
from holdfast.services.payments.alipay_bill import Unreadable, read_bill
from holdfast.services.payments.alipay_signing import SIGN_TYPE, signed_content
from holdfast.services.payments.alipay_wire import (
    BEIJING,
    CLOSED,
    CNY,
    NAME,
    PAID,
    WAITING,
    Answer,
    Unverified,
    beijing,
    captured_by,
    captured_in,
    fen,
    merchant,
    plain,
    read_answer,
    read_notice,
    yuan,
)
from holdfast.services.payments.model import Capture, PaymentOrder
from holdfast.services.payments.needs import RefundAnswer, RefundEnd, StatementLine, TradeAnswer
from holdfast.settings import PaymentsSettings

PAY = "alipay.trade.page.pay"
QUERY = "alipay.trade.query"
CLOSE = "alipay.trade.close"
REFUND = "alipay.trade.refund"
REFUND_QUERY = "alipay.trade.fastpay.refund.query"
STATEMENT = "alipay.data.dataservice.bill.downloadurl.query"

NOT_EXIST = "ACQ.TRADE_NOT_EXIST"
BILL_NOT_EXIST = "isp.bill_not_exist"
# The trade is in a state that forbids closing: it is paid, or closed already, and a query says which.
NOT_CLOSABLE = frozenset(
    {
        "ACQ.REASON_ILLEGAL_STATUS",
        "ACQ.REASON_TRADE_STATUS_INVALID",
        "ACQ.TRADE_HAS_CLOSE",
        "ACQ.TRADE_HAS_FINISHED",
        "ACQ.TRADE_HAS_SUCCESS",
        "ACQ.TRADE_STATUS_ERROR",
    }
)
# The same refund will never be made. A code that is not listed says nothing; ACQ.SELLER_BALANCE_NOT_ENOUGH is left out
# because the merchant can put money in.
REFUND_IMPOSSIBLE = frozenset(
    {
        "ACQ.BUYER_ERROR",
        "ACQ.BUYER_NOT_EXIST",
        "ACQ.DISCORDANT_REPEAT_REQUEST",
        "ACQ.INVALID_PARAMETER",
        "ACQ.REASON_TRADE_REFUND_FEE_ERR",
        "ACQ.REASON_TRADE_STATUS_INVALID",
        "ACQ.REFUND_AMT_NOT_EQUAL_TOTAL",
        "ACQ.TRADE_HAS_CLOSE",
        "ACQ.TRADE_HAS_FINISHED",
        "ACQ.TRADE_NOT_ALLOW_REFUND",
        "ACQ.TRADE_NOT_EXIST",
        "ACQ.TRADE_STATUS_ERROR",
    }
)
ANSWER_BYTES_MAX = 1024 * 1024
STATEMENT_PATIENCE = 6  # a statement may be large; it takes so many times the deadline of a call
BILL_BYTES_MAX = 64 * 1024 * 1024  # packed

log = observe.logger("alipay")


class Alipay:
    """The provider protocol, spoken to Alipay's gateway."""

    name = NAME
    notice_answer = b"success"

    def __init__(self, account: Account, clock: Clock, client: httpx.AsyncClient) -> None:
        self._account = account
        self._clock = clock
        self._client = client
        self.merchant_id = merchant(account.app_id, account.seller_id)

    def pay_url(self, payment: PaymentOrder) -> str:
        """A signed link to the pay page, dead at `pay_by_us`.

        Raises `InvalidInput` for another currency than CNY, and for amounts that Alipay does not take.
        """
        if payment.currency != CNY:
            raise InvalidInput(f"Alipay takes {CNY} only, not {payment.currency}; price the SKU in {CNY}")
        business = {
            "out_trade_no": str(payment.id),
            "product_code": "FAST_INSTANT_TRADE_PAY",
            "total_amount": yuan(payment.amount_minor),
            "subject": f"{self._account.subject} {payment.order_id}",
            # Absolute: a page that is opened later, even after the order is closed, cannot be paid.
            "time_expire": beijing(payment.pay_by_us),
        }
        # The order's own instant, not that of the call: the link is the same whenever it is made.
        parameters = self._signed(PAY, business, created_ms(payment.id) * US_PER_MS, pages=True)
        return f"{self._account.gateway}?{urlencode(parameters)}"

    def verify_notice(self, headers: Mapping[str, str], raw: bytes) -> Capture | None:
        """Check a notice; None for one of a trade that waits or was closed, and of a refund."""
        del headers  # all that counts is signed, and stands in the body
        return captured_by(read_notice(raw, self._account.keys), raw)

    async def query(self, payment: PaymentOrder) -> TradeAnswer:
        try:
            async with self._deadline():
                return await self._query(payment)
        except TimeoutError:
            return self._lost(QUERY, payment)

    async def close(self, payment: PaymentOrder) -> TradeAnswer:
        try:
            async with self._deadline():
                return await self._close(payment)
        except TimeoutError:
            return self._lost(CLOSE, payment)

    async def refund(self, payment: PaymentOrder, refund_id: int, amount_minor: int) -> RefundAnswer:
        try:
            async with self._deadline():
                return await self._refund(payment, refund_id, amount_minor)
        except TimeoutError:
            self._lost(REFUND, payment)
            return RefundAnswer(end=RefundEnd.UNKNOWN)

    async def statement(self, day: date) -> Sequence[StatementLine]:
        """The trades and refunds of a day in Beijing; there is one from about nine the next morning."""
        try:
            async with self._deadline(STATEMENT_PATIENCE):
                archive = await self._bill(day)
            return () if archive is None else await asyncio.to_thread(read_bill, archive)
        except (TimeoutError, httpx.HTTPError, httpx.InvalidURL, Unreadable) as error:
            raise Unavailable(f"Alipay's statement of {day} could not be read: {error!r}") from error

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _query(self, payment: PaymentOrder) -> TradeAnswer:
        answer, raw = await self._call(QUERY, {"out_trade_no": str(payment.id)})
        if answer.failed and answer.sub_code == NOT_EXIST:
            return TradeAnswer(end=TradeEnd.OPEN)  # the buyer may still open the pay page
        if not answer.succeeded or answer.out_trade_no != str(payment.id):
            return self._unclear(QUERY, payment, answer)
        if answer.trade_status in PAID:
            return self._paid(payment, answer, raw)
        # A trade that is refunded in full is closed as well as one never paid: nobody can pay it, and no money is kept.
        ends = {WAITING: TradeEnd.OPEN, CLOSED: TradeEnd.CLOSED}
        end = ends.get(answer.trade_status)
        return self._unclear(QUERY, payment, answer) if end is None else TradeAnswer(end=end)

    def _paid(self, payment: PaymentOrder, answer: Answer, raw: bytes) -> TradeAnswer:
        try:
            return TradeAnswer(end=TradeEnd.PAID, capture=captured_in(answer, self.merchant_id, raw))
        except ValueError as error:
            malformed = str(error)
        log.error("answer_malformed", method=QUERY, payment_id=payment.id, error=malformed)
        return TradeAnswer(end=TradeEnd.UNKNOWN)

    async def _close(self, payment: PaymentOrder) -> TradeAnswer:
        answer, _ = await self._call(CLOSE, {"out_trade_no": str(payment.id)})
        if answer.succeeded and answer.out_trade_no in ("", str(payment.id)):
            return TradeAnswer(end=TradeEnd.CLOSED)
        if answer.failed and answer.sub_code == NOT_EXIST:
            # Nobody opened the pay page. Who opens it between this answer and the link's end pays a closed order, and
            # gets the money back as whoever pays too late.
            return TradeAnswer(end=TradeEnd.CLOSED)
        if answer.failed and answer.sub_code in NOT_CLOSABLE:
            found = await self._query(payment)
            return TradeAnswer(end=TradeEnd.UNKNOWN) if found.end is TradeEnd.OPEN else found
        return self._unclear(CLOSE, payment, answer)

    async def _refund(self, payment: PaymentOrder, refund_id: int, amount_minor: int) -> RefundAnswer:
        business = {
            "out_trade_no": str(payment.id),
            "out_request_no": str(refund_id),  # makes it one refund, however often it is asked for
            "refund_amount": yuan(amount_minor),
        }
        answer, _ = await self._call(REFUND, business)
        ours = answer.out_trade_no in ("", str(payment.id))
        if answer.succeeded and answer.fund_change == "Y" and ours:
            return RefundAnswer(end=RefundEnd.DONE)
        impossible = answer.failed and answer.sub_code in REFUND_IMPOSSIBLE
        if not (answer.succeeded or impossible):
            self._unclear(REFUND, payment, answer)
            return RefundAnswer(end=RefundEnd.UNKNOWN, reason=answer.sub_code or answer.code)
        # No money moved by this call. An earlier one with the same id may have moved it, and its answer been lost.
        done = await self._refunded(payment, refund_id, amount_minor)
        if done is None or done:
            return RefundAnswer(end=RefundEnd.DONE if done else RefundEnd.UNKNOWN)
        return RefundAnswer(end=RefundEnd.REFUSED if impossible else RefundEnd.UNKNOWN, reason=answer.sub_code)

    async def _refunded(self, payment: PaymentOrder, refund_id: int, amount_minor: int) -> bool | None:
        """Whether a refund is known to be made, or known not to be; None when nobody knows."""
        business = {"out_trade_no": str(payment.id), "out_request_no": str(refund_id)}
        answer, _ = await self._call(REFUND_QUERY, business)
        if answer.failed and answer.sub_code == NOT_EXIST:
            return False
        if not answer.succeeded:
            self._unclear(REFUND_QUERY, payment, answer)
            return None
        if answer.refund_status != "REFUND_SUCCESS":
            return False if not answer.refund_status else None
        try:
            facts = (answer.out_trade_no, answer.out_request_no, fen(plain(answer.refund_amount)))
        except ValueError:
            facts = ("", "", 0)
        if facts == (str(payment.id), str(refund_id), amount_minor):
            return True
        log.error("refund_differs", payment_id=payment.id, refund_id=refund_id, refunded=plain(answer.refund_amount))
        return None

    async def _bill(self, day: date) -> bytes | None:
        """The packed statement; None when Alipay has none for a day that is long over."""
        over_us = (int(datetime(day.year, day.month, day.day, tzinfo=BEIJING).timestamp()) + 86_400) * US_PER_S
        now_us = self._clock.now_us()
        if now_us < over_us:
            raise Unavailable(f"{day} has not ended in Beijing; Alipay gives its statement the next morning")
        answer, _ = await self._call(STATEMENT, {"bill_type": "trade", "bill_date": day.isoformat()})
        missing = answer.failed and answer.sub_code.lower() == BILL_NOT_EXIST
        if missing and now_us >= over_us + 86_400 * US_PER_S:
            return None
        if not answer.succeeded or not answer.bill_download_url:
            raise Unavailable(f"Alipay gives no statement of {day}: {answer.sub_code or answer.msg or 'no answer'}")
        url = answer.bill_download_url
        if self._account.encrypted:  # the file is not signed
            url = url.replace("http://", "https://", 1) if url.startswith("http://") else url
            if not url.startswith("https://"):
                raise Unavailable("Alipay's statement is not to be had over https")
        return await self._fetched("GET", url, b"", BILL_BYTES_MAX)

    async def _call(self, method: str, business: Mapping[str, str]) -> tuple[Answer, bytes]:
        """Ask the gateway; an answer without a code is none at all."""
        parameters = self._signed(method, business, self._clock.now_us())
        body = urlencode({"biz_content": parameters.pop("biz_content")}).encode()
        url = f"{self._account.gateway}?{urlencode(parameters)}"
        try:
            return read_answer(await self._fetched("POST", url, body, ANSWER_BYTES_MAX), method, self._account.keys)
        except (Unverified, httpx.HTTPError, httpx.InvalidURL, Unavailable) as error:
            log.warning("no_answer", method=method, error=f"{type(error).__name__}: {error}")
        return Answer(code=""), b""

    async def _fetched(self, method: str, url: str, body: bytes, bytes_max: int) -> bytes:
        content_type = {"content-type": "application/x-www-form-urlencoded;charset=utf-8"} if body else {}
        async with self._client.stream(method, url, content=body, headers=content_type) as response:
            if response.status_code != 200:
                raise Unavailable(f"HTTP {response.status_code}")
            parts, size = [], 0
            async for part in response.aiter_bytes():
                parts.append(part)
                size += len(part)
                if size > bytes_max:
                    raise Unavailable(f"more than {bytes_max} bytes")
        return b"".join(parts)

    def _signed(self, method: str, business: Mapping[str, str], now_us: int, *, pages: bool = False) -> dict[str, str]:
        parameters = {
            "app_id": self._account.app_id,
            "method": method,
            "format": "JSON",
            "charset": "utf-8",
            "sign_type": SIGN_TYPE,
            "timestamp": beijing(now_us),
            "version": "1.0",
            "biz_content": msgspec.json.encode(business).decode(),
        }
        if pages:
            parameters["notify_url"] = self._account.notify_url
            if self._account.return_url:
                parameters["return_url"] = self._account.return_url
        return parameters | {"sign": self._account.keys.sign(signed_content(parameters, "sign"))}

    def _deadline(self, patience: int = 1) -> asyncio.Timeout:
        return asyncio.timeout(self._account.timeout_ms * patience / 1_000)

    def _lost(self, method: str, payment: PaymentOrder) -> TradeAnswer:
        log.warning("gateway_timed_out", method=method, payment_id=payment.id)
        return TradeAnswer(end=TradeEnd.UNKNOWN)

    def _unclear(self, method: str, payment: PaymentOrder, answer: Answer) -> TradeAnswer:
        if answer.code:  # else it was told of already
            log.error(
                "answer_unclear",
                method=method,
                payment_id=payment.id,
                code=answer.code,
                sub_code=answer.sub_code,
                trade_status=answer.trade_status,
            )
        return TradeAnswer(end=TradeEnd.UNKNOWN)


def open_alipay(settings: PaymentsSettings, time_out_ms: int, clock: Clock) -> Alipay:
    """The provider with its own connections; raises `InvalidSettings` that says what to do."""
    account = read_account(settings, time_out_ms)
    # Proxies of the environment are for what is outside of this machine.
    client = httpx.AsyncClient(timeout=account.timeout_ms / 1_000, trust_env=account.encrypted)
    return Alipay(account, clock, client)
