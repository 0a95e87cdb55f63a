"""`holdfast errors`: what an operator sees and changes, on both databases, and what is refused."""

from __future__ import annotations

import asyncio
import base64
import getpass
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from sqlalchemy import text

from holdfast.bootstrap import System
from holdfast.messaging.message import ack, reject
from holdfast.settings import Settings
from tests.contract.notes import QUEUE, counts, note, opened, publish, raw, read
from tests.contract.test_error_store import everything, park, settle, state, store_of, taken
from tests.edge.desk import Desk, Ended, misused, ok, refused

NASTY = "no \x1b[31mred\x1b[0m\x07 [bold]seat[/bold]"


class ErrorsDesk(Desk):
    """The same, with the commands of the error store."""

    def errors(self, *arguments: object, stdin: bytes = b"") -> Ended:
        return self.run("errors", *arguments, stdin=stdin)

    def parked(self, *bodies: str, reason: str = "nobody can read this") -> list[int]:
        return self.within(lambda system: park(system, *bodies, reason=reason))

    def states(self) -> list[tuple[int, str]]:
        async def look(system: System) -> list[tuple[int, str]]:
            return [(each.id, each.state) for each in await everything(system)]

        return self.within(look)


@pytest.fixture
def desk(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> ErrorsDesk:
    return ErrorsDesk(settings, monkeypatch)


def test_an_operator_finds_mends_and_replays(desk: ErrorsDesk) -> None:
    """From the group to the message, an edit by way of a file, the replay, and the audit."""
    one, two = desk.parked("one", "two")

    (group,) = ok(desk.errors("groups", "--json")).json
    assert (group["count"], group["queue"], group["reason"]) == (2, QUEUE, "nobody can read this")
    listed = ok(desk.errors("list", "--group", group["group"], "--json")).json
    assert {each["id"] for each in listed} == {str(one), str(two)}

    shown = ok(desk.errors("show", one, "--json")).json
    assert (shown["id"], shown["state"], shown["body"]) == (str(one), "parked", '{"text":"one"}')
    assert base64.b64decode(shown["body_base64"]) == b'{"text":"one"}'
    assert shown["error_headers"]["x-original-exchange"] == "notes"
    assert ok(desk.errors("show", one, "--body")).out == '{"text":"one"}'

    edit = ("edit", one, "--body-file", "-", "--header", "a=b=c", "--actor", "ann", "--reason", "ticket 7")
    assert ok(desk.errors(*edit, "--json", stdin=b'{"text":"mended"}')).json == {"edited": str(one)}
    done = ok(desk.errors("replay", "--all", "--actor", "ann", "--json")).json
    assert (set(done["replayed"]), done["count"], done["left"]) == ({str(one), str(two)}, 2, {})

    async def handle(system: System) -> list[str]:
        deliveries = await taken(system, 2)
        await settle(system, *(ack(each) for each in deliveries))
        return sorted(read(each) for each in deliveries)

    assert desk.within(handle) == ["mended", "two"]
    assert sorted(desk.states()) == sorted([(one, "done"), (two, "done")])
    audit = ok(desk.errors("show", one, "--json")).json["audit"]
    assert [(line["actor"], line["action"]) for line in audit] == [
        ("ann", "edit"),
        ("ann", "replay"),
        ("holdfast", "done"),
    ]
    assert (audit[0]["body_before"], audit[0]["body_after"]) == ('{"text":"one"}', '{"text":"mended"}')
    assert audit[0]["headers_after"] == {"a": "b=c"}
    assert (audit[1]["body_before"], audit[1]["headers_before"]) == (None, None)
    assert ok(desk.errors("list", "--json")).json == []
    assert len(ok(desk.errors("list", "--state", "done", "--json")).json) == 2


def test_what_is_printed_for_a_human(desk: ErrorsDesk) -> None:
    (parked_id,) = desk.parked("世界", reason=f"ValueError: {NASTY}\nTraceback")
    (row,) = desk.errors("groups", "--json").json
    groups = ok(desk.errors("groups")).out.splitlines()
    head = "group queue parked pending loops error type first last reason"
    assert " ".join(groups[0].split()) == head
    assert groups[1].startswith(row["group"])
    assert len(groups) == 2
    listed = ok(desk.errors("list")).out.splitlines()
    assert listed[1].split()[:3] == [str(parked_id), "parked", QUEUE]
    shown = ok(desk.errors("show", parked_id)).out
    assert 'body (17 bytes): {"text":"世界"}' in shown
    assert "state: parked" in shown
    for out in (*groups, *listed, shown):
        assert "\x1b" not in out
        assert "\x07" not in out
    assert "\\x1b[31mred" in shown
    assert "[bold]seat[/bold]" in shown
    assert ok(desk.errors("discard", parked_id, "--reason", "a test")).out == "discarded 1 message\n"
    assert f" {getpass.getuser()} discard: a test\n" in ok(desk.errors("show", parked_id)).out
    assert ok(desk.errors("list")).out.count("\n") == 1


def test_a_body_that_is_no_text_comes_through_unchanged(desk: ErrorsDesk, tmp_path: Path) -> None:
    body = bytes(range(256))

    async def send_bytes(system: System) -> int:
        await publish(system, [raw(note(system), body=body, content_type="application/octet-stream")])
        from_queue = await taken(system)
        await settle(system, *(reject(each, "no") for each in from_queue))
        (row,) = await everything(system)
        return row.id

    parked_id = desk.within(send_bytes)
    shown = ok(desk.errors("show", parked_id, "--json")).json
    assert (shown["body"], base64.b64decode(shown["body_base64"])) == (None, body)
    assert "no text" in ok(desk.errors("show", parked_id)).out
    path = tmp_path / "body.bin"
    path.write_bytes(body[::-1])
    ok(desk.errors("edit", parked_id, "--body-file", path))

    async def look(system: System) -> bytes:
        return (await store_of(system).show(parked_id)).body

    assert desk.within(look) == body[::-1]


def test_what_was_replayed_already_is_told_with_status_1(desk: ErrorsDesk) -> None:
    one, two = desk.parked("one", "two")
    ok(desk.errors("replay", one))
    ended = desk.errors("replay", one, two)
    assert (ended.code, ended.out) == (1, "replayed 1 message\n")
    assert ended.err == f"left {one} alone: it is pending\n"
    ended = desk.errors("discard", one, two, "--reason", "old", "--json")
    assert (ended.code, ended.err) == (1, "")
    assert ended.json == {"discarded": [], "count": 0, "left": {str(one): "pending", str(two): "pending"}}
    refused(desk.errors("edit", one, "--header", "a=b"), f"message {one} is pending")
    assert desk.within(counts) == (2, 0, 0)


def test_a_rate_leaves_the_later_ones_for_later(desk: ErrorsDesk) -> None:
    desk.parked("one", "two", "three")
    ok(desk.errors("replay", "--queue", QUEUE, "--rate", "0.01"))
    assert desk.within(counts) == (1, 0, 2)


BAD: dict[str, tuple[tuple[object, ...], tuple[str, ...]]] = {
    "replay of nothing": (("replay",), ("in one way", "ids, a group, a queue, or all")),
    "replay named twice": (("replay", "ID", "--all"), ("in one way",)),
    "discard of nothing": (("discard", "--reason", "x"), ("in one way",)),
    "discard without a reason": (("discard", "ID"), ("say why",)),
    "an unknown id": (("replay", "ID", 17), ("no parked message 17", "holdfast errors list")),
    "show of an unknown id": (("show", 17), ("no parked message 17",)),
    "edit of an unknown id": (("edit", 17, "--header", "a=b"), ("no parked message 17",)),
    "an id too large": (("show", 2**63), ("is no id",)),
    "rate 0": (("replay", "ID", "--rate", 0), ("rate", "0.001")),
    "rate below zero": (("replay", "ID", "--rate", -1), ("rate",)),
    "rate nan": (("replay", "ID", "--rate", "nan"), ("rate", "nan")),
    "an empty actor": (("replay", "ID", "--actor", ""), ("actor",)),
    "a long actor": (("replay", "ID", "--actor", "a" * 201), ("actor", "200")),
    "a long reason": (("replay", "ID", "--reason", "x" * 2_001), ("reason", "2000")),
    "an actor that is no text": (("replay", "ID", "--actor", "a\udcff"), ("actor",)),
    "an unknown state": (("list", "--state", "lost"), ("no state 'lost'", "parked, pending, done, discarded")),
    "an empty group": (("list", "--group", ""), ("group",)),
    "an empty queue": (("groups", "--queue", ""), ("queue",)),
    "a queue that is no text": (("list", "--queue", "\udcff"), ("queue",)),
    "an edit of nothing": (("edit", "ID"), ("body or headers",)),
    "a header without =": (("edit", "ID", "--header", "secret"), ("NAME=VALUE",)),
    "a header that is ours": (("edit", "ID", "--header", "x-holdfast-parked-id=1"), ("error store itself",)),
    "a header that is not there": (("edit", "ID", "--drop-header", "x"), ("no header 'x'",)),
    "a file that is not there": (("edit", "ID", "--body-file", "nowhere.json"), ("nowhere.json",)),
    "a folder for a file": (("edit", "ID", "--body-file", "."), ("'.'", "directory")),
    "a body that is no JSON": (("edit", "ID", "--body-file", "-"), ("no JSON",)),
}
MISUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "an id in words": (("show", "first"), "'ID': Input should be a valid integer"),
    "id 0": (("replay", 0), "ID"),
    "an id below zero": (("replay", "--", -1), "ID"),
    "a rate in words": (("replay", "1", "--rate", "fast"), "--rate"),
    "limit 0": (("list", "--limit", 0), "--limit"),
    "limit 1001": (("list", "--limit", 1_001), "--limit"),
    "after below zero": (("list", "--after", -1), "--after"),
    "an unknown option": (("groups", "--nosuch"), "--nosuch"),
    "an unknown command": (("retry",), "retry"),
    "no id": (("show",), "ID"),
}


