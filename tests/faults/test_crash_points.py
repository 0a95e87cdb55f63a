"""A process that dies at any boundary of its transactions: after a restart each effect has happened exactly once."""

from __future__ import annotations

import asyncio
import random
import sys
from collections import Counter
from pathlib import Path

import pytest
from sqlalchemy import text

from holdfast import DatabaseSettings, connect
from tests.contract.backends import PostgresSession
from tests.faults.conftest import Scenario, Times
from tests.faults.crashing_worker import DIED, ORDERS
from tests.faults.crowd import History
from tests.servers.postgres import require_postgres

pytestmark = pytest.mark.torture

ROOT = Path(__file__).parents[2]
WAIT_S = 60
POINTS_MAX = 400  # far more than a scenario has; it is through when a run passes none of the remaining points
WANTED = {
    "effects": [f"{what} {number}" for what in ("placed", "packed") for number in range(ORDERS)],
    "retry": [f"{what} {number}" for what in ("placed", "packed") for number in range(ORDERS)],
    "dead letter": [f"returned {number}" for number in range(ORDERS)],
}


async def worker(url: str, scenario: str, point: int) -> int:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.faults.crashing_worker", url, scenario, str(point)),
        cwd=ROOT,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        return await asyncio.wait_for(process.wait(), WAIT_S)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def wrong(url: str, scenario: str, point: int) -> list[str]:
    """What is not as it should be after the restart: effects, what waits, what was given up on."""
    database = await connect(DatabaseSettings(url=url), read_only=True)
    try:
        async with database.read() as tx:
            effects = Counter((await tx.execute(text("SELECT what FROM effect"))).scalars())
            waiting = (await tx.execute(text("SELECT count(*) FROM hf_message"))).scalar_one()
            parked = (await tx.execute(text("SELECT count(*) FROM hf_parked"))).scalar_one()
    finally:
        await database.close()
    found = []
    if effects != Counter(WANTED[scenario]):
        found.append(f"point {point}: effects {dict(effects)}")
    if waiting or parked:
        found.append(f"point {point}: {waiting} messages wait, {parked} are parked")
    return found


async def die_and_restart(url: str, scenario: str, point: int) -> tuple[bool, list[str]]:
    """Die at the point, start again, look; says whether the point was reached."""
    code = await worker(url, scenario, point)
    if code not in (0, DIED):
        return True, [f"point {point}: ended with status {code}"]
    if code == DIED and (again := await worker(url, scenario, -1)) != 0:
        return True, [f"point {point}: the restart ended with status {again}"]
    return code == DIED, await wrong(url, scenario, point)


@pytest.mark.parametrize("name", WANTED)
async def test_crash_points_on_sqlite(tmp_path: Path, scenario: Scenario, times: Times, name: str) -> None:
    found: list[str] = []
    deaths = 0
    for point in points(scenario, times):
        died, faults = await die_and_restart(f"sqlite:///{tmp_path}/{point}.db", name, point)
        found += faults
        deaths += died
        if not died:
            break
    assert deaths > 0
    scenario.judge(deaths, History(), found)


@pytest.mark.parametrize("name", WANTED)
async def test_crash_points_on_postgresql(
    postgres_session: PostgresSession, scenario: Scenario, times: Times, name: str
) -> None:
    require_postgres()
    found: list[str] = []
    deaths = 0
    for point in points(scenario, times):
        database = postgres_session.server.create_database()
        died, faults = await die_and_restart(postgres_session.server.url(database), name, point)
        postgres_session.server.drop_database(database)
        found += faults
        deaths += died
        if not died:
            break
    assert deaths > 0
    scenario.judge(deaths, History(), found)


def points(scenario: Scenario, times: Times) -> list[int]:
    """All of them under torture; else a few that the seed draws from those that every run passes."""
    count = times(3, POINTS_MAX)
    if count == POINTS_MAX:
        return list(range(POINTS_MAX))
    return sorted(random.Random(scenario.seed).sample(range(8, 60), count))
