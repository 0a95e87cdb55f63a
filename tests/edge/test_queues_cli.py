"""`holdfast queues`: what is in them, how they differ from what is wanted, and making them so."""

from __future__ import annotations

import pytest

from holdfast.bootstrap import System
from holdfast.messaging.topology import Binding, Exchange, Queue, Topology
from holdfast.settings import Settings
from tests.contract.notes import EXCHANGE, QUEUE, counts, send
from tests.contract.test_error_store import park
from tests.edge.desk import Desk, misused, ok, refused

WANTED = Topology(
    exchanges=[Exchange(name=EXCHANGE, kind="topic"), Exchange(name="new", kind="fanout")],
    queues=[Queue(name=QUEUE), Queue(name="mine", max_length=5), Queue(name="new.queue", message_ttl_ms=1_000)],
    bindings=[
        Binding(exchange=EXCHANGE, queue=QUEUE, routing_key="note.#"),
        Binding(exchange="new", queue="new.queue"),
    ],
)
PRUNED = Topology(exchanges=[Exchange(name=EXCHANGE, kind="topic")], queues=[Queue(name=QUEUE)])
NOT_HERE = Topology(queues=[Queue(name="first", max_priority=3)])
NO_TOPOLOGY = 5
HERE = f"{__name__}:"


