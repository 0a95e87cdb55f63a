"""How Alipay writes things: yuan, Beijing time, notices and answers, read strictly. Pure, apart from the signature."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from urllib.parse import parse_qsl

import msgspec

from holdfast.clock import US_PER_S, microseconds
from holdfast.errors import InvalidInput
from holdfast.ids import ID_MAX
from holdfast.services.contracts.values import Currency
from holdfast.services.payments.alipay_signing import SIGN_TYPE, Keys, signed_content
from holdfast.services.payments.model import Capture, Token
from holdfast.services.payments.needs import ForgedNotice

NAME = "alipay"
CNY = "CNY"
FEN_PER_YUAN = 100
AMOUNT_MINOR_MIN, AMOUNT_MINOR_MAX = 1, 100_000_000 * FEN_PER_YUAN  # 0.01 to 100,000,000.00 yuan
NOTICE_FIELDS_MAX = 100

BEIJING = timezone(timedelta(hours=8))
_TIME = "%Y-%m-%d %H:%M:%S"
_YUAN = re.compile(r"(\d{1,10})(?:\.(\d{1,2}))?", re.ASCII)

PAID = frozenset({"TRADE_SUCCESS", "TRADE_FINISHED"})
CLOSED = "TRADE_CLOSED"
WAITING = "WAIT_BUYER_PAY"


def merchant(app_id: str, seller_id: str) -> str:
    """Account and app as one text: a capture for another app or another seller names another merchant."""
    return f"{app_id}/{seller_id}"


def yuan(amount_minor: int) -> str:
    """Write fen as yuan with two places, exactly; raises `InvalidInput` outside of what Alipay takes."""
    if not AMOUNT_MINOR_MIN <= amount_minor <= AMOUNT_MINOR_MAX:
        raise InvalidInput(f"Alipay takes 0.01 to 100000000.00 yuan at once, not {amount_minor} fen")
    return f"{amount_minor // FEN_PER_YUAN}.{amount_minor % FEN_PER_YUAN:02d}"


def fen(text: str) -> int:
    """Read yuan with at most two places as fen, exactly; raises `ValueError`."""
    match = _YUAN.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no amount in yuan")
    return int(match[1]) * FEN_PER_YUAN + int((match[2] or "").ljust(2, "0"))


def beijing(instant_us: int) -> str:
    """Write an instant in Beijing time, whole seconds, never later than it is."""
    return datetime.fromtimestamp(instant_us // US_PER_S, UTC).astimezone(BEIJING).strftime(_TIME)


def instant_us(text: str) -> int:
    """Read Beijing time; raises `ValueError`."""
    return microseconds(datetime.strptime(text, _TIME).replace(tzinfo=BEIJING))


def row_id(text: str) -> int:
    """An id of ours; 0, which is none, for what other systems of the merchant call their trades."""
    if not re.fullmatch(r"[1-9]\d{0,18}", text, re.ASCII):
        return 0
    return int(text) if int(text) <= ID_MAX else 0


# --- Notices ----------------------------------------------------------------------------------------------------------


class Notice(msgspec.Struct, frozen=True, kw_only=True):
    """The parameters of a notice that mean something here."""

    notify_id: Token
    app_id: str
    out_trade_no: str
    trade_status: str
    trade_no: str = ""
    seller_id: str = ""
    total_amount: str = ""
    gmt_payment: str = ""
    gmt_refund: str = ""
    refund_fee: str = ""
    trans_currency: str = ""


def read_notice(raw: bytes, keys: Keys) -> Notice:
    """Check that Alipay signed these parameters, over their decoded text; raises `ForgedNotice`."""
    try:
        pairs = parse_qsl(
            raw.decode("ascii"),
            keep_blank_values=True,
            strict_parsing=True,
            errors="strict",
            max_num_fields=NOTICE_FIELDS_MAX,
        )
    except ValueError:
        raise ForgedNotice("the notice is no form in UTF-8") from None
    parameters = dict(pairs)
    if len(parameters) != len(pairs):
        raise ForgedNotice("a parameter of the notice stands there twice")
    if parameters.get("sign_type") != SIGN_TYPE:
        raise ForgedNotice(f"a notice must be signed by {SIGN_TYPE}")
    content = signed_content(parameters, "sign", "sign_type")
    if not keys.signed_by_alipay(content, parameters.get("sign", "")):
        raise ForgedNotice("the signature does not fit the parameters")
    try:
        return msgspec.convert(parameters, Notice)
    except msgspec.ValidationError as error:
        raise ForgedNotice(f"the notice is malformed: {error}") from None


def captured_by(notice: Notice, raw: bytes) -> Capture | None:
    """The capture that a genuine notice tells of; None for trades that wait or were closed, and for refunds.

    A trade's further notices (each refund, the end of the time for refunds) repeat `TRADE_SUCCESS` or
    `TRADE_FINISHED`: what names a refund is none, and the rest is the same capture under another event id.
    """
    try:
        refunded = bool(notice.gmt_refund) or (notice.refund_fee and fen(notice.refund_fee))
        if notice.trade_status not in PAID or refunded:
            return None
        return _capture(
            event_id=notice.notify_id,
            merchant_id=merchant(notice.app_id, notice.seller_id),
            out_trade_no=notice.out_trade_no,
            trade_no=notice.trade_no,
            total_amount=notice.total_amount,
            currency=notice.trans_currency or CNY,
            paid_at=notice.gmt_payment,
            raw=raw,
        )
    except ValueError as error:
        raise ForgedNotice(f"the notice is malformed: {error}") from None


# --- Answers ----------------------------------------------------------------------------------------------------------


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What the gateway answers, as far as it means something here; amounts come as text or as numbers."""

    code: str
    msg: str = ""
    sub_code: str = ""
    sub_msg: str = ""
    out_trade_no: str = ""
    trade_no: str = ""
    trade_status: str = ""
    total_amount: Decimal | None = None
    trans_currency: str = ""
    send_pay_date: str = ""
    fund_change: str = ""
    out_request_no: str = ""
    refund_status: str = ""
    refund_amount: Decimal | None = None
    bill_download_url: str = ""

    @property
    def succeeded(self) -> bool:
        return self.code == "10000"

    @property
    def failed(self) -> bool:
        """Whether the business said no, for the reason of `sub_code`; anything else says nothing about the trade."""
        return self.code == "40004"


