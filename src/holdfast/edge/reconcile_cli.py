"""`holdfast reconcile`: compare the books now, look at what differs, mend it or leave it.

What reads opens the database read-only, beside a running server. What writes needs PostgreSQL or, on SQLite, that no
other process writes the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
import typer

from holdfast.edge.shop_cli import change, look
from holdfast.edge.terminal import actor_or_user, print_json, safe, table
from holdfast.errors import InvalidInput
from holdfast.reconciliation.model import DifferenceView, State
from holdfast.reconciliation.service import LIST_MAX, ReconciliationDesk

EXIT_FOUND = 1

Id = Annotated[
    int, typer.Argument(metavar="ID", min=1, max=2**63 - 1, help="Which difference, as `reconcile list` names it.")
]
Actor = Annotated[str | None, typer.Option("--actor", help="Who does this, for the log; the OS user if not given.")]
Reason = Annotated[str, typer.Option("--reason", help="Why, for the log.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Change nothing; say what would be done.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

app = typer.Typer(
    name="reconcile",
    help="Differences between the books: run, list, repair, dismiss.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.command()
def run(dry_run: DryRun = False, actor: Actor = None, reason: Reason = "", as_json: AsJson = False) -> None:
    """Compare everything now; status 1 if something differs."""
    who = actor_or_user(actor)
    report = change(lambda system: system.reconciliation.run(who, reason, dry_run=dry_run))
    if as_json:
        print_json(report)
    else:
        _differences_table(report.differences)
        for note in report.notes:
            typer.echo(safe(note))
        told = f"{report.new} new" if dry_run else f"{report.new} new, {report.gone} gone, {report.repaired} repaired"
        typer.echo(f"{report.found} differences: {told}")
    raise typer.Exit(EXIT_FOUND if report.found else 0)


@app.command("list")
def list_differences(
    state: Annotated[str, typer.Option(help="open, dismissed, repaired or gone.")] = "open",
    kind: Annotated[str | None, typer.Option(help="Of this kind only.")] = None,
    after: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Only ids above this one: the last of the page before.")
    ] = 0,
    limit: Annotated[int, typer.Option(min=1, max=LIST_MAX, help="At most so many.")] = 50,
    as_json: AsJson = False,
) -> None:
    """One line for each difference, oldest first."""
    if state not in list(State):
        raise InvalidInput(f"there is no state {state[:80]!r}; known: {', '.join(State)}")
    found = look(ReconciliationDesk, lambda desk: desk.list(states=[State(state)], kind=kind, after=after, limit=limit))
    if as_json:
        print_json(found)
    else:
        _differences_table(found)


@app.command()
def repair(
    difference_id: Id, reason: Reason, dry_run: DryRun = False, actor: Actor = None, as_json: AsJson = False
) -> None:
    """Run the repair that is proposed for a difference."""
    who = actor_or_user(actor)
    report = change(lambda system: system.reconciliation.repair(difference_id, who, reason, dry_run=dry_run))
    if as_json:
        print_json(report)
    else:
        typer.echo(f"would {safe(report.what)}" if dry_run else f"{report.id} is {report.state}: {safe(report.what)}")


@app.command()
def dismiss(difference_id: Id, reason: Reason, actor: Actor = None, as_json: AsJson = False) -> None:
    """Leave a difference as it is; it is not proposed again while it says the same."""
    who = actor_or_user(actor)
    difference = change(lambda system: system.reconciliation.dismiss(difference_id, who, reason))
    if as_json:
        print_json(difference)
    else:
        typer.echo(f"{difference.id} is {difference.state}")


def _differences_table(found: Sequence[DifferenceView]) -> None:
    rows = [
        (
            *(each.id, each.kind, each.subject, each.state.value, each.first_seen_at, each.repair or "by hand"),
            *(msgspec.json.encode(each.detail).decode(), each.advice),
        )
        for each in found
    ]
    table(("id", "kind", "subject", "state", "first seen", "repair", "row", "what to do"), rows)
