"""`holdfast stock`: look at the shelves, book what came in, broke or was counted, bring SKUs and receipts in and out.

What reads opens the database read-only, beside a running server. What writes needs PostgreSQL or, on SQLite, that no
other process writes the file; there the HTTP API does the same.
"""

from __future__ import annotations

import asyncio
import csv
import secrets
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TextIO, TypeVar

import msgspec
import typer
from rich.console import Console
from rich.progress import Progress

from holdfast.bootstrap import HISTORIES, shelves_of
from holdfast.edge import stock_csv
from holdfast.edge.terminal import actor_or_user, database_of_settings, print_json, safe, table
from holdfast.errors import HoldfastError, InvalidInput
from holdfast.services.contracts.values import Code, Quantity
from holdfast.services.orders.model import IdempotencyKey
from holdfast.services.stock.model import (
    Adjustment,
    Count,
    Counted,
    Delta,
    Level,
    Priority,
    Reason,
    Receipt,
    Sku,
    Warehouse,
)
from holdfast.services.stock.service import ShelfService

T = TypeVar("T")

EXIT_BAD = 1
CHUNK = 500
LONG = 2_000  # lines of a file that takes a while

SkuName = Annotated[str, typer.Argument(metavar="SKU", help="Which SKU.")]
InWarehouse = Annotated[str, typer.Option("--warehouse", help="Where.")]
Key = Annotated[
    str | None, typer.Option("--key", help="Sent again under the same key it counts once; random if not given.")
]
Why = Annotated[str | None, typer.Option("--reason", help="Why, for the ledger.")]
Seen = Annotated[
    int | None, typer.Option("--version", help="Only if the level is at this version still, as `stock list` told.")
]
Actor = Annotated[str | None, typer.Option("--actor", help="Who does this, for the ledger; the OS user if not given.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

app = typer.Typer(
    name="stock",
    help="The shelves: list, receive, adjust, count, warehouses; import and export of CSV files.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


class Incoming(StrEnum):
    """What can be imported."""

    SKUS = "skus"
    RECEIPTS = "receipts"


class Outgoing(StrEnum):
    """What can be exported."""

    SKUS = "skus"
    RECEIPTS = "receipts"
    LEVELS = "levels"


@app.command("list", epilog="Example: holdfast stock list TICKET --json")
def list_levels(
    sku: Annotated[str | None, typer.Argument(metavar="SKU", help="Which SKU; all if not given.")] = None,
    as_json: AsJson = False,
) -> None:
    """Every level: available, held, sold, total, and the version it is at."""
    wanted = None if sku is None else _valid("SKU", sku, Code)
    _tell_levels(_ask(lambda shelves: shelves.levels(wanted)), as_json)


@app.command(epilog="Example: holdfast stock receive TICKET 100 --warehouse north --key delivery-4711")
def receive(
    sku: SkuName,
    quantity: Annotated[int, typer.Argument(metavar="QUANTITY", help="How many units came in.")],
    warehouse: InWarehouse = "main",
    key: Key = None,
    actor: Actor = None,
    as_json: AsJson = False,
) -> None:
    """Book units that came in, once per key; prints the SKU's levels."""
    receipt = Receipt(
        key=_key(key),
        sku=_valid("SKU", sku, Code),
        warehouse=_valid("--warehouse", warehouse, Code),
        quantity=_valid("QUANTITY", quantity, Quantity),
        actor=actor_or_user(actor),
    )
    _tell_levels(_change(lambda shelves: shelves.receive(receipt)), as_json)


@app.command(epilog="Example: holdfast stock adjust TICKET --by -2 --reason 'water damage' --version 17")
def adjust(
    sku: SkuName,
    by: Annotated[int, typer.Option("--by", help="How many units more; below zero, how many fewer.")],
    reason: Annotated[str, typer.Option("--reason", help="Why, for the ledger.")],
    warehouse: InWarehouse = "main",
    version: Seen = None,
    key: Key = None,
    actor: Actor = None,
    as_json: AsJson = False,
) -> None:
    """Add units or take some away, once per key; never below zero, so never what is held for orders."""
    adjustment = Adjustment(
        key=_key(key),
        sku=_valid("SKU", sku, Code),
        warehouse=_valid("--warehouse", warehouse, Code),
        delta=_valid("--by", by, Delta),
        reason=_valid("--reason", reason, Reason),
        actor=actor_or_user(actor),
        tags=_tags(version),
    )
    _tell_levels([_change(lambda shelves: shelves.adjust(adjustment))], as_json)


@app.command(epilog="Example: holdfast stock count TICKET 98 --reason 'yearly count'")
def count(
    sku: SkuName,
    counted: Annotated[int, typer.Argument(metavar="COUNTED", help="How many units lie there, held ones included.")],
    warehouse: InWarehouse = "main",
    reason: Why = None,
    version: Seen = None,
    key: Key = None,
    actor: Actor = None,
    as_json: AsJson = False,
) -> None:
    """Book the difference between what lies there and what the books say, once per key."""
    found = Count(
        key=_key(key),
        sku=_valid("SKU", sku, Code),
        warehouse=_valid("--warehouse", warehouse, Code),
        counted=_valid("COUNTED", counted, Counted),
        reason=None if reason is None else _valid("--reason", reason, Reason),
        actor=actor_or_user(actor),
        tags=_tags(version),
    )
    _tell_levels([_change(lambda shelves: shelves.count(found))], as_json)


@app.command(epilog="Example: holdfast stock warehouses north --priority 10")
def warehouses(
    code: Annotated[str | None, typer.Argument(metavar="CODE", help="Which one to create or change.")] = None,
    priority: Annotated[int | None, typer.Option("--priority", help="The lowest is drawn upon first.")] = None,
    as_json: AsJson = False,
) -> None:
    """All warehouses in the order in which they are drawn upon; with CODE and --priority, set one first."""
    if (code is None) != (priority is None):
        raise InvalidInput("to create or change a warehouse give its CODE and --priority; to see all give neither")
    if code is not None:
        wanted = Warehouse(code=_valid("CODE", code, Code), priority=_valid("--priority", priority, Priority))
        _change(lambda shelves: shelves.keep_warehouse(wanted))
    found = _ask(lambda shelves: shelves.warehouses())
    if as_json:
        print_json(found)
    else:
        table(("priority", "warehouse"), [(str(each.priority), each.code) for each in found])


# -- files ------------------------------------------------------------------------------------------------------------


@app.command("import", epilog="Example: holdfast stock import skus skus.csv --dry-run")
def bring_in(
    what: Annotated[Incoming, typer.Argument(help="skus (sku,title,price_minor,currency) or receipts (key,sku,...).")],
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="A CSV file in UTF-8 whose first line names the columns.")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check every line and change nothing.")] = False,
    actor: Actor = None,
    as_json: AsJson = False,
) -> None:
    """Bring in SKUs or receipts; when any line is bad, all bad ones are named and nothing is changed.

    A file may be brought in again: SKUs are set to what it says, receipts count once by their key.
    """
    if what is Incoming.SKUS:
        lines = stock_csv.read(file, stock_csv.SKU_COLUMNS, once="sku")
    else:
        lines = stock_csv.read(file, stock_csv.RECEIPT_COLUMNS, once="key")
    by = actor_or_user(actor)
    bad = {line.number: line.errors for line in lines if line.errors}
    if what is Incoming.RECEIPTS:
        good = [line for line in lines if not line.errors]
        bad |= _ask(lambda shelves: _refused(shelves, good, by))
    done = 0
    if not bad and not dry_run:
        bad = _change(lambda shelves: _book(shelves, what, lines, by))
        done = len(lines) - len(bad)
    _tell_import(what, len(lines), done, bad, dry_run=dry_run, as_json=as_json)
    raise typer.Exit(EXIT_BAD if bad else 0)


@app.command("export", epilog="Example: holdfast stock export levels --output levels.csv")
def bring_out(
    what: Annotated[Outgoing, typer.Argument(help="skus, receipts or levels.")],
    output: Annotated[str, typer.Option("--output", help="Where to; - for standard output.")] = "-",
) -> None:
    """Write SKUs, receipts or levels as CSV; SKUs and receipts can be imported as they are."""
    _ask(lambda shelves: _write_out(shelves, what, output))


async def _refused(shelves: ShelfService, lines: Sequence[stock_csv.Line], by: str) -> dict[int, tuple[str, ...]]:
    bad: dict[int, tuple[str, ...]] = {}
    for chunk in _chunks(lines, "checking"):
        answers = await shelves.refusals([_receipt(line, by) for line in chunk])
        for line, error in zip(chunk, answers, strict=True):
            if error is not None:
                bad[line.number] = (error.detail,)
    return bad


async def _book(
    shelves: ShelfService, what: Incoming, lines: Sequence[stock_csv.Line], by: str
) -> dict[int, tuple[str, ...]]:
    """Write all lines; answers those that somebody else made impossible since they were checked."""
    bad: dict[int, tuple[str, ...]] = {}
    for chunk in _chunks(lines, "importing"):
        answers: Sequence[Any]
        if what is Incoming.SKUS:
            answers = await shelves.keep_skus([Sku(**line.values) for line in chunk])
        else:
            answers = await shelves.receive_all([_receipt(line, by) for line in chunk])
        for line, answer in zip(chunk, answers, strict=True):
            if isinstance(answer, HoldfastError):
                bad[line.number] = (answer.detail,)
            elif isinstance(answer, Exception):
                raise answer
    return bad


async def _write_out(shelves: ShelfService, what: Outgoing, output: str) -> None:
    pages: AsyncIterator[Sequence[msgspec.Struct]]
    columns: Sequence[str]
    match what:
        case Outgoing.SKUS:
            columns, pages = tuple(stock_csv.SKU_COLUMNS), shelves.sku_pages()
        case Outgoing.RECEIPTS:
            columns, pages = (*stock_csv.RECEIPT_COLUMNS, *stock_csv.TOLD), shelves.receipt_pages()
        case Outgoing.LEVELS:
            columns, pages = stock_csv.LEVEL_COLUMNS, shelves.level_pages()
    with _opened(output) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        async for page in pages:
            writer.writerows([getattr(each, name) for name in columns] for each in page)


@contextmanager
def _opened(output: str) -> Iterator[TextIO]:
    if output == "-":
        yield sys.stdout
        return
    try:
        with Path(output).open("w", encoding="utf-8", newline="") as file:
            yield file
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "no file can have this name"
        raise InvalidInput(f"cannot write --output {output[:200]!r}: {why}") from error


def _receipt(line: stock_csv.Line, by: str) -> Receipt:
    return Receipt(**line.values, actor=by)


def _chunks(lines: Sequence[stock_csv.Line], doing: str) -> Iterator[Sequence[stock_csv.Line]]:
    """The lines in parts, with a bar for who waits at a terminal."""
    console = Console(stderr=True)
    shown = console.is_terminal and len(lines) > LONG
    with Progress(console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task(doing, total=len(lines))
        for start in range(0, len(lines), CHUNK):
            chunk = lines[start : start + CHUNK]
            yield chunk
            progress.advance(task, len(chunk))


# -- the database -----------------------------------------------------------------------------------------------------


def _ask(question: Callable[[ShelfService], Awaitable[T]]) -> T:
    return asyncio.run(_run(question, read_only=True))


def _change(work: Callable[[ShelfService], Awaitable[T]]) -> T:
    return asyncio.run(_run(work, read_only=False))


async def _run(work: Callable[[ShelfService], Awaitable[T]], *, read_only: bool) -> T:
    async with _shelves(read_only=read_only) as shelves:
        return await work(shelves)


@asynccontextmanager
async def _shelves(*, read_only: bool) -> AsyncIterator[ShelfService]:
    async with (
        database_of_settings(read_only=read_only, histories=HISTORIES) as database,
        shelves_of(database) as shelves,
    ):
        yield shelves


# -- what is given and what is printed --------------------------------------------------------------------------------


def _valid(name: str, value: Any, kind: Any) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise InvalidInput(f"{name}: {error}") from None


def _key(given: str | None) -> str:
    return f"cli-{secrets.token_hex(8)}" if given is None else _valid("--key", given, IdempotencyKey)


def _tags(version: int | None) -> frozenset[str] | None:
    return None if version is None else frozenset({str(version)})


def _tell_levels(levels: Sequence[Level], as_json: bool) -> None:
    if as_json:
        print_json(levels)
        return
    rows = [
        (each.sku, *map(str, (each.available, each.held, each.sold, each.total, each.version)), each.warehouse)
        for each in levels
    ]
    table(("sku", "available", "held", "sold", "total", "version", "warehouse"), rows)


def _tell_import(
    what: Incoming, lines: int, done: int, bad: Mapping[int, Sequence[str]], *, dry_run: bool, as_json: bool
) -> None:
    if as_json:
        told = [{"line": number, "errors": list(bad[number])} for number in sorted(bad)]
        print_json({"what": what, "lines": lines, "imported": done, "bad": told, "dry_run": dry_run})
        return
    for number in sorted(bad):
        typer.echo(f"line {number}: {safe('; '.join(bad[number]))}", err=True)
    if bad and not done:
        typer.echo(f"{len(bad)} of {lines} lines are bad; nothing was changed")
    elif dry_run:
        typer.echo(f"{lines} {what} are good; nothing was changed")
    else:
        typer.echo(f"imported {done} {what}")
