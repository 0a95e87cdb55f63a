"""Small N by default, the full N with TORTURE=full in the environment; then a table says what was done.

TORTURE_SEED repeats a run's choices (who buys what, when the fault strikes); a failing test prints its seed.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.contract.backends import PostgresSession
from tests.faults.crowd import History
from tests.faults.processes import Shop
from tests.servers.postgres import PostgresServer, require_postgres

FULL = os.environ.get("TORTURE") == "full"
SHOWN = 20


@dataclass
class Scenario:
    """One test's line in the table."""

    name: str
    seed: int
    n: int = 0
    started: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    acknowledged: int = 0
    cut: int = 0
    replayed: int = 0
    back_s: float = 0.0  # from a fault until orders were acknowledged again, the longest
    violations: int | None = None  # None: it did not come to a verdict

    def judge(self, n: int, history: History, violations: list[str]) -> None:
        """Note the outcome; fails with the violations and the seed if there are any."""
        self.n, self.violations = n, len(violations)
        self.acknowledged, self.cut, self.replayed = len(history.placed), history.cut_in_flight, history.replayed
        told = "\n".join(violations[:SHOWN])
        assert not violations, f"{len(violations)} violations, TORTURE_SEED={self.seed}:\n{told}"

    @property
    def row(self) -> tuple[str, ...]:
        verdict = "none: it broke off" if self.violations is None else str(self.violations)
        bound = f"< {3 / self.n:.1%}" if self.violations == 0 else ""
        counts = (self.n, round(self.seconds), self.acknowledged, self.cut, self.replayed)
        back = f"{self.back_s:.1f}" if self.back_s else ""
        return (self.name, *map(str, counts), back, verdict, bound)


HEAD = (
    "scenario",
    "N",
    "seconds",
    "acknowledged",
    "cut in flight",
    "replayed",
    "back in s",
    "violations",
    "3/N (95 %)",
)
LEGEND = (
    "acknowledged: orders; cut in flight: requests that were sent and never answered; replayed: orders placed before",
    "the cut and answered when their key was sent again; back in s: from a fault to the next order, the longest",
    "3/N: with no violation in N faults or rounds, the rate of violations is below this with 95 % confidence",
)
SCENARIOS = pytest.StashKey[list[Scenario]]()

Times = Callable[[int, int], int]
"""`times(quick, full)`: the N of this run."""


@pytest.fixture
def times() -> Times:
    return lambda quick, full: full if FULL else quick


def line_of(request: pytest.FixtureRequest) -> Iterator[Scenario]:
    """A test's line in the table, with its seed; for a fixture to yield from."""
    chosen = os.environ.get("TORTURE_SEED")
    seed = int(chosen) if chosen else secrets.randbelow(1_000_000_000) if FULL else 1
    line = Scenario(request.node.name, seed)
    print(f"TORTURE_SEED={seed}")  # shown when the test fails
    yield line
    line.seconds = time.monotonic() - line.started
    request.config.stash.setdefault(SCENARIOS, []).append(line)


@pytest.fixture
def scenario(request: pytest.FixtureRequest) -> Iterator[Scenario]:
    """This test's line in the table."""
    yield from line_of(request)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Under torture: what was done, how often, and what that proves."""
    lines = [HEAD, *(scenario.row for scenario in config.stash.get(SCENARIOS, []))]
    if not FULL or len(lines) == 1:
        return
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    terminalreporter.section("torture")
    for line in lines:
        first, *others = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        terminalreporter.write_line("  ".join([first.strip().ljust(widths[0]), *others]))
    for sentence in LEGEND:
        terminalreporter.write_line(sentence)


@pytest.fixture
def postgres_url(postgres_session: PostgresSession) -> Iterator[str]:
    """The URL of an empty database on PostgreSQL."""
    require_postgres()
    name = postgres_session.server.create_database()
    yield postgres_session.server.url(name)
    postgres_session.server.drop_database(name)


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """The URL of a SQLite file that does not exist yet."""
    return f"sqlite:///{tmp_path}/holdfast.db"


@pytest.fixture
def postgres_to_crash() -> Iterator[PostgresServer]:
    """A PostgreSQL server of the test's own."""
    require_postgres()
    with PostgresServer() as server:
        yield server


class Shops:
    """Opens shops; all their processes are killed when the test ends."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._opened: list[Shop] = []

    def open(self, url: str, **changes: str) -> Shop:
        shop = Shop(url, self._folder / f"shop-{len(self._opened)}", **changes)
        self._opened.append(shop)
        return shop

    def close(self) -> None:
        for shop in self._opened:
            shop.close()


@pytest.fixture
def shops(tmp_path: Path) -> Iterator[Shops]:
    shops = Shops(tmp_path)
    yield shops
    shops.close()
