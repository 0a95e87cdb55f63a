"""`holdfast stock`: what an operator sees, books, brings in and takes out, on both databases, and what is refused."""

from __future__ import annotations

import asyncio
import csv
import io
from pathlib import Path
from typing import Any

import pytest

from holdfast.audit import audit
from holdfast.bootstrap import System, migrate_all
from holdfast.settings import Settings
from tests.conftest import StartSystem
from tests.edge.desk import Desk, ok, refused
from tests.shop import order, rows

SKUS = "sku,title,price_minor,currency\n"  # rules may be left out
SKUS_OUT = "sku,title,price_minor,currency,order_max,buyer_max,time_out_ms\n"
RECEIPTS = "key,sku,warehouse,quantity\n"


class StockDesk(Desk):
    """The same, with the commands of stock, and a folder for files."""

    def __init__(self, settings: Settings, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        super().__init__(settings, monkeypatch)
        self.folder = folder

    def stock(self, *arguments: object) -> Any:
        return self.run("stock", *arguments)

    def file(self, text: str | bytes, name: str = "given.csv") -> Path:
        path = self.folder / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    def levels(self) -> list[dict[str, Any]]:
        levels: list[dict[str, Any]] = ok(self.stock("list", "--json")).json
        return levels


@pytest.fixture
async def migrated(settings: Settings) -> Settings:
    await migrate_all(settings)
    return settings


@pytest.fixture
def desk(migrated: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StockDesk:
    return StockDesk(migrated, monkeypatch, tmp_path)


@pytest.fixture
def filled(desk: StockDesk) -> StockDesk:
    """A shop with two SKUs and ten units of the first."""
    ok(desk.stock("import", "skus", desk.file(SKUS + "TICKET,A ticket,9900,CNY\nPOSTER,Poster,500,CNY\n")))
    ok(desk.stock("receive", "TICKET", 10, "--key", "first"))
    return desk


def test_a_day_at_the_shelves(filled: StockDesk) -> None:
    assert filled.levels() == [
        {
            **{"sku": "TICKET", "warehouse": "main", "version": 1},
            **{"available": 10, "held": 0, "sold": 0, "total": 10},
        }
    ]
    again = ok(filled.stock("receive", "TICKET", 10, "--key", "first", "--json")).json  # it counts once
    assert again[0]["available"] == 10
    (more,) = ok(filled.stock("receive", "TICKET", 5, "--json")).json
    assert (more["available"], more["version"]) == (15, 2)
    adjusted = ok(filled.stock("adjust", "TICKET", "--by", -2, "--reason", "water", "--version", 2, "--json")).json
    assert adjusted[0]["available"] == 13
    counted = ok(filled.stock("count", "TICKET", 20, "--reason", "yearly", "--actor", "ann", "--json")).json
    assert (counted[0]["available"], counted[0]["total"]) == (20, 20)
    table = ok(filled.stock("list", "TICKET")).out.splitlines()
    assert table[0].split() == ["sku", "available", "held", "sold", "total", "version", "warehouse"]
    assert table[1].split() == ["TICKET", "20", "0", "0", "20", "4", "main"]

    async def booked(system: System) -> Any:
        assert (await audit(system.database, system.clock, 0)).clean
        return await rows(system, "SELECT kind, available_delta, reason, counted FROM stock_ledger ORDER BY id")

    assert filled.within(booked) == [
        {"kind": "receive", "available_delta": 10, "reason": None, "counted": None},
        {"kind": "receive", "available_delta": 5, "reason": None, "counted": None},
        {"kind": "adjust", "available_delta": -2, "reason": "water", "counted": None},
        {"kind": "count", "available_delta": 7, "reason": "yearly", "counted": 20},
    ]


def test_warehouses_are_listed_in_the_order_in_which_they_are_drawn_upon(filled: StockDesk) -> None:
    ok(filled.stock("warehouses", "north", "--priority", 5))
    assert ok(filled.stock("warehouses", "--json")).json == [
        {"code": "north", "priority": 5},
        {"code": "main", "priority": 100},
    ]
    assert ok(filled.stock("warehouses", "main", "--priority", 1)).out.split() == [
        *("priority", "warehouse"),
        *("1", "main", "5", "north"),
    ]
    refused(filled.stock("warehouses", "north"), "--priority")
    refused(filled.stock("warehouses", "no rth", "--priority", 1), "CODE")


def test_what_cannot_be_booked_is_refused_in_a_sentence(filled: StockDesk) -> None:
    before = filled.levels()
    refused(filled.stock("receive", "SKU-9", 1), "SKU-9")
    refused(filled.stock("receive", "TICKET", 0), "QUANTITY")
    refused(filled.stock("receive", "TICKET", 1, "--key", "a b"), "--key")
    refused(filled.stock("receive", "TICKET", 11, "--key", "first"), "key")
    refused(filled.stock("receive", "TIC KET", 1), "SKU")
    refused(filled.stock("receive", "TICKET", 1, "--warehouse", ""), "--warehouse")
    refused(filled.stock("adjust", "TICKET", "--by", -11, "--reason", "theft"), "10 units are available")
    refused(filled.stock("adjust", "TICKET", "--by", 0, "--reason", "theft"), "delta is 0")
    refused(filled.stock("adjust", "TICKET", "--by", 1, "--reason", ""), "--reason")
    refused(filled.stock("adjust", "TICKET", "--by", 1, "--reason", "found", "--version", 7), "version 1")
    refused(filled.stock("adjust", "POSTER", "--by", 1, "--reason", "found"), "POSTER")
    refused(filled.stock("count", "TICKET", 10**10), "COUNTED")
    refused(filled.stock("list", "SKU-9"), "SKU-9")
    assert filled.levels() == before


# --- Files ------------------------------------------------------------------------------------------------------------


def test_a_dry_run_names_every_bad_line_and_changes_nothing(filled: StockDesk) -> None:
    text = (
        "key,sku,warehouse,quantity\r\n"
        "r-1,TICKET,main,5\r\n"
        "r-2,SKU-9,main,5\r\n"
        "\r\n"
        "r-3,TICKET,main,0\r\n"
        "r-4,TICKET,main\r\n"
        "r 5,TICKET,ma in,x\r\n"
        "r-1,TICKET,main,6\r\n"
        "first,TICKET,main,11\r\n"
        "first2,TICKET,north,1_0\r\n"
    )
    before = filled.levels()
    for extra in (["--dry-run"], []):
        told = filled.stock("import", "receipts", filled.file(text), *extra, "--json")
        assert (told.code, told.err) == (1, "")
        assert [each["line"] for each in told.json["bad"]] == [3, 5, 6, 7, 8, 9, 10]
        assert (told.json["lines"], told.json["imported"], told.json["dry_run"]) == (8, 0, bool(extra))
        assert len(next(each for each in told.json["bad"] if each["line"] == 7)["errors"]) == 3
        assert filled.levels() == before
    human = filled.stock("import", "receipts", filled.file(text))
    assert human.code == 1
    assert human.err.count("\n") == 7
    assert human.err.startswith("line 3: there is no SKU 'SKU-9'")
    assert human.out == "7 of 8 lines are bad; nothing was changed\n"


def test_a_good_file_is_brought_in_once_however_often(filled: StockDesk) -> None:
    lines = "".join(f"r-{number},TICKET,{('main', 'north')[number % 2]},2\n" for number in range(1_200))
    file = filled.file("\ufeff" + RECEIPTS + lines)
    assert (
        ok(filled.stock("import", "receipts", file, "--dry-run")).out == "1200 receipts are good; nothing was changed\n"
    )
    assert sum(each["available"] for each in filled.levels()) == 10
    for _ in range(2):
        assert ok(filled.stock("import", "receipts", file, "--actor", "ann")).out == "imported 1200 receipts\n"
        assert {each["warehouse"]: each["available"] for each in filled.levels()} == {"main": 1_210, "north": 1_200}


def test_what_is_exported_can_be_imported_again(filled: StockDesk) -> None:
    title = 'A "dear", 票'
    quoted = title.replace('"', '""')
    ok(filled.stock("import", "skus", filled.file(f'{SKUS_OUT}ART,"{quoted}",1000000000000,EUR,4,2,\n')))
    out = ok(filled.stock("export", "skus")).out
    assert next(csv.DictReader(io.StringIO(out))) == {
        **{"sku": "ART", "title": title},
        **{"price_minor": "1000000000000", "currency": "EUR"},
        **{"order_max": "4", "buyer_max": "2", "time_out_ms": ""},
    }
    assert [line.split(",")[0] for line in out.splitlines()] == ["sku", "ART", "POSTER", "TICKET"]
    for what in ("skus", "receipts"):
        path = filled.folder / f"{what}.csv"
        assert ok(filled.stock("export", what, "--output", path)).out == ""
        before = filled.levels()
        ok(filled.stock("import", what, path))
        assert filled.levels() == before
        assert ok(filled.stock("export", what)).out == path.read_text(encoding="utf-8")
    levels = ok(filled.stock("export", "levels")).out.splitlines()
    assert levels == ["sku,warehouse,available,held,sold,total,version", "TICKET,main,10,0,0,10,1"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "lacks the column sku"),
        (b"sku,title,price_minor\n", "lacks the column currency"),
        (b"sku,title,price_minor,currency,colour\n", "unknown column 'colour'"),
        (b"sku,title,price_minor,currency,sku\n", "a column twice"),
        (SKUS.encode() + b"A,\xff,1,CNY\n", "not UTF-8"),
        (SKUS.encode() + b'A,"open,1,CNY\n', "no CSV"),
        (SKUS.encode() + b'A,"a"b,1,CNY\n', "no CSV"),
        (SKUS.encode() + b"A," + b"x" * 200_000 + b",1,CNY\n", "no CSV"),
    ],
    ids=["empty", "column missing", "unknown column", "column twice", "no UTF-8", "quote open", "quote odd", "huge"],
)
def test_what_is_no_such_file_is_refused(desk: StockDesk, content: bytes, says: str) -> None:
    refused(desk.stock("import", "skus", desk.file(content)), says)
    assert ok(desk.stock("export", "skus")).out == SKUS_OUT


