"""A process that dies at any boundary of its transactions: after a restart each effect has happened exactly once."""

from __future__ import annotations

import asyncio
import random
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from sqlalchemy import text

from holdfast import DatabaseSettings, connect
from tests.contract.backends import PostgresSession
from tests.faults.conftest import Scenario, Times
from tests.faults.crashing_worker import DIED, MORE_VERBS, ORDERS, VERBS
from tests.faults.crowd import History
from tests.servers.postgres import require_postgres

pytestmark = pytest.mark.torture

ROOT = Path(__file__).parents[2]
WAIT_S = 60
QUICK = 3
LANES = 3  # deaths at once, each on a database of its own: most of the time a process starts or waits for a lease
WANTED = {
    "effects": [f"{what} {number}" for what in ("placed", "packed") for number in range(ORDERS)],
    "retry": [f"{what} {number}" for what in ("placed", "packed") for number in range(ORDERS)],
    "dead letter": [f"returned {number}" for number in range(ORDERS)],
}

Die = Callable[[str, int], Awaitable[tuple[bool, list[str]]]]
"""Dies at the boundary of a kind and number: whether it was reached, and what is wrong after the restart."""


async def worker(url: str, scenario: str, *point: str) -> int:
    """Run the program; its exit status."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.faults.crashing_worker", url, scenario, *point),
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


async def wrong(url: str, scenario: str) -> list[str]:
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
        found.append(f"effects {dict(effects)}")
    if waiting or parked:
        found.append(f"{waiting} messages wait, {parked} are parked")
    return found


async def die_and_restart(url: str, scenario: str, kind: str, number: int) -> tuple[bool, list[str]]:
    """Die at the boundary, start again, look."""
    code = await worker(url, scenario, kind, str(number))
    if code not in (0, DIED):
        return True, [f"{kind} {number}: ended with status {code}"]
    if code == DIED and (again := await worker(url, scenario)) != 0:
        return True, [f"{kind} {number}: the restart ended with status {again}"]
    return code == DIED, [f"{kind} {number}: {fault}" for fault in await wrong(url, scenario)]


@pytest.mark.parametrize("name", WANTED)
async def test_crash_points_on_sqlite(tmp_path: Path, scenario: Scenario, times: Times, name: str) -> None:
    async def die(kind: str, number: int) -> tuple[bool, list[str]]:
        return await die_and_restart(f"sqlite:///{tmp_path}/{kind}-{number}.db", name, kind, number)

    await die_everywhere(die, scenario, times, name)


@pytest.mark.parametrize("name", WANTED)
async def test_crash_points_on_postgresql(
    postgres_session: PostgresSession, scenario: Scenario, times: Times, name: str
) -> None:
    require_postgres()
    server = postgres_session.server

    async def die(kind: str, number: int) -> tuple[bool, list[str]]:
        database = server.create_database()
        try:
            return await die_and_restart(server.url(database), name, kind, number)
        finally:
            server.drop_database(database)

    await die_everywhere(die, scenario, times, name)


async def die_everywhere(die: Die, scenario: Scenario, times: Times, name: str) -> None:
    """Die once at every boundary under torture; else at a few that the seed draws."""
    kinds = [f"{when} {verb}" for verb in (*VERBS, *MORE_VERBS[name]) for when in ("before", "after")]
    lanes = asyncio.Semaphore(LANES)
    deaths: Counter[str] = Counter()
    found: list[str] = []

    async def die_at(kind: str, number: int) -> bool:
        async with lanes:
            died, faults = await die(kind, number)
        deaths[kind] += died
        found.extend(faults)
        return died

    async def die_at_all(kind: str) -> None:
        """Of this kind; its last one is known by a run that passes no further one."""
        number = 1
        while await die_at(kind, number):
            number += 1

    exhaustive = times(0, 1) == 1
    if exhaustive:
        await asyncio.gather(*(die_at_all(kind) for kind in kinds))
    else:
        chance = random.Random(scenario.seed)
        few = ((kind, chance.randint(*reach(kind))) for kind in chance.sample(kinds, QUICK))
        await asyncio.gather(*(die_at(kind, number) for kind, number in few))
    print(f"{name}: {dict(deaths)}")
    assert deaths.total() > 0
    scenario.judge(deaths.total(), History(), found)
    assert not exhaustive or all(deaths[kind] for kind in kinds), "the scenario does not pass every kind any more"


def reach(kind: str) -> tuple[int, int]:
    """Of which numbers every run has one: the first transactions belong to the start, which is not so interesting."""
    return (8, 14) if kind.endswith(("begin", "commit")) else (1, 2)
