"""`holdfast errors`: look at messages that were given up on, mend them, send them again or drop them.

What reads opens the database read-only, beside a running server. What writes needs PostgreSQL or, on SQLite, that no
other process writes the file.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import typer

from holdfast.clock import SystemClock, rfc3339
from holdfast.edge.terminal import actor_named, database_of_settings, print_json, safe, table
from holdfast.errors import InvalidInput
from holdfast.ids import IdSource
from holdfast.messaging.codec import BODY_BYTES_MAX
from holdfast.messaging.error_store import LIST_MAX, ErrorStore
from holdfast.messaging.parked import OPEN, FailureGroup, Outcome, ParkedMessage, ParkedSummary

T = TypeVar("T")

EXIT_LEFT = 1

Id = Annotated[int, typer.Argument(metavar="ID", min=1, help="Which message, as `errors list` names it.")]
Ids = Annotated[
    list[int] | None, typer.Argument(metavar="ID", min=1, help="Which messages; or --group, --queue, --all.")
]
OfGroup = Annotated[str | None, typer.Option("--group", help="All of one group, as `errors groups` names it.")]
OfQueue = Annotated[str | None, typer.Option("--queue", help="All of one queue.")]
All = Annotated[bool, typer.Option("--all", help="Everything that is parked.")]
Actor = Annotated[str | None, typer.Option("--actor", help="Who does this, for the audit; the OS user if not given.")]
Reason = Annotated[str, typer.Option("--reason", help="Why, for the audit.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

app = typer.Typer(
    name="errors",
    help="Messages that were given up on: groups, list, show, edit, replay, discard.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.command()
def groups(queue: OfQueue = None, as_json: AsJson = False) -> None:
    """Open messages by queue, exception and stack, the largest group first."""
    found = _ask(lambda store: store.groups(queue))
    if as_json:
        print_json([{**msgspec.to_builtins(each), "count": each.count} for each in found])
    else:
        _groups_table(found)


@app.command("list")
def list_messages(
    queue: OfQueue = None,
    group: OfGroup = None,
    state: Annotated[
        list[str] | None,
        typer.Option("--state", help="parked, pending, done or discarded; the first two if not given."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=LIST_MAX, help="At most so many.")] = 50,
    after: Annotated[int, typer.Option(min=0, help="Only ids above this one: the last of the page before.")] = 0,
    as_json: AsJson = False,
) -> None:
    """One line for each message, oldest first."""
    states: Any = tuple(state) if state else OPEN  # the store refuses what is no state
    found = _ask(lambda store: store.list(queue, group, states=states, limit=limit, after=after))
    if as_json:
        print_json([_plain(each) for each in found])
    else:
        _list_table(found)


@app.command()
def show(
    parked_id: Id,
    body: Annotated[bool, typer.Option("--body", help="Print the bytes of the body and nothing else.")] = False,
    as_json: AsJson = False,
) -> None:
    """Everything about one message: properties, headers, body, the error, and what was done with it."""
    message = _ask(lambda store: store.show(parked_id))
    if body:
        typer.echo(message.body, nl=False)
    elif as_json:
        print_json({**_plain(message), **_body("body", message.body), "error_headers": message.error_headers})
    else:
        _show(message)


@app.command()
def edit(
    parked_id: Id,
    body_file: Annotated[
        str | None, typer.Option("--body-file", help="A file with the new body; - for standard input.")
    ] = None,
    header: Annotated[list[str] | None, typer.Option("--header", help="NAME=VALUE to set; may be repeated.")] = None,
    drop_header: Annotated[list[str] | None, typer.Option("--drop-header", help="A NAME to remove.")] = None,
    actor: Actor = None,
    reason: Reason = "",
    as_json: AsJson = False,
) -> None:
    """Change the body or headers of a parked message; the audit keeps what was before."""
    headers: dict[str, str | None] = {}
    for each in header or ():
        name, equals, value = each.partition("=")
        if not equals:
            raise InvalidInput("write a header as NAME=VALUE")
        headers[name] = value
    headers |= dict.fromkeys(drop_header or ())
    new_body = None if body_file is None else _read(body_file)
    who = actor_named(actor)
    _change(lambda store: store.edit(parked_id, actor=who, body=new_body, headers=headers, reason=reason))
    if as_json:
        print_json({"edited": str(parked_id)})
    else:
        typer.echo(f"edited {parked_id}; `holdfast errors replay {parked_id}` sends it")


@app.command()
def replay(
    ids: Ids = None,
    group: OfGroup = None,
    queue: OfQueue = None,
    everything: All = False,
    rate: Annotated[float | None, typer.Option("--rate", help="So many a second; all at once if not given.")] = None,
    actor: Actor = None,
    reason: Reason = "",
    as_json: AsJson = False,
) -> None:
    """Put parked messages back into their queues; status 1 if one named by id was parked no more."""
    who = actor_named(actor)
    _told(
        "replayed",
        _change(
            lambda store: store.replay(
                ids, group=group, queue=queue, everything=everything, actor=who, per_second=rate, reason=reason
            )
        ),
        as_json,
    )


@app.command()
def discard(
    ids: Ids = None,
    group: OfGroup = None,
    queue: OfQueue = None,
    everything: All = False,
    actor: Actor = None,
    reason: Reason = "",
    as_json: AsJson = False,
) -> None:
    """Give parked messages up for good, which needs a --reason; they can still be shown."""
    who = actor_named(actor)
    _told(
        "discarded",
        _change(
            lambda store: store.discard(ids, group=group, queue=queue, everything=everything, actor=who, reason=reason)
        ),
        as_json,
    )


# -- the database -----------------------------------------------------------------------------------------------------


def _ask(question: Callable[[ErrorStore], Awaitable[T]]) -> T:
    return asyncio.run(_run(question, read_only=True))


def _change(work: Callable[[ErrorStore], Awaitable[T]]) -> T:
    return asyncio.run(_run(work, read_only=False))


async def _run(work: Callable[[ErrorStore], Awaitable[T]], *, read_only: bool) -> T:
    async with _store(read_only=read_only) as store:
        return await work(store)


@asynccontextmanager
async def _store(*, read_only: bool) -> AsyncIterator[ErrorStore]:
    async with database_of_settings(read_only=read_only) as database:
        clock = SystemClock()
        yield ErrorStore(database, clock, IdSource(clock))


def _read(name: str) -> bytes:
    """The new body; one byte more than is allowed is enough to refuse it."""
    if name == "-":
        return sys.stdin.buffer.read(BODY_BYTES_MAX + 1)
    try:
        with Path(name).open("rb") as file:
            return file.read(BODY_BYTES_MAX + 1)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "no file can have this name"
        raise InvalidInput(f"cannot read --body-file {name[:200]!r}: {why}") from error


# -- what is printed --------------------------------------------------------------------------------------------------


def _told(verb: str, outcome: Outcome, as_json: bool) -> None:
    """Say what was moved and what was left; ends with status 1 when something asked for by id was left."""
    if as_json:
        left = {str(each): state for each, state in outcome.left.items()}
        print_json({verb: [str(each) for each in outcome.ids], "count": outcome.count, "left": left})
    else:
        typer.echo(f"{verb} {outcome.count} {'message' if outcome.count == 1 else 'messages'}")
        for each, state in outcome.left.items():
            typer.echo(f"left {each} alone: it is {state}", err=True)
    raise typer.Exit(EXIT_LEFT if outcome.left else 0)


def _plain(message: ParkedSummary) -> dict[str, Any]:
    """For JSON; an id is text, since readers that know only doubles would change its last digits."""
    fields = msgspec.to_builtins(message, builtin_types=(bytes,))
    fields.pop("body", None)
    for line in fields.get("audit", ()):
        for name in ("body_before", "body_after"):
            line.update(_body(name, line.pop(name)))
    return {**fields, "id": str(message.id)}


def _body(name: str, body: bytes | None) -> dict[str, Any]:
    """Bytes for JSON: as base64, and as text where they are UTF-8."""
    if body is None:
        return {name: None}
    return {f"{name}_base64": msgspec.to_builtins(body), name: _text(body)}


def _text(body: bytes) -> str | None:
    try:
        return body.decode()
    except UnicodeDecodeError:
        return None


def _groups_table(found: Sequence[FailureGroup]) -> None:
    rows = [
        (
            *(each.group, each.queue, str(each.parked), str(each.pending), str(each.loops_max), each.error, each.type),
            *(rfc3339(each.first_us), rfc3339(each.last_us), _line(each.reason)),
        )
        for each in found
    ]
    table(("group", "queue", "parked", "pending", "loops", "error", "type", "first", "last", "reason"), rows)


def _list_table(found: Sequence[ParkedSummary]) -> None:
    rows = [
        (
            *(str(each.id), each.state, each.queue, each.type, each.message_id, str(each.loops)),
            *(rfc3339(each.failed_us), _line(each.reason)),
        )
        for each in found
    ]
    table(("id", "state", "queue", "type", "message id", "loops", "last failed", "reason"), rows)


def _show(message: ParkedMessage) -> None:
    for name in ParkedSummary.__struct_fields__[:-1]:  # the reason, which is long, comes last
        value = getattr(message, name)
        told = rfc3339(value) if name.endswith("_us") else safe(str(value))
        typer.echo(f"{name.removesuffix('_us')}: {told}")
    for name, value in message.headers.items():
        typer.echo(f"header {safe(name)}: {safe(value)}")
    text = _text(message.body)
    shown = safe(text) if text is not None else "no text; `--body` prints the bytes"
    typer.echo(f"body ({len(message.body)} bytes): {shown}")
    typer.echo(f"reason: {safe(message.reason)}")
    for line in message.audit:
        why = f": {safe(line.reason)}" if line.reason else ""
        typer.echo(f"{rfc3339(line.at_us)} {safe(line.actor)} {line.action}{why}")


def _line(reason: str) -> str:
    return reason.partition("\n")[0][:200]