@pytest.fixture
def desk(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Desk:
    return Desk(settings, monkeypatch)


async def known(system: System) -> Topology:
    return await system.transport.topology()


def test_the_list_counts_messages_by_what_they_wait_for(desk: Desk) -> None:
    async def fill(system: System) -> None:
        await send(system, "delayed", delay_ms=3_600_000)
        await park(system, "parked")
        await send(system, "ready one", "ready two")

    desk.within(fill)
    (row,) = [each for each in ok(desk.run("queues", "list", "--json")).json if each["queue"] == QUEUE]
    assert {name: row[name] for name in ("ready", "unacked", "delayed", "parked")} == {
        "ready": 2,
        "unacked": 0,
        "delayed": 1,
        "parked": 1,
    }
    assert row["oldestS"] >= 0
    lines = ok(desk.run("queues", "list")).out.splitlines()
    assert lines[0].split() == ["queue", "ready", "unacked", "delayed", "parked", "oldest", "s"]
    (line,) = [line for line in lines if line.startswith(f"{QUEUE} ")]
    assert line.split()[1:5] == ["2", "0", "1", "1"]


def test_an_interval_tells_how_each_queue_grew(desk: Desk) -> None:
    async def fill(system: System) -> None:
        await send(system, "1", "2")

    desk.within(fill)
    (row,) = [
        each for each in ok(desk.run("queues", "list", "--interval", "0.1", "--json")).json if each["queue"] == QUEUE
    ]
    assert (row["ready"], row["growthPerS"]) == (2, 0.0)  # nobody works on it
    lines = ok(desk.run("queues", "list", "--interval", "0.1")).out.splitlines()
    assert lines[0].split()[-1] == "growth/s"
    (line,) = [line for line in lines if line.startswith(f"{QUEUE} ")]
    assert line.split()[-1] == "+0.0"


def test_the_order_engines_own_queues_are_as_they_should_be(desk: Desk) -> None:
    desk.within(known)
    assert ok(desk.run("queues", "plan")).out == "everything is declared as it should be\n"
    assert ok(desk.run("queues", "apply", "--json")).json == []


def test_another_guard_of_holds_is_a_change_of_its_queue(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.within(known)
    monkeypatch.setenv("HOLDFAST_STOCK__GUARD_MS", "60000")
    planned = desk.run("queues", "plan")
    assert (planned.code, planned.out) == (1, "change queue stock.delay.queue: message_ttl_ms: 2400000 -> 60000\n")
    assert ok(desk.run("queues", "apply")).out == planned.out
    assert ok(desk.run("queues", "plan")).code == 0


def test_the_plan_names_every_difference_and_apply_makes_them_once(desk: Desk) -> None:
    async def fill(system: System) -> None:
        await system.transport.declare(Topology(queues=[Queue(name="mine")]))
        await send(system, "kept", exchange="", key="mine")

    async def left(system: System) -> tuple[int, int, int]:
        return await counts(system, "mine")

    desk.within(fill)
    planned = desk.run("queues", "plan", "--topology", HERE + "WANTED")
    assert planned.code == 1
    assert planned.out.splitlines() == [
        "create exchange new: kind='fanout'",
        "change queue mine: max_length: None -> 5",
        "create queue new.queue: message_ttl_ms=1000",
        "create binding new -> new.queue ()",
    ]
    before = desk.within(known)
    assert not set(WANTED.queues[1:]) & set(before.queues)  # a plan changes nothing
    assert ok(desk.run("queues", "apply", "--topology", HERE + "WANTED")).out == planned.out
    after = desk.within(known)
    assert all(each in after.queues for each in WANTED.queues)
    assert Exchange(name="new", kind="fanout") in after.exchanges
    assert ok(desk.run("queues", "plan", "--topology", HERE + "WANTED")).code == 0
    again = ok(desk.run("queues", "apply", "--topology", HERE + "WANTED", "--json"))
    assert again.json == []
    assert desk.within(left) == (1, 0, 0)


def test_bindings_that_nobody_wants_go_only_with_prune(desk: Desk) -> None:
    desk.within(known)
    assert ok(desk.run("queues", "plan", "--topology", HERE + "PRUNED")).code == 0
    told = desk.run("queues", "apply", "--topology", HERE + "PRUNED", "--prune", "--json")
    assert [(each["action"], each["what"]) for each in ok(told).json] == [("remove", "binding")]

    # A system of notes binds its queue again when it starts, so this is seen by the next plan only.
    assert ok(desk.run("queues", "plan", "--topology", HERE + "PRUNED", "--prune")).code == 0


def test_the_tail_shows_messages_and_leaves_them(desk: Desk) -> None:
    async def fill(system: System) -> None:
        await send(system, "first", "sec\x1bond")
        await send(system, "third", delay_ms=3_600_000)

    desk.within(fill)
    lines = ok(desk.run("queues", "tail", QUEUE)).out.splitlines()
    assert [line.split()[1] for line in lines] == ["ready", "ready", "delayed"]
    assert "first" in lines[0]
    assert "\x1b" not in lines[1]
    pages = [ok(desk.run("queues", "tail", QUEUE, "--limit", 2, "--json")).out.splitlines()]
    last = pages[0][-1].partition('"id":"')[2].partition('"')[0]
    pages.append(ok(desk.run("queues", "tail", QUEUE, "--after", last, "--json")).out.splitlines())
    assert [len(page) for page in pages] == [2, 1]

    async def left(system: System) -> tuple[int, int, int]:
        return await counts(system)

    assert desk.within(left) == (2, 0, 1)


def test_what_is_delayed_is_listed_soonest_first_by_queue_or_key(desk: Desk) -> None:
    async def fill(system: System) -> None:
        await send(system, "ready")
        await send(system, "second", delay_ms=7_200_000, cancel_key="order-1")
        await send(system, "first", delay_ms=3_600_000)

    desk.within(fill)
    lines = ok(desk.run("queues", "delayed", QUEUE)).out.splitlines()
    assert [line.rpartition(" ")[2] for line in lines] == ['{"text":"first"}', '{"text":"second"}']
    (line,) = ok(desk.run("queues", "delayed", "--key", "order-1", "--json")).out.splitlines()
    assert '"cancelKey":"order-1"' in line
    assert len(ok(desk.run("queues", "delayed", QUEUE, "--limit", 1)).out.splitlines()) == 1
    refused(desk.run("queues", "delayed"), "name a queue, a cancel key")
    refused(desk.run("queues", "delayed", "no.such.queue"), "there is no queue 'no.such.queue'")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nonsense", "MODULE:NAME"),
        ("no.such.module:X", "cannot find"),
        (HERE + "MISSING", "cannot find"),
        (HERE + "NO_TOPOLOGY", "no Topology but a int"),
        (":", "cannot find"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "apply"])
def test_a_topology_that_is_none_is_refused(desk: Desk, command: str, name: str, told: str) -> None:
    desk.within(known)
    refused(desk.run("queues", command, "--topology", name), told)


def test_what_this_database_cannot_offer_is_refused_and_nothing_is_made(desk: Desk) -> None:
    before = desk.within(known)
    refused(desk.run("queues", "apply", "--topology", HERE + "NOT_HERE"), "max_priority")
    assert desk.within(known) == before


def test_bad_use_is_told(desk: Desk) -> None:
    desk.within(known)
    refused(desk.run("queues", "tail", "nowhere"), "there is no queue 'nowhere'")
    misused(desk.run("queues", "tail", QUEUE, "--limit", 0), "--limit")
    for interval in ("0", "-1", "nan", "inf"):
        refused(desk.run("queues", "list", "--interval", interval), "--interval")
    misused(desk.run("queues", "tail"), "Missing argument")
    misused(desk.run("queues", "nonsense"), "nonsense")
