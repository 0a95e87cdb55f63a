"""Places per second and settled orders per second over HTTP: holdfast with group commit on and off, and two baselines.

Every system runs as one server process on an empty database, takes the same load from `benchmarks.buyers` in another
process, and does so in turn, round after round; the figures are medians, the ratios are taken within this one run.

*Placed* counts acknowledged orders. *Settled* counts orders that are paid and whose stock is deducted, and its clock
stops only when the last one is: holdfast does that by messages after it has acknowledged the notice, the baselines
within the notice's own transaction. holdfast's two hottest routes are plain ASGI; the baselines pay for FastAPI.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import secrets
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import asyncpg
from sqlalchemy import make_url

from holdfast.clock import SystemClock
from holdfast.edge.http.auth import SCOPES, Tokens
from tests.servers.postgres import PostgresServer

TOKEN_SECRET = secrets.token_urlsafe(48)
NOTICE_SECRET = secrets.token_urlsafe(48)
SETTLE_DEADLINE_S = 120.0
LIBRARIES = ("sqlalchemy", "asyncpg", "aiosqlite", "litestar", "fastapi", "uvicorn", "uvloop", "msgspec")


@dataclass(frozen=True)
class Figure:
    """One measured load."""

    placed_per_s: float
    settled_per_s: float
    place_p50_ms: float
    place_p99_ms: float
    generator_share: float  # of the elapsed time; near 1.0 means that the generator set the pace
    probe_s: float  # for a fixed piece of work: tells a slow moment of the machine from a slow system


@dataclass
class Cell:
    """All rounds of one system on one database with one number of SKUs."""

    system: str
    database: str
    skus: int
    figures: list[Figure] = field(default_factory=list)

    def median(self, name: str) -> float:
        return float(statistics.median(getattr(figure, name) for figure in self.figures))


class Holdfast:
    """This product, as `holdfast serve` with its workers in the same process."""

    settles_later = True  # by messages, after the notice was acknowledged

    def __init__(self, name: str, batch_max: int) -> None:
        self.name = name
        self._batch_max = batch_max

    @contextmanager
    def running(self, url: str, skus: int, units: int) -> Iterator[int]:
        """Migrate, serve and stock up; gives the port."""
        environment = os.environ | {
            "HOLDFAST_DATABASE": url,
            "HOLDFAST_DATABASE__BATCH_MAX": str(self._batch_max),
            "HOLDFAST_PAYMENTS__SANDBOX": "true",
            "HOLDFAST_PAYMENTS__SANDBOX_SECRET": NOTICE_SECRET,
            "HOLDFAST_HTTP__TOKEN_SECRET": TOKEN_SECRET,
            "HOLDFAST_LOG__LEVEL": "warning",
        }
        holdfast = [sys.executable, "-m", "holdfast"]
        subprocess.run([*holdfast, "migrate"], env=environment, check=True, stdout=subprocess.DEVNULL)
        command = [*holdfast, "serve", "--port", "0"]
        with _process(command, environment, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            port = int(process.stdout.readline().rsplit(":", 1)[1])
            self._stock_up(port, skus, units)
            yield port

    async def unsettled(self, url: str) -> int:
        """Orders that are not paid yet or whose stock is not deducted yet."""
        pending = "SELECT count(*) FROM order_order WHERE status = 'pending_payment'"
        held = "SELECT count(*) FROM stock_task_detail WHERE status = 1"
        return await _count(url, pending) + await _count(url, held)

    def _stock_up(self, port: int, skus: int, units: int) -> None:
        token = Tokens(TOKEN_SECRET, SystemClock()).issue("bench", frozenset(SCOPES), 3_600)
        for number in range(1, skus + 1):
            sku = f"SKU-{number:02d}"
            body = {"title": sku, "priceMinor": 1_000, "currency": "CNY"}
            _send("PUT", port, f"/v1/skus/{sku}", token, body)
            _send("POST", port, "/v1/stocks/receipts", token, {"sku": sku, "quantity": units})


class Baseline:
    """The hand-rolled service of `benchmarks/baseline`, in one of its two styles."""

    settles_later = False

    def __init__(self, name: str, style: str) -> None:
        self.name = name
        self._style = style

    @contextmanager
    def running(self, url: str, skus: int, units: int) -> Iterator[int]:
        """Serve; it creates its tables and stock by itself. Gives the port."""
        environment = os.environ | {
            "BASELINE_DATABASE": url.replace("sqlite:///", "sqlite+aiosqlite:///"),
            "BASELINE_TOKEN_SECRET": TOKEN_SECRET,
            "BASELINE_NOTICE_SECRET": NOTICE_SECRET,
            "BASELINE_STYLE": self._style,
            "BASELINE_SKUS": str(skus),
            "BASELINE_UNITS": str(units),
        }
        command = [sys.executable, "-m", "uvicorn", "benchmarks.baseline.app:app", "--port", "0", "--loop", "uvloop"]
        command += ["--http", "httptools", "--no-access-log"]
        with _process(command, environment, stderr=subprocess.PIPE) as process:
            assert process.stderr is not None
            for line in process.stderr:
                if "running on http://" in line:
                    yield int(line.split("running on http://")[1].split()[0].rsplit(":", 1)[1])
                    return
            raise RuntimeError("the baseline did not start")

    async def unsettled(self, url: str) -> int:
        """It settles within the notice, so an unpaid order is all there can be."""
        return await _count(url, "SELECT count(*) FROM orders WHERE status <> 'paid'")


System = Holdfast | Baseline
SYSTEMS: tuple[System, ...] = (
    Holdfast("holdfast", batch_max=200),
    Holdfast("holdfast, group commit off", batch_max=1),
    Baseline("FastAPI + SQLAlchemy ORM", "orm"),
    Baseline("the same tuned, on Core", "core"),
)
BASELINES = tuple(system.name for system in SYSTEMS if isinstance(system, Baseline))


def measure(system: System, url: str, goal: str, options: argparse.Namespace, skus: int) -> Figure:
    """Run one load against one system on an empty database."""
    units = options.buyers + options.warmup
    with system.running(url, skus, units) as port:
        environment = os.environ | {"BENCH_TOKEN_SECRET": TOKEN_SECRET, "BENCH_NOTICE_SECRET": NOTICE_SECRET}
        command = [sys.executable, "-m", "benchmarks.buyers", "--port", str(port), "--goal", goal, "--sample", "0"]
        command += ["--buyers", str(options.buyers), "--warmup", str(options.warmup), "--skus", str(skus)]
        command += ["--connections", str(options.connections)]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        answer = json.loads(done.stdout)
        load = answer["load"]
        wanted = "paid" if goal == "settle" else "placed"
        if load["outcomes"] != {wanted: options.buyers}:
            raise RuntimeError(f"{system.name}: not every buyer ended {wanted}: {load['outcomes']} {load['failures']}")
        lag = 0.0
        if goal == "settle" and system.settles_later:
            asyncio.run(_settled(system, url))
            lag = time.monotonic() - load["ended_monotonic"]  # one clock for all processes of a Linux machine
    elapsed = load["elapsed_seconds"]
    return Figure(
        placed_per_s=options.buyers / elapsed,
        settled_per_s=options.buyers / (elapsed + lag) if goal == "settle" else 0.0,
        place_p50_ms=load["steps"]["place"]["p50_ms"],
        place_p99_ms=load["steps"]["place"]["p99_ms"],
        generator_share=load["generator_cpu_seconds"] / elapsed,
        probe_s=answer["probe_seconds"],
    )


def run(options: argparse.Namespace) -> list[tuple[str, Cell]]:
    """All rounds; answers (goal, cell)."""
    cells: dict[tuple[str, str, str, int], Cell] = {}
    with PostgresServer() as server, tempfile.TemporaryDirectory() as folder:
        for round_number in range(options.rounds):
            for database in options.databases:
                for skus in options.skus:
                    for goal in ("place", "settle"):
                        for system in SYSTEMS:
                            url = _empty(database, server, Path(folder))
                            figure = measure(system, url, goal, options, skus)
                            key = (goal, database, system.name, skus)
                            cells.setdefault(key, Cell(system.name, database, skus)).figures.append(figure)
                            _progress(round_number, key, figure)
    return [(key[0], cell) for key, cell in cells.items()]


def report(measured: list[tuple[str, Cell]], options: argparse.Namespace) -> str:
    """The table, with ratios against both baselines on the same database, SKUs and goal."""
    lines = [
        f"{options.buyers} buyers, {options.connections} at a time, {options.rounds} rounds, medians; "
        f"{os.cpu_count()} cores, Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, "
        + ", ".join(f"{name} {version(name)}" for name in LIBRARIES),
        "",
        "| database | SKUs | system | placed/s | x ORM | x tuned | settled/s | x ORM | x tuned | p50 ms | p99 ms |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    by_key = {(goal, cell.database, cell.skus, cell.system): cell for goal, cell in measured}
    for goal, cell in measured:
        if goal != "settle":
            continue
        beside = (cell.database, cell.skus)
        placed = by_key["place", *beside, cell.system].median("placed_per_s")
        settled = cell.median("settled_per_s")
        of_placed = [placed / by_key["place", *beside, name].median("placed_per_s") for name in BASELINES]
        of_settled = [settled / by_key["settle", *beside, name].median("settled_per_s") for name in BASELINES]
        columns = [cell.database, cell.skus, cell.system]
        columns += [f"{placed:,.0f}", *(f"{ratio:.1f}" for ratio in of_placed)]
        columns += [f"{settled:,.0f}", *(f"{ratio:.1f}" for ratio in of_settled)]
        columns += [f"{cell.median('place_p50_ms'):.1f}", f"{cell.median('place_p99_ms'):.1f}"]
        lines.append(f"| {' | '.join(map(str, columns))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_orders", description=__doc__)
    parser.add_argument("--buyers", type=int, default=3_000)
    parser.add_argument("--warmup", type=int, default=300)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skus", type=int, nargs="+", default=[100, 1])
    parser.add_argument("--databases", nargs="+", choices=("sqlite", "postgresql"), default=["postgresql", "sqlite"])
    options = parser.parse_args()
    print(report(run(options), options))


async def _settled(system: System, url: str) -> None:
    until = time.monotonic() + SETTLE_DEADLINE_S
    while await system.unsettled(url):
        if time.monotonic() > until:
            raise RuntimeError(f"{system.name} did not settle within {SETTLE_DEADLINE_S} s")
        await asyncio.sleep(0.02)


async def _count(url: str, query: str) -> int:
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(f"file:{make_url(url).database}?mode=ro", uri=True)) as connection:
            return int(connection.execute(query).fetchone()[0])
    connection = await asyncpg.connect(url.replace("postgresql+asyncpg", "postgresql"))
    try:
        return int(await connection.fetchval(query))
    finally:
        await connection.close()


def _empty(database: str, server: PostgresServer, folder: Path) -> str:
    if database == "sqlite":
        return f"sqlite:///{folder}/{secrets.token_hex(6)}.db"
    return server.url(server.create_database())


@contextmanager
def _process(command: list[str], environment: dict[str, str], **streams: int) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, env=environment, text=True, **streams)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=30)


def _send(method: str, port: int, path: str, token: str, body: dict[str, object]) -> None:
    headers = {
        "Authorization": f"Bearer {token}",
        "Content-Type": "application/json",
        "Idempotency-Key": secrets.token_hex(8),
    }
    url = f"http://127.0.0.1:{port}{path}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers, method=method)
    with urllib.request.urlopen(request, timeout=30) as answer:
        answer.read()


def _progress(round_number: int, key: tuple[str, str, str, int], figure: Figure) -> None:
    goal, database, system, skus = key
    rate = figure.settled_per_s if goal == "settle" else figure.placed_per_s
    print(
        f"round {round_number + 1} {goal:6} {database:10} {skus:4} SKUs {system:28} {rate:8,.0f}/s "
        f"generator {figure.generator_share:.0%} probe {figure.probe_s * 1_000:.0f} ms",
        file=sys.stderr,
        flush=True,
    )


if __name__ == "__main__":
    main()
