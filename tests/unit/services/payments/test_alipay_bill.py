"""Alipay's statements: read as they are packed, refused when anything is missing."""

from __future__ import annotations

import io
import zipfile

import pytest

from holdfast.clock import US_PER_S
from holdfast.services.payments.alipay_bill import Unreadable, read_bill
from holdfast.services.payments.needs import StatementLine
from tests.servers.alipay import bill_line, bill_of

PAID = bill_line("2026112022001400000001", "262144000000000007", "交易", "88.80", "2026-11-20 10:00:07")
REFUNDED = bill_line("2026112022001400000001", "262144000000000007", "退款", "-8.80", "2026-11-20 11:00:00", "77")
FOREIGN = bill_line("2026112022001400000002", "0719141034-6418", "交易", "1.00", "2026-11-20 12:00:00")
FOREIGN_REFUND = bill_line("2026112022001400000002", "0719141034-6418", "退款", "-1.00", "2026-11-20 13:00:00", "HZ01")


def test_movements_are_read() -> None:
    assert read_bill(bill_of(PAID, REFUNDED, FOREIGN, FOREIGN_REFUND, trades=2, refunds=2)) == [
        StatementLine(
            trade_no="2026112022001400000001",
            payment_id=262144000000000007,
            kind="capture",
            amount_minor=8_880,
            currency="CNY",
            at_us=1_795_140_007 * US_PER_S,
        ),
        StatementLine(
            trade_no="2026112022001400000001",
            payment_id=262144000000000007,
            refund_id=77,
            kind="refund",
            amount_minor=880,
            currency="CNY",
            at_us=1_795_143_600 * US_PER_S,
        ),
        StatementLine(
            trade_no="2026112022001400000002",
            payment_id=0,
            kind="capture",
            amount_minor=100,
            currency="CNY",
            at_us=1_795_147_200 * US_PER_S,
        ),
        StatementLine(
            trade_no="2026112022001400000002",
            payment_id=0,
            kind="refund",
            amount_minor=100,
            currency="CNY",
            at_us=1_795_150_800 * US_PER_S,
        ),
    ]


def test_a_day_without_movements_has_no_lines() -> None:
    assert read_bill(bill_of(trades=0, refunds=0)) == []


def packed(*texts: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for number, text in enumerate(texts):
            archive.writestr(f"{number}.csv", text)
    return file.getvalue()


def flipped(archive: bytes) -> bytes:
    """The same with one bit of the packed text changed."""
    place = archive.index(b"DETAILS.csv") + 60
    return archive[:place] + bytes([archive[place] ^ 1]) + archive[place + 1 :]


@pytest.mark.parametrize(
    ("archive", "why"),
    [
        (b"", "damaged"),
        (b"no zip", "damaged"),
        (bill_of(PAID, trades=1, refunds=0)[:-30], "damaged"),
        (packed(b"\xff\xff\xff"), "damaged"),
        (packed(), "no list"),
        (packed("门店编号,交易订单总笔数".encode("gbk")), "no list"),
        (bill_of(PAID, trades=1, refunds=0, end=""), "cut off"),
        (bill_of(PAID, trades=2, refunds=0), "but holds"),
        (bill_of(PAID, trades=1, refunds=1), "but holds"),
        (bill_of(PAID, REFUNDED, trades=1, refunds=0), "but holds"),
        (bill_of(PAID.replace("交易", "转账"), trades=1, refunds=0), "no sense"),
        (bill_of(PAID.replace("88.80", "88.8.0"), trades=1, refunds=0), "no sense"),
        (bill_of(PAID.replace("10:00:07", "25:00:07"), trades=1, refunds=0), "no sense"),
        (bill_of(PAID[:60], trades=1, refunds=0), "no sense"),
    ],
)
def test_statements_that_lack_anything_are_refused(archive: bytes, why: str) -> None:
    with pytest.raises(Unreadable, match=why):
        read_bill(archive)


def test_a_damaged_archive_is_refused() -> None:
    with pytest.raises(Unreadable):
        read_bill(flipped(bill_of(PAID, trades=1, refunds=0)))
