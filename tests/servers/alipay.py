"""Alipay for tests: a gateway on a free port with a book of trades, that checks and signs by Alipay's own library.

It does what the documentation of the real one says, and what it is told to do wrong.
"""

from __future__ import annotations

import io
import json
import re
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from alipay.aop.api.util.SignatureUtils import get_sign_content, sign_with_rsa2, verify_with_rsa

from holdfast.clock import US_PER_S, Clock
from holdfast.services.payments.alipay_account import Account
from holdfast.services.payments.alipay_signing import read_keys
from holdfast.settings import PaymentsSettings, Secret
from tests.servers.alipay_keys import ALIPAY_PRIVATE, ALIPAY_PUBLIC, APP_PRIVATE, APP_PUBLIC

APP_ID = "2014072300007148"
SELLER_ID = "2088102116773037"
NOTIFY_URL = "https://shop.example/v1/notices/alipay"
RETURN_URL = "https://shop.example/thanks"
BEIJING = timezone(timedelta(hours=8))

Params = dict[str, str]
Body = dict[str, Any]


def bare(pem: str) -> str:
    """A key as Alipay's library wants it: base64 without the lines around it."""
    return "".join(line for line in pem.splitlines() if not line.startswith("-----"))


def settings_of(gateway: str, **changes: Any) -> PaymentsSettings:
    """Settings of a shop that is paid over this gateway."""
    given: dict[str, Any] = {
        "provider": "alipay",
        "alipay_app_id": APP_ID,
        "alipay_seller_id": SELLER_ID,
        "alipay_private_key": Secret(APP_PRIVATE),
        "alipay_public_key": ALIPAY_PUBLIC,
        "alipay_gateway": gateway,
        "alipay_notify_url": NOTIFY_URL,
        "alipay_return_url": RETURN_URL,
        "sweep_ms": 500,
    }
    return PaymentsSettings(**{**given, **changes})


def account_of(gateway: str, timeout_ms: int = 10_000) -> Account:
    return Account(
        app_id=APP_ID,
        seller_id=SELLER_ID,
        keys=read_keys(Secret(APP_PRIVATE), ALIPAY_PUBLIC),
        gateway=gateway,
        notify_url=NOTIFY_URL,
        return_url=RETURN_URL,
        subject="Order",
        timeout_ms=timeout_ms,
    )


def signed_form(params: Mapping[str, str], private_key: str = ALIPAY_PRIVATE) -> bytes:
    """A notice as Alipay posts it, signed by its own library."""
    content = get_sign_content({name: value for name, value in params.items() if name not in ("sign", "sign_type")})
    signature = sign_with_rsa2(bare(private_key), content, "utf-8")
    return urlencode({**params, "sign": signature, "sign_type": params.get("sign_type", "RSA2")}).encode()