def test_bad_input_is_refused_in_one_sentence_and_changes_nothing(desk: ErrorsDesk) -> None:
    (parked_id,) = desk.parked("one")
    before = desk.errors("show", parked_id, "--json").json
    for arguments, says in BAD.values():
        given = [parked_id if each == "ID" else each for each in arguments]
        ended = desk.errors(*given, stdin=b'{"card": 4111')
        refused(ended, *says)
        assert "4111" not in ended.err
        assert "secret" not in ended.err
    for arguments, named in MISUSED.values():
        misused(desk.errors(*arguments), named)
    assert desk.errors("show", parked_id, "--json").json == before
    assert desk.within(counts) == (0, 0, 0)


READING: Sequence[Sequence[object]] = (("groups",), ("list",), ("show", 1))
WRITING: Sequence[Sequence[object]] = (("edit", 1, "--header", "a=b"), ("replay", 1), ("discard", 1, "--reason", "x"))


@pytest.mark.parametrize("command", [*READING, *WRITING], ids=lambda command: str(command[0]))
def test_a_database_that_was_never_migrated_is_told_to_be(desk: ErrorsDesk, command: Sequence[object]) -> None:
    refused(desk.errors(*command), "holdfast migrate")
    if desk.settings.database.url.startswith("sqlite"):
        assert not Path(desk.settings.database.url.removeprefix("sqlite:///")).exists()


