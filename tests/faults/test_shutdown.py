"""SIGTERM under load ends a server in good order; Ctrl-C ends the demo and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from pathlib import Path

import pytest

from tests.faults.conftest import Scenario, Shops, Times
from tests.faults.crowd import History
from tests.faults.processes import Process, quick_environment
from tests.faults.scene import Scene, torment

STOPS_WITHIN_S = 12.0
INTERRUPTED = 130
SETTLING_SEED = "11"  # its only buyer comes at once and vanishes after ordering: the settling lasts the 4 s to pay


class Demo:
    """A running `holdfast demo` with a folder of its own for temporary files."""

    def __init__(self, folder: Path, *options: str) -> None:
        self._temporary = folder / "tmp"
        self._temporary.mkdir(parents=True)
        environment = quick_environment("") | {"TMPDIR": str(self._temporary)}
        self.process = Process(("demo", *options), environment, folder, "demo")

    async def interrupted(self) -> list[str]:
        """Press Ctrl-C; what is wrong with the end."""
        os.killpg(self.process.pid, signal.SIGINT)  # a terminal sends it to the whole group
        ended = await self.process.ended(STOPS_WITHIN_S)
        found = []
        if ended.code != INTERRUPTED:
            found.append(f"it ended with {ended.code}: {ended.out[-1_500:]}")
        if ended.err or "Traceback" in ended.out:
            found.append(f"it complained: {ended.err[-1_500:]}")
        if left := list(self._temporary.iterdir()):
            found.append(f"it left {left}")
        if _lives(self.process.pid):
            found.append("it left a process")
        return found


@pytest.mark.torture
async def test_sigterm_under_load(database_url: str, shops: Shops, scenario: Scenario, times: Times) -> None:
    """It ends with 0 and in time; whoever asked meanwhile got an answer, or asks the next server with the same key."""
    shop = shops.open(database_url)
    server = shop.server()
    scene = Scene(shop, [server], random.Random(scenario.seed))

    async def stop() -> None:
        ended = await server.stop(STOPS_WITHIN_S)
        assert ended.code == 0, f"TORTURE_SEED={scenario.seed}: {ended}"
        await server.start()

    await torment(scene, stop, times(1, 10), scenario)


@pytest.mark.torture
async def test_interrupted_demo(tmp_path: Path, scenario: Scenario, times: Times) -> None:
    """At whatever moment of the sale."""
    chance = random.Random(scenario.seed)
    found: list[str] = []
    for number in range(times(1, 10)):
        demo = Demo(tmp_path / f"demo-{number}", "--buyers", "50", "--seed", str(number))
        try:
            await demo.process.says("real HTTP at")
            await asyncio.sleep(chance.uniform(0.0, 3.0))
            found += [f"demo {number}: {fault}" for fault in await demo.interrupted()]
        finally:
            demo.process.close()
    scenario.judge(times(1, 10), History(), found)


async def test_demo_interrupted_while_it_settles(tmp_path: Path) -> None:
    """The crowd is gone, the last order waits for its deadline: Ctrl-C means what it meant before."""
    demo = Demo(tmp_path / "demo", "--buyers", "1", "--seed", SETTLING_SEED)
    try:
        await demo.process.says("left without an order")  # the table as it stands when the crowd is gone
        assert await demo.interrupted() == []
    finally:
        demo.process.close()


def _lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