class Gateway:
    """The book, and what the gateway is told to do wrong; `asked` is the log of its calls."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.url = ""
        self.asked: list[tuple[str, Body]] = []
        self.trades: dict[str, Body] = {}
        self.refunds: dict[tuple[str, str], str] = {}
        self.bills: dict[str, bytes] = {}
        self.raw_answers: dict[str, Callable[[bytes], tuple[int, bytes]]] = {}  # what becomes of an answer, by method
        self.instead: dict[str, Body] = {}  # what is answered in place of anything else, by method
        self.after: dict[str, Callable[[], object]] = {}  # what happens between a call's effect and its answer
        self.silent: set[str] = set()  # methods that take effect, but whose answers never come
        self.released = threading.Event()
        self._noticed = 0

    # --- The buyer ----------------------------------------------------------------------------------------------------

    def open_page(self, pay_url: str) -> str:
        """The buyer opens the pay page: the link is checked, and the trade exists from now on."""
        base, _, query = pay_url.partition("?")
        assert base == self.url
        params = self._checked(query)
        assert params["method"] == "alipay.trade.page.pay"
        assert (params["notify_url"], params["return_url"]) == (NOTIFY_URL, RETURN_URL)
        business = json.loads(params["biz_content"])
        assert business["product_code"] == "FAST_INSTANT_TRADE_PAY"
        number = str(business["out_trade_no"])
        expires = datetime.strptime(business["time_expire"], "%Y-%m-%d %H:%M:%S").replace(tzinfo=BEIJING)
        if self.clock.now_us() >= expires.timestamp() * US_PER_S:
            raise PageDead
        fresh = {"status": "WAIT_BUYER_PAY", "total_amount": business["total_amount"], "subject": business["subject"]}
        self.trades.setdefault(number, {**fresh, "trade_no": f"20261121220014{len(self.trades):014d}"})
        return number

    def pay(self, pay_url: str) -> bytes:
        """The buyer pays; answers the notice, which is not delivered yet."""
        number = self.open_page(pay_url)
        trade = self.trades[number]
        if trade["status"] == "TRADE_CLOSED":
            raise PageDead
        trade |= {"status": "TRADE_SUCCESS", "paid_at": self.now()}
        return self.notice(number)

    def now(self) -> str:
        return datetime.fromtimestamp(self.clock.now_us() // US_PER_S, BEIJING).strftime("%Y-%m-%d %H:%M:%S")

    def notice_params(self, number: str, **changes: str) -> Params:
        """The parameters of a notice about a trade as it stands now."""
        trade = self.trades[number]
        self._noticed += 1
        params = {
            "notify_id": f"ac05099524730693a8b330c5ecf72da{self._noticed:04d}",
            "notify_type": "trade_status_sync",
            "notify_time": self.now(),
            "app_id": APP_ID,
            "charset": "utf-8",
            "version": "1.0",
            "auth_app_id": APP_ID,
            "trade_no": trade["trade_no"],
            "out_trade_no": number,
            "buyer_id": "2088102122524333",
            "seller_id": SELLER_ID,
            "trade_status": trade["status"],
            "total_amount": trade["total_amount"],
            "receipt_amount": trade["total_amount"],
            "subject": f"{trade['subject']} & 大乐透+2.1",
            "body": "",
            "gmt_create": self.now(),
            "fund_bill_list": '[{"amount":"1.00","fundChannel":"ALIPAYACCOUNT"}]',
        }
        if "paid_at" in trade:
            params["gmt_payment"] = trade["paid_at"]
        return {**params, **changes}

    def notice(self, number: str, **changes: str) -> bytes:
        return signed_form(self.notice_params(number, **changes))

    # --- The gateway --------------------------------------------------------------------------------------------------

    def answer(self, query: str, body: str) -> tuple[int, bytes]:
        """Check a request as the real gateway does, act on it and sign the answer."""
        params = self._checked(query, body)
        method = params["method"]
        business = json.loads(params["biz_content"])
        self.asked.append((method, business))
        effects = {
            "alipay.trade.query": self._query,
            "alipay.trade.close": self._close,
            "alipay.trade.refund": self._refund,
            "alipay.trade.fastpay.refund.query": self._refund_query,
            "alipay.data.dataservice.bill.downloadurl.query": self._bill,
        }
        found = self.instead.get(method) or effects[method](business)
        if method in self.after:
            self.after.pop(method)()
        if method in self.silent:
            self.released.wait(30)
        raw = self.signed_answer(method, found)
        return self.raw_answers[method](raw) if method in self.raw_answers else (200, raw)

    def signed_answer(self, method: str, found: Body, private_key: str = ALIPAY_PRIVATE) -> bytes:
        content = json.dumps(found, ensure_ascii=False, separators=(",", ":"))
        signature = sign_with_rsa2(bare(private_key), content, "utf-8")
        return f'{{"{method.replace(".", "_")}_response":{content},"sign":"{signature}"}}'.encode()

    def count(self, method: str) -> int:
        return sum(1 for each, _ in self.asked if each == method)

    def _checked(self, query: str, body: str = "") -> Params:
        """The parameters of a request whose signature Alipay's own library has checked."""
        assert "biz_content" not in query or not body
        pairs = [*parse_qsl(query, keep_blank_values=True), *parse_qsl(body, keep_blank_values=True)]
        params = dict(pairs)
        assert len(params) == len(pairs)
        signature = params.pop("sign")
        content = get_sign_content(params)
        assert verify_with_rsa(bare(APP_PUBLIC), content.encode(), signature)
        common = {name: params[name] for name in ("app_id", "charset", "format", "sign_type", "version")}
        assert common == {"app_id": APP_ID, "charset": "utf-8", "format": "JSON", "sign_type": "RSA2", "version": "1.0"}
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", params["timestamp"])
        return params

    def _query(self, business: Body) -> Body:
        trade = self.trades.get(business["out_trade_no"])
        if trade is None:
            return failure("ACQ.TRADE_NOT_EXIST")
        found = success(
            out_trade_no=business["out_trade_no"],
            trade_no=trade["trade_no"],
            trade_status=trade["status"],
            total_amount=trade["total_amount"],
            buyer_user_type="PRIVATE",
        )
        return {**found, "send_pay_date": trade["paid_at"]} if "paid_at" in trade else found

    def _close(self, business: Body) -> Body:
        trade = self.trades.get(business["out_trade_no"])
        if trade is None:
            return failure("ACQ.TRADE_NOT_EXIST")
        if trade["status"] != "WAIT_BUYER_PAY":
            return failure("ACQ.TRADE_STATUS_ERROR")
        trade["status"] = "TRADE_CLOSED"
        return success(out_trade_no=business["out_trade_no"], trade_no=trade["trade_no"])

    def _refund(self, business: Body) -> Body:
        number, request = business["out_trade_no"], business["out_request_no"]
        trade = self.trades.get(number)
        if trade is None:
            return failure("ACQ.TRADE_NOT_EXIST")
        made = self.refunds.get((number, request))
        if made is None and trade["status"] != "TRADE_SUCCESS":
            return failure("ACQ.TRADE_STATUS_ERROR")
        if made not in (None, business["refund_amount"]):
            return failure("ACQ.DISCORDANT_REPEAT_REQUEST")
        self.refunds[number, request] = business["refund_amount"]
        total = sum(round(float(amount) * 100) for (of, _), amount in self.refunds.items() if of == number)
        if total == round(float(trade["total_amount"]) * 100):
            trade["status"] = "TRADE_CLOSED"
        return success(
            out_trade_no=number,
            trade_no=trade["trade_no"],
            fund_change="Y" if made is None else "N",
            refund_fee=f"{total / 100:.2f}",
        )

    def _refund_query(self, business: Body) -> Body:
        number, request = business["out_trade_no"], business["out_request_no"]
        if number not in self.trades:
            return failure("ACQ.TRADE_NOT_EXIST")
        if (number, request) not in self.refunds:
            return success()
        return success(
            out_trade_no=number,
            out_request_no=request,
            refund_status="REFUND_SUCCESS",
            refund_amount=self.refunds[number, request],
            total_amount=self.trades[number]["total_amount"],
        )

    def _bill(self, business: Body) -> Body:
        assert business["bill_type"] == "trade"
        if business["bill_date"] not in self.bills:
            return failure("isp.bill_not_exist")
        return success(bill_download_url=f"{self.url.removesuffix('/gateway.do')}/bill/{business['bill_date']}")