async def test_beside_a_server_what_reads_works_and_on_sqlite_what_writes_is_refused(settings: Settings) -> None:
    """In processes of their own, while a system has the database open."""
    async with opened(settings) as system:
        (parked_id,) = await park(system, "one")
        listed = await in_a_process(settings, "list", "--json")
        assert [each["id"] for each in ok(listed).json] == [str(parked_id)]
        replayed = await in_a_process(settings, "replay", str(parked_id), "--json")
        if system.transport.features.several_processes:
            assert ok(replayed).json == {"replayed": [str(parked_id)], "count": 1, "left": {}}
            (again,) = await taken(system)
            await settle(system, ack(again))
            assert await state(system, parked_id) == ("done", 0)
            (line, _) = (await store_of(system).show(parked_id)).audit
            assert line.actor == getpass.getuser()
        else:
            refused(replayed, f"process {os.getpid()} writes", "stop that one, or move to PostgreSQL")
            assert await state(system, parked_id) == ("parked", 0)
        async with system.database.read() as tx:
            assert (await tx.execute(text("SELECT count(*) FROM hf_parked"))).scalar_one() == 1


async def test_two_operators_in_two_processes_send_one_message(settings: Settings) -> None:
    async with opened(settings) as system:
        ids = [str(each) for each in await park(system, "one", "two", "three")]
        alone = not system.transport.features.several_processes
    if alone:
        pytest.skip("sqlite: the second process is refused, as the test above shows")
    first, second = await asyncio.gather(
        in_a_process(settings, "replay", *ids, "--json"), in_a_process(settings, "replay", *ids, "--json")
    )
    assert first.json["count"] + second.json["count"] == 3
    assert sorted([*first.json["replayed"], *second.json["replayed"]]) == sorted(ids)
    assert {first.code, second.code} <= {0, 1}
    async with opened(settings) as system:
        assert await counts(system) == (3, 0, 0)


async def in_a_process(settings: Settings, *arguments: str) -> Ended:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "holdfast",
        "errors",
        *arguments,
        env={**os.environ, "HOLDFAST_DATABASE": settings.database.url},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return Ended(process.returncode, out.decode(), err.decode())
