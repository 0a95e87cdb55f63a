"""`holdfast queues`: what is in the queues, and whether they are declared as they should be."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from importlib import import_module
from typing import Annotated, Any, TypeVar

import msgspec
import typer

from holdfast.clock import SystemClock, rfc3339
from holdfast.db.database import Database
from holdfast.edge.terminal import database_of_settings, print_json, safe, table
from holdfast.errors import InvalidInput
from holdfast.messaging.topology import Topology
from holdfast.messaging.topology_plan import Change, plan
from holdfast.messaging.transports.sql import insight, routing
from holdfast.services.contracts.topology import topology
from holdfast.settings import load

T = TypeVar("T")

EXIT_DIFFERENT = 1
PAGE = 100
INTERVAL_S_MIN, INTERVAL_S_MAX = 0.1, 3_600
BODY_CHARS_MAX = 200

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Prune = Annotated[bool, typer.Option("--prune", help="Remove bindings of these queues that are not wanted any more.")]
Wanted = Annotated[
    str, typer.Option("--topology", help="MODULE:NAME of the wanted Topology; the order engine's if not given.")
]
OURS = "holdfast.services.contracts.topology:topology"

app = typer.Typer(
    name="queues",
    help="What is in the queues: list, tail; and how they are declared: plan, apply.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.command("list")
def list_queues(
    interval: Annotated[
        float | None,
        typer.Option(help="Count twice, so many seconds apart, and tell how each queue grew."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Ready, unacked, delayed and parked messages of every queue, and how long the oldest ready one waits."""
    clock = SystemClock()
    if interval is not None and not INTERVAL_S_MIN <= interval <= INTERVAL_S_MAX:
        raise InvalidInput(f"--interval is {INTERVAL_S_MIN} to {INTERVAL_S_MAX} seconds, not {interval}")

    async def look(database: Database) -> Sequence[insight.QueueView]:
        before, began = await _overview(database, clock.now_us()), clock.monotonic()
        if interval is None:
            return before
        await clock.sleep(interval)
        after, ended = await _overview(database, clock.now_us()), clock.monotonic()
        return insight.growth(before, after, ended - began)

    views = _with_database(look, read_only=True)
    if as_json:
        print_json(views)
        return
    head = ("queue", "ready", "unacked", "delayed", "parked", "oldest s")
    table(head if interval is None else (*head, "growth/s"), [_row(view) for view in views])


@app.command("plan")
def show_plan(wanted_topology: Wanted = OURS, prune: Prune = False, as_json: AsJson = False) -> None:
    """What `apply` would change; ends with status 1 when there is something."""
    wanted = _wanted(wanted_topology)

    async def compare(database: Database) -> list[Change]:
        async with database.read() as tx:
            return plan((await routing.known_to(tx)).topology(), wanted, prune=prune)

    changes = _with_database(compare, read_only=True)
    _tell(changes, as_json)
    raise typer.Exit(EXIT_DIFFERENT if changes else 0)


@app.command("apply")
def make(wanted_topology: Wanted = OURS, prune: Prune = False, as_json: AsJson = False) -> None:
    """Make the queues as they should be, in one transaction; messages stay where they are."""
    wanted = _wanted(wanted_topology)
    now_us = SystemClock().now_us()

    async def change(database: Database) -> list[Change]:
        wanted.refuse_unless(database.dialect, routing.OFFERED)
        async with database.transaction() as tx:
            return await routing.change(tx, wanted, now_us, prune=prune)

    _tell(_with_database(change, read_only=False), as_json)


@app.command()
def tail(
    queue: Annotated[str, typer.Argument(help="Which queue, as `queues list` names it.")],
    after: Annotated[int, typer.Option(min=0, help="Only ids above this one.")] = 0,
    limit: Annotated[int, typer.Option(min=1, max=insight.PEEK_MAX, help="At most so many.")] = PAGE,
    follow: Annotated[bool, typer.Option("--follow", help="Go on with what comes, until Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> None:
    """The messages of a queue, oldest first; they stay where they are."""
    clock = SystemClock()

    async def run(database: Database) -> None:
        last = after
        while True:
            async with database.read() as tx:
                if queue not in (await routing.known_to(tx)).queues:
                    raise InvalidInput(f"there is no queue {queue[:100]!r}; `holdfast queues list` names them")
                found = await insight.peek(tx, queue, last, limit, clock.now_us())
            for each in found:
                last = each.id
                _line(each, as_json)
            if not follow:
                return
            await clock.sleep(0 if len(found) == limit else 0.5)

    try:
        _with_database(run, read_only=True)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


@app.command()
def delayed(
    queue: Annotated[str | None, typer.Argument(help="Which queue; or leave it out and give --key.")] = None,
    key: Annotated[str | None, typer.Option("--key", help="Only messages that this key would cancel.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=insight.PEEK_MAX, help="At most so many.")] = PAGE,
    as_json: AsJson = False,
) -> None:
    """The messages that are not due yet, the soonest first; retries that wait are among them."""
    now_us = SystemClock().now_us()

    async def run(database: Database) -> Sequence[insight.Peeked]:
        async with database.read() as tx:
            if queue is not None and queue not in (await routing.known_to(tx)).queues:
                raise InvalidInput(f"there is no queue {queue[:100]!r}; `holdfast queues list` names them")
            return await insight.pending(tx, now_us, queue=queue, cancel_key=key, limit=limit)

    for each in _with_database(run, read_only=True):
        _line(each, as_json)


def _row(view: insight.QueueView) -> tuple[str, ...]:
    counts = map(str, (view.ready, view.unacked, view.delayed, view.parked))
    row = (view.queue, *counts, f"{view.oldest_s:.1f}")
    return (*row, f"{view.growth_per_s:+.1f}") if isinstance(view, insight.Growth) else row


def _line(message: insight.Peeked, as_json: bool) -> None:
    if as_json:
        fields = msgspec.to_builtins(message)
        typer.echo(msgspec.json.encode({**fields, "id": str(message.id)}).decode())
        return
    body = safe(message.body[:BODY_CHARS_MAX].decode("utf-8", "replace")).replace("\n", " ")
    key = safe(message.routing_key)
    typer.echo(f"{message.id} {message.state} {rfc3339(message.due_us)} {safe(message.type)} {key} {body}")


def _tell(changes: list[Change], as_json: bool) -> None:
    if as_json:
        print_json(changes)
        return
    for each in changes:
        typer.echo(f"{each.action} {each.what} {safe(each.name)}" + (f": {safe(each.detail)}" if each.detail else ""))
    if not changes:
        typer.echo("everything is declared as it should be")


def _wanted(name: str) -> Topology:
    if name == OURS:
        return topology(load().stock.guard_ms)
    module, colon, attribute = name.partition(":")
    if not colon:
        raise InvalidInput(f"--topology: write MODULE:NAME, as in {OURS}, not {name[:100]!r}")
    try:
        found: Any = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidInput(f"--topology: cannot find {name[:100]!r}: {error}") from error
    if not isinstance(found, Topology):
        raise InvalidInput(f"--topology: {name[:100]!r} is no Topology but a {type(found).__name__}")
    return found


async def _overview(database: Database, now_us: int) -> list[insight.QueueView]:
    async with database.read(snapshot=True) as tx:
        return await insight.overview(tx, now_us)


def _with_database(work: Callable[[Database], Awaitable[T]], *, read_only: bool) -> T:
    async def run() -> T:
        async with database_of_settings(read_only=read_only) as database:
            return await work(database)

    return asyncio.run(run())