class PageDead(Exception):
    """The pay page tells the buyer that this trade cannot be paid."""


def success(**fields: Any) -> Body:
    return {"code": "10000", "msg": "Success", **fields}


def failure(sub_code: str) -> Body:
    return {"code": "40004", "msg": "Business Failed", "sub_code": sub_code, "sub_msg": "业务/失败"}


def bill_of(*lines: str, trades: int, refunds: int, end: str = "#----业务明细列表结束----") -> bytes:
    """A packed statement as Alipay makes it: GBK, two files, names in GBK too."""
    header = (
        "支付宝交易号,商户订单号,业务类型,商品名称,创建时间,完成时间,门店编号,门店名称,操作员,终端号,对方账户,"
        "订单金额\uff08元\uff09,商家实收\uff08元\uff09,支付宝红包\uff08元\uff09,集分宝\uff08元\uff09,"
        "支付宝优惠\uff08元\uff09,商家优惠\uff08元\uff09,券核销金额\uff08元\uff09,券名称,商家红包消费金额\uff08元\uff09,"
        "卡消费金额\uff08元\uff09,退款批次号/请求号,服务费\uff08元\uff09,分润\uff08元\uff09,备注"
    )
    head = ["#支付宝业务明细查询", "#账号\uff1a[2088102116773037]", "#----业务明细列表----", header]
    tail = [
        end,
        f"#交易合计\uff1a{trades}笔\uff0c商家实收共1.00元",
        f"#退款合计\uff1a{refunds}笔\uff0c商家实收共0.00元",
    ]
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("20881021_DETAILS.csv", "\r\n".join([*head, *lines, *tail]).encode("gbk"))
        archive.writestr("20881021_SUMMARY.csv", "#支付宝业务汇总查询\r\n门店编号,交易订单总笔数\r\n".encode("gbk"))
    return packed.getvalue()


def bill_line(trade_no: str, number: str, kind: str, amount: str, done_at: str, request: str = "") -> str:
    cells = [f"{trade_no}\t", f"{number}\t", f"{kind}\t", '"Order, 1"', "2026-11-20 09:59:00", done_at]
    cells += ["\t"] * 4 + ["buy***@example.com\t", amount, amount, *["0.00"] * 5, "", "0.00", "0.00", f"{request}\t"]
    return ",".join([*cells, "-0.01", "0.00", ""])


@contextmanager
def serving(gateway: Gateway) -> Iterator[Gateway]:
    """Serve it on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"])).decode()
            try:
                assert self.headers["content-type"] == "application/x-www-form-urlencoded;charset=utf-8"
                self._send(*gateway.answer(urlsplit(self.path).query, body))
            except AssertionError:
                self._send(400, b"the request is not as it should be")

        def do_GET(self) -> None:
            found = gateway.bills.get(self.path.removeprefix("/bill/"))
            self._send(404 if found is None else 200, found or b"")

        def _send(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """A client that hung up is no news here."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    gateway.url = f"http://127.0.0.1:{server.server_port}/gateway.do"
    try:
        yield gateway
    finally:
        gateway.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