class Unverified(ValueError):
    """An answer that Alipay did not sign, or not in a form that is known: it says nothing."""


def read_answer(body: bytes, method: str, keys: Keys) -> tuple[Answer, bytes]:
    """The answer to a call and its signed bytes; raises `Unverified`.

    The signature is checked over the object as it stands in the body, and only bytes that fit it are read.
    """
    try:
        envelope = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        content = bytes(envelope[method.replace(".", "_") + "_response"])  # an `error_response` has no use here
        signature = msgspec.json.decode(envelope["sign"], type=str)
        # Some of Alipay's systems sign before their JSON writer escapes slashes; its own libraries try both as well.
        for signed in (content, content.replace(b"\\/", b"/")):
            if keys.signed_by_alipay(signed, signature):
                return msgspec.json.decode(signed, type=Answer), signed
    except (msgspec.MsgspecError, KeyError, ValueError, RecursionError) as error:
        raise Unverified(f"the answer is not as it should be: {type(error).__name__}") from None
    raise Unverified("the signature does not fit the answer")


def captured_in(answer: Answer, merchant_id: str, raw: bytes) -> Capture:
    """The capture that a paid trade's answer tells of; raises `ValueError` where it is malformed."""
    return _capture(
        event_id=f"query-{answer.trade_no}",
        merchant_id=merchant_id,
        out_trade_no=answer.out_trade_no,
        trade_no=answer.trade_no,
        total_amount=plain(answer.total_amount),
        currency=answer.trans_currency or CNY,
        paid_at=answer.send_pay_date,
        raw=raw,
    )


def plain(amount: Decimal | None) -> str:
    """An amount as text; empty where there is none."""
    return "" if amount is None else str(amount)


class _Facts(msgspec.Struct):
    event_id: Token
    trade_no: Token
    currency: Currency


def _capture(
    *,
    event_id: str,
    merchant_id: str,
    out_trade_no: str,
    trade_no: str,
    total_amount: str,
    currency: str,
    paid_at: str,
    raw: bytes,
) -> Capture:
    # A malformed fact is a ValueError like any other here: msgspec's ValidationError is one.
    msgspec.convert({"event_id": event_id, "trade_no": trade_no, "currency": currency}, _Facts)
    return Capture(
        provider=NAME,
        event_id=event_id,
        merchant_id=merchant_id,
        payment_id=row_id(out_trade_no),
        trade_no=trade_no,
        amount_minor=fen(total_amount),
        currency=currency,
        captured_us=instant_us(paid_at),
        raw=raw,
    )
