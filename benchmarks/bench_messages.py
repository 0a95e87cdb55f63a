"""Messages per second: holdfast against its peers on the same database, and against the bare driver as the limit.

Every system runs in a process of its own on an empty database, in turn, round after round; the figures are medians,
the ratios are taken within this one run. *put* sends one message a call, from as many callers as suits the system;
*put, 100 a call* sends batches; *handle + ack* hands waiting messages to a handler, one by one, and settles them. What
was handled is checked: every message, each once. The two rows of effects write an inbox row and a business row too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sqlite3
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from sqlalchemy import make_url

from benchmarks.queues.cell import SYSTEMS
from tests.servers.postgres import PostgresServer, require_postgres

ROOT = Path(__file__).parents[1]
LIBRARIES = (
    *("sqlalchemy", "asyncpg", "aiosqlite", "msgspec", "uvloop"),
    *("huey", "litequeue", "persist-queue", "pgqueuer", "procrastinate", "psycopg"),
)
MEASURES = {"put": "put", "put_batch": "put, 100 a call", "drain": "handle + ack"}
TIMEOUT_S = 300


@dataclass
class Row:
    """All rounds of one system on one database."""

    database: str
    system: str
    rounds: list[dict[str, float]] = field(default_factory=list)

    def median(self, measure: str) -> float | None:
        figures = [each[measure] for each in self.rounds if measure in each]
        return statistics.median(figures) if figures else None

    def range(self, measure: str, scale: float) -> str:
        """The least and the most of the rounds."""
        figures = [each[measure] * scale for each in self.rounds]
        return f"{min(figures):.0f}-{max(figures):.0f}"


def main() -> None:
    """Run all cells and print the table, as Markdown and, for further use, as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=tuple(SYSTEMS), help="one database only")
    parser.add_argument("--json", type=Path, help="also write every figure here")
    arguments = parser.parse_args()
    databases = [arguments.only] if arguments.only else list(SYSTEMS)
    rows = [Row(database, system) for database in databases for system in SYSTEMS[database]]
    for number in range(arguments.rounds):
        for row in rows:
            row.rounds.append(_cell(row.database, row.system))
            print(f"round {number + 1}: {row.database}, {row.system}: {_told(row.rounds[-1])}", file=sys.stderr)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([[each.database, each.system, each.rounds] for each in rows], indent=1))
    print(versions())
    for database in databases:
        print(_table(database, [row for row in rows if row.database == database]))


def _cell(database: str, system: str) -> dict[str, float]:
    with empty_database(database) as url:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.queues.cell", system, url],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            timeout=TIMEOUT_S,
            check=True,
        )
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


@contextmanager
def empty_database(database: str) -> Iterator[str]:
    """The URL of an empty database, on a server of its own, that is gone afterwards."""
    if database == "sqlite":
        with tempfile.TemporaryDirectory() as folder:
            yield f"sqlite:///{folder}/bench.db"
        return
    with PostgresServer() as server:
        plain = make_url(server.url(server.create_database())).set(drivername="postgresql")
        yield plain.render_as_string(hide_password=False)


def _told(figures: dict[str, float]) -> str:
    told = [f"{name} {figures[measure]:,.0f}" for measure, name in MEASURES.items() if measure in figures]
    conditions = f"probe {figures['probe_s'] * 1e3:.0f} ms, sync {figures['sync_s'] * 1e6:.0f} us"
    return f"{', '.join(told)}; {conditions}"


def _table(database: str, rows: list[Row]) -> str:
    """The medians, and what of the peers' they are."""
    lines = [
        f"\n### {database}\n",
        f"| system | {' | '.join(MEASURES.values())} | probe | sync |",
        f"|---|{'---|' * (len(MEASURES) + 2)}",
    ]
    for row in rows:
        figures = [_figure(row.median(measure)) for measure in MEASURES]
        conditions = f"{row.range('probe_s', 1e3)} ms | {row.range('sync_s', 1e6)} us"
        lines.append(f"| {row.system} | {' | '.join(figures)} | {conditions} |")
    lines.append("")
    ours = [row for row in rows if row.system.startswith("holdfast") and "effect" not in row.system]
    for mine in ours:
        for measure, name in MEASURES.items():
            others = [row for row in rows if SYSTEMS[database][row.system].peer or row.system == "driver"]
            ratios = [
                f"{mine_figure / theirs:.1f} x {row.system}"
                for row in others
                if (theirs := row.median(measure)) and (mine_figure := mine.median(measure))
            ]
            lines.append(f"- {mine.system}, {name}: {', '.join(ratios)}")
    by_name = {row.system: row.median("drain") for row in rows}
    effects = by_name["holdfast, effects"] or 0
    lines += [
        f"- holdfast, effects: {effects / alone:.1f} x {other}"
        for other in ("one transaction per effect", "holdfast, one effect a transaction")
        if (alone := by_name[other])
    ]
    return "\n".join(lines)


def _figure(figure: float | None) -> str:
    return "-" if figure is None else f"{figure:,.0f}"


def versions() -> str:
    binaries = require_postgres()
    told = subprocess.run([binaries / "postgres", "--version"], stdout=subprocess.PIPE, check=True, text=True)
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    return (
        f"{os.cpu_count()} cores, Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, "
        f"{told.stdout.strip()}; {libraries}"
    )


if __name__ == "__main__":
    main()