def test_bad_values_of_skus_are_named_by_line_and_column(desk: StockDesk) -> None:
    bad = ["A B,t,1,CNY", "A,,1,CNY", "A,t,-1,CNY", "A,t,1.5,CNY", "A,t,1,cny", "A,\x1bt,1,CNY", "A,t,,CNY"]
    columns = ["sku", "title", "price_minor", "price_minor", "currency", "title", "price_minor"]
    told = desk.stock("import", "skus", desk.file(SKUS + "\n".join(bad) + "\n"), "--json").json
    assert [each["line"] for each in told["bad"]] == list(range(2, 9))
    assert [each["errors"][0].partition(":")[0] for each in told["bad"]] == columns
    assert ok(desk.stock("export", "skus")).out == SKUS_OUT


def test_a_file_that_cannot_be_read_or_written_is_refused(desk: StockDesk) -> None:
    refused(desk.stock("import", "skus", desk.folder / "nowhere.csv"), "No such file")
    refused(desk.stock("import", "skus", desk.folder), "cannot read")
    refused(desk.stock("export", "skus", "--output", desk.folder / "no" / "where.csv"), "cannot write --output")


async def test_looking_beside_a_running_shop(start_system: StartSystem, migrated: Settings, tmp_path: Path) -> None:
    """What reads works while the shop sells; what writes does so on PostgreSQL, and is refused on SQLite."""
    system = await start_system(migrated)
    monkeypatch = pytest.MonkeyPatch()
    try:
        desk = StockDesk(migrated, monkeypatch, tmp_path)
        file = desk.file(SKUS + "TICKET,A ticket,9900,CNY\n")
        assert (await asyncio.to_thread(desk.stock, "import", "skus", file, "--dry-run")).code == 0
        assert ok(await asyncio.to_thread(desk.stock, "list", "--json")).json == []
        told = await asyncio.to_thread(desk.stock, "import", "skus", file)
        if system.database.dialect == "sqlite":
            refused(told, "SQLite means one process")
        else:
            assert ok(told).out == "imported 1 skus\n"
            ok(await asyncio.to_thread(desk.stock, "receive", "TICKET", 5))
            await order(system, "ann", "TICKET", 2)
            (now,) = ok(await asyncio.to_thread(desk.stock, "list", "--json")).json
            assert (now["available"], now["held"]) == (3, 2)
    finally:
        monkeypatch.undo()


@pytest.mark.parametrize("command", ["list", "receive", "adjust", "count", "warehouses", "import", "export"])
def test_every_command_shows_an_example(desk: StockDesk, command: str) -> None:
    assert f"Example: holdfast stock {command}" in ok(desk.stock(command, "--help")).out
