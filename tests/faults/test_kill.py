"""`kill -9` under load, of holdfast and of PostgreSQL: nothing that was acknowledged is lost, nothing is sold twice."""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.faults.conftest import Scenario, Shops, Times
from tests.faults.scene import Scene, torment
from tests.servers.postgres import PostgresServer

pytestmark = pytest.mark.torture


async def test_server_killed(database_url: str, shops: Shops, scenario: Scenario, times: Times) -> None:
    shop = shops.open(database_url)
    scene = Scene(shop, [shop.server()], random.Random(scenario.seed))
    await torment(scene, scene.kill_one, times(2, 30), scenario)


async def test_api_or_workers_killed(postgres_url: str, shops: Shops, scenario: Scenario, times: Times) -> None:
    shop = shops.open(postgres_url)
    scene = Scene(shop, [shop.server("--no-work"), shop.worker()], random.Random(scenario.seed))
    await torment(scene, scene.kill_one, times(1, 10), scenario)


async def test_postgres_crashed(
    postgres_to_crash: PostgresServer, shops: Shops, scenario: Scenario, times: Times
) -> None:
    """The holdfast process survives and serves again by itself."""
    shop = shops.open(postgres_to_crash.url(postgres_to_crash.create_database()))
    scene = Scene(shop, [shop.server()], random.Random(scenario.seed))

    async def crash() -> None:
        await asyncio.to_thread(postgres_to_crash.crash)
        await asyncio.sleep(scene.chance.uniform(0.0, 1.0))  # how long it is away
        await asyncio.to_thread(postgres_to_crash.restart)
        assert scene.places[0].process.running

    await torment(scene, crash, times(1, 10), scenario)
