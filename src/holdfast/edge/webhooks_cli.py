"""`holdfast webhooks`: where events are sent, what became of them, and sending them again.

What reads opens the database read-only, beside a running server. What changes needs PostgreSQL or, on SQLite, that no
other process writes the file. Nothing is sent from here: running workers are woken.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Annotated, TypeVar

import msgspec
import typer

from holdfast.bootstrap import HISTORIES, webhook_desk
from holdfast.clock import microseconds
from holdfast.db.migrate import require_current
from holdfast.edge.terminal import database_of_settings, print_json, safe, table
from holdfast.errors import InvalidInput
from holdfast.services.webhooks.model import DeliveryLog, EndpointWithSecret, NewEndpoint
from holdfast.services.webhooks.service import LIMIT_MAX, WebhookBook, WebhookDesk
from holdfast.settings import load

T = TypeVar("T")

Id = Annotated[int, typer.Argument(metavar="ID", min=1, help="Which webhook, as `webhooks list` names it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

app = typer.Typer(
    name="webhooks",
    help="Where events are sent: list, add, rotate, deliveries, replay, remove.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.command("list")
def list_webhooks(as_json: AsJson = False) -> None:
    """Every webhook, without secrets."""
    found = _read(lambda book: book.every())
    if as_json:
        print_json(found)
        return
    rows = [
        (
            each.id,
            "enabled" if each.enabled else f"disabled: {each.disabled_reason}",
            each.failing_since or "",
            ",".join(each.types) or "all",
            each.url,
        )
        for each in found
    ]
    table(("id", "state", "failing since", "types", "url"), rows)


@app.command()
def add(
    url: Annotated[str, typer.Argument(metavar="URL", help="Where to post events: https://...")],
    types: Annotated[list[str] | None, typer.Option("--type", help="Only this type; may be repeated.")] = None,
    description: Annotated[str, typer.Option("--description", help="For those who read the list.")] = "",
    as_json: AsJson = False,
) -> None:
    """Send events to a URL from now on; prints the secret, this once."""
    try:
        wish = msgspec.convert({"url": url, "description": description, "types": types or []}, NewEndpoint)
    except msgspec.ValidationError as error:
        raise InvalidInput(f"this is no webhook: {error}") from None
    _told(_change(lambda desk: desk.add(wish)), as_json)


@app.command()
def rotate(webhook_id: Id, as_json: AsJson = False) -> None:
    """A new secret; the former one signs too for a while."""
    _told(_change(lambda desk: desk.rotate(webhook_id)), as_json)


@app.command()
def deliveries(
    webhook_id: Id,
    delivery: Annotated[int | None, typer.Option("--delivery", min=1, help="Show one with its attempts.")] = None,
    status: Annotated[str | None, typer.Option("--status", help="pending, done, failed or cancelled.")] = None,
    before: Annotated[int, typer.Option("--before", min=0, help="Only ids below: the last of the page before.")] = 0,
    limit: Annotated[int, typer.Option("--limit", min=1, max=LIMIT_MAX, help="At most so many.")] = 50,
    as_json: AsJson = False,
) -> None:
    """What was sent to a webhook, the newest first."""
    if delivery is not None:
        _show(_read(lambda book: book.delivery(webhook_id, delivery)), as_json)
        return
    found = _read(lambda book: book.deliveries(webhook_id, status=status, before=before, limit=limit))
    if as_json:
        print_json(found)
        return
    rows = [
        (each.id, each.event, each.type, each.status, str(each.attempts), each.next_at or "", _last(each))
        for each in found
    ]
    table(("id", "event", "type", "status", "attempts", "next", "last"), rows)


@app.command()
def replay(
    webhook_id: Id,
    delivery: Annotated[int | None, typer.Option("--delivery", min=1, help="This one.")] = None,
    failed_since: Annotated[
        str | None, typer.Option("--failed-since", help="All that failed since, e.g. 2026-01-31T08:30:00Z.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Send one delivery again, or all that failed since an instant."""
    since_us = None if failed_since is None else _instant(failed_since)
    found = _change(lambda desk: desk.replay(webhook_id, delivery_id=delivery, failed_since_us=since_us))
    if as_json:
        print_json({"replayed": found})
    else:
        typer.echo(f"replayed {found}")


@app.command()
def remove(webhook_id: Id, as_json: AsJson = False) -> None:
    """Send nothing there any more; what is on its way is cancelled."""
    _change(lambda desk: desk.remove(webhook_id))
    if as_json:
        print_json({"removed": str(webhook_id)})
    else:
        typer.echo(f"removed {webhook_id}")


def _read(ask: Callable[[WebhookBook], Awaitable[T]]) -> T:
    async def run() -> T:
        async with database_of_settings(read_only=True) as database:
            await require_current(database, HISTORIES)
            return await ask(WebhookBook(database))

    return asyncio.run(run())


def _change(ask: Callable[[WebhookDesk], Awaitable[T]]) -> T:
    async def run() -> T:
        async with webhook_desk(load()) as desk:
            return await ask(desk)

    return asyncio.run(run())


def _instant(text: str) -> int:
    try:
        return max(0, microseconds(datetime.fromisoformat(text)))
    except ValueError as error:
        raise InvalidInput(f"--failed-since: {error}") from None


def _told(endpoint: EndpointWithSecret, as_json: bool) -> None:
    if as_json:
        print_json(endpoint)
        return
    typer.echo(f"id: {endpoint.id}")
    typer.echo(f"url: {safe(endpoint.url)}")
    typer.echo(f"secret: {endpoint.secret}")
    if endpoint.previous_secret_until:
        typer.echo(f"the former secret signs too until {endpoint.previous_secret_until}")


def _last(delivery: object) -> str:
    status, error = getattr(delivery, "last_status", None), getattr(delivery, "last_error", None)
    return str(status) if status is not None else error or ""


def _show(delivery: DeliveryLog, as_json: bool) -> None:
    if as_json:
        print_json(delivery)
        return
    for name in ("id", "event", "type", "status", "attempts", "created_at", "next_at"):
        typer.echo(f"{name.removesuffix('_at')}: {getattr(delivery, name) or ''}")
    typer.echo(f"body: {safe(msgspec.json.encode(delivery.body).decode())}")
    for each in delivery.log:
        told = each.error if each.status is None else f"{each.status} {each.answer}"
        typer.echo(f"{each.at} attempt {each.attempt}, {each.took_ms} ms: {safe(told or '')}")
