"""SKUs, receipts and levels as CSV: every line of a file is read before any is believed."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import msgspec

from holdfast.errors import InvalidInput
from holdfast.services.contracts.values import Code, Currency, Quantity
from holdfast.services.orders.model import IdempotencyKey
from holdfast.services.stock.model import TimeOut, Title, UnitPrice

LINES_MAX = 1_000_000

SKU_COLUMNS: Mapping[str, Any] = {
    "sku": Code,
    "title": Title,
    "price_minor": UnitPrice,
    "currency": Currency,
    "order_max": Quantity | None,
    "buyer_max": Quantity | None,
    "time_out_ms": TimeOut | None,
}
OPTIONAL = frozenset({"order_max", "buyer_max", "time_out_ms"})  # a column that is missing, or empty, is no rule
RECEIPT_COLUMNS: Mapping[str, Any] = {"key": IdempotencyKey, "sku": Code, "warehouse": Code, "quantity": Quantity}
TOLD = ("actor", "at")  # what an exported receipt has besides
LEVEL_COLUMNS = ("sku", "warehouse", "available", "held", "sold", "total", "version")


class Line(NamedTuple):
    """A line of a file: its number, its values by column, and what is wrong with it."""

    number: int
    values: Mapping[str, Any]
    errors: tuple[str, ...]


def read(name: str, columns: Mapping[str, Any], once: str) -> list[Line]:
    """All lines of a file, checked column by column; the column `once` has no value twice.

    Raises `InvalidInput` for what is no such file at all: unreadable, not UTF-8, other columns, too many lines.
    """
    try:
        with Path(name).open(encoding="utf-8-sig", newline="") as file:
            return list(_lines(file, columns, once))
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{name[:200]!r} is not UTF-8 at byte {error.start}") from None
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "no file can have this name"
        raise InvalidInput(f"cannot read {name[:200]!r}: {why}") from error


def _lines(file: TextIO, columns: Mapping[str, Any], once: str) -> Iterator[Line]:
    rows = csv.reader(file, strict=True)
    try:
        head = [each.strip() for each in next(rows, [])]
        _check_head(head, columns)
        first: dict[Any, int] = {}
        count = 0
        for row in rows:
            if not row:
                continue
            count += 1
            if count > LINES_MAX:
                raise InvalidInput(f"the file has more than {LINES_MAX} lines; split it")
            line = _line(rows.line_num, head, row, columns)
            value = line.values.get(once)
            if value in first:
                again = f"{once}: {value!r} stands on line {first[value]} already"
                line = line._replace(errors=(*line.errors, again))
            elif value is not None:
                first[value] = line.number
            yield line
    except csv.Error as error:
        raise InvalidInput(f"line {rows.line_num} is no CSV: {error}") from None


def _check_head(head: list[str], columns: Mapping[str, Any]) -> None:
    wanted = ", ".join(columns)
    if missing := [name for name in columns if name not in head and name not in OPTIONAL]:
        raise InvalidInput(f"the first line lacks the column {missing[0]}; it names: {wanted}")
    if other := [name for name in head if name not in columns and name not in TOLD]:
        raise InvalidInput(f"the first line has the unknown column {other[0][:40]!r}; it names: {wanted}")
    if len(set(head)) < len(head):
        raise InvalidInput("the first line names a column twice")


def _line(number: int, head: list[str], row: list[str], columns: Mapping[str, Any]) -> Line:
    if len(row) != len(head):
        return Line(number, {}, (f"{len(row)} fields instead of {len(head)}",))
    values: dict[str, Any] = {}
    errors = []
    given = dict(zip(head, row, strict=True))
    for name, kind in columns.items():
        if name in OPTIONAL and not given.get(name):
            values[name] = None
            continue
        try:
            values[name] = msgspec.convert(given[name], kind, strict=False)
        except msgspec.ValidationError as error:
            errors.append(f"{name}: {error}")
    return Line(number, values, tuple(errors))
