"""Alipay's daily statement of trades: a zip of GBK text, read into lines. Pure.

The file says of itself where it ends and how many movements it holds; one that lacks the end or any of them is refused.
"""

from __future__ import annotations

import csv
import io
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Literal

from holdfast.services.payments.alipay_wire import CNY, fen, instant_us, row_id
from holdfast.services.payments.needs import StatementLine

FILE_BYTES_MAX = 512 * 1024 * 1024  # unpacked

_TRADE_NO = "支付宝交易号"
_OUT_TRADE_NO = "商户订单号"
_KIND = "业务类型"
_DONE_AT = "完成时间"
_AMOUNT = "订单金额"
_REQUEST_NO = "退款批次号/请求号"
_COLUMNS = (_TRADE_NO, _OUT_TRADE_NO, _KIND, _DONE_AT, _AMOUNT, _REQUEST_NO)
_END = "业务明细列表结束"
_KINDS: dict[str, Literal["capture", "refund"]] = {"交易": "capture", "退款": "refund"}
# Colons and brackets are full-width ones in some statements.
_TOTAL = re.compile(r"#(交易|退款)合计[:\uff1a](\d+)笔")


class Unreadable(ValueError):
    """The statement is cut off, or not in the form that is known."""


def read_bill(archive: bytes) -> list[StatementLine]:
    """The movements of a statement as it was downloaded; raises `Unreadable`."""
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as opened:
            if sum(member.file_size for member in opened.infolist()) > FILE_BYTES_MAX:
                raise Unreadable("the statement is too large")
            texts = [opened.read(member).decode("gb18030") for member in opened.infolist()]
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, UnicodeError) as error:
        raise Unreadable(f"the statement is damaged: {type(error).__name__}") from None
    # The other file sums up by shop and counts orders; it has other columns.
    details = [text for text in texts if _TRADE_NO in text and _REQUEST_NO in text]
    if not details:
        raise Unreadable("the statement has no list of trades")
    return [line for text in details for line in _lines(text)]


def _lines(text: str) -> Iterator[StatementLine]:
    remarks = [line for line in text.split("\n") if line.startswith("#")]
    if not any(_END in remark for remark in remarks):
        raise Unreadable("the statement is cut off")
    rows = csv.reader(line for line in text.split("\n") if line.strip() and not line.startswith("#"))
    try:
        header = [re.sub(r"[(\uff08]元[)\uff09]", "", name.strip()) for name in next(rows, [])]
        places = {name: header.index(name) for name in _COLUMNS}
        counted: Counter[str] = Counter()
        for row in rows:
            cells = {name: row[place].strip() for name, place in places.items()}
            counted[cells[_KIND]] += 1
            yield _line(cells)
    except (ValueError, IndexError, KeyError, csv.Error) as error:
        raise Unreadable(f"a line of the statement makes no sense: {error}") from None
    told = {match[1]: int(match[2]) for remark in remarks if (match := _TOTAL.match(remark))}
    if any(counted[kind] != count for kind, count in told.items()):
        raise Unreadable(f"the statement tells of {told}, but holds {dict(counted)}")


def _line(cells: dict[str, str]) -> StatementLine:
    kind = _KINDS[cells[_KIND]]
    return StatementLine(
        trade_no=cells[_TRADE_NO],
        payment_id=row_id(cells[_OUT_TRADE_NO]),
        refund_id=row_id(cells[_REQUEST_NO]) or None if kind == "refund" else None,
        kind=kind,
        amount_minor=fen(cells[_AMOUNT].removeprefix("-")),
        currency=CNY,
        at_us=instant_us(cells[_DONE_AT]),
    )
