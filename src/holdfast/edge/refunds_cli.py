"""`holdfast refunds`: look at money on its way back, give some back, have the provider asked again.

What reads opens the database read-only, beside a running server. What writes needs PostgreSQL or, on SQLite, that no
other process writes the file; the provider is asked by the workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from holdfast.clock import rfc3339
from holdfast.edge.shop_cli import change, look
from holdfast.edge.terminal import actor_or_user, print_json, safe, table
from holdfast.services.payments.model import RefundView, RefundWish, refund_view
from holdfast.services.payments.refund_service import LIST_MAX, RefundDesk

Id = Annotated[
    int, typer.Argument(metavar="ID", min=1, max=2**63 - 1, help="Which refund, as `refunds list` names it.")
]
Actor = Annotated[str | None, typer.Option("--actor", help="Who does this; the OS user if not given.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

app = typer.Typer(
    name="refunds",
    help="Money given back: list, show, create, retry.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.command("list")
def list_refunds(
    payment: Annotated[int | None, typer.Option(min=1, max=2**63 - 1, help="Of this payment only.")] = None,
    after: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Only ids above this one: the last of the page before.")
    ] = 0,
    limit: Annotated[int, typer.Option(min=1, max=LIST_MAX, help="At most so many.")] = 50,
    as_json: AsJson = False,
) -> None:
    """One line for each refund, oldest first."""
    found = look(RefundDesk, lambda desk: desk.list(after=after, limit=limit, payment_id=payment))
    if as_json:
        print_json(found)
    else:
        _refunds_table(found)


@app.command()
def show(refund_id: Id, as_json: AsJson = False) -> None:
    """One refund and what happened to it."""

    async def whole(desk: RefundDesk) -> tuple[RefundView, Sequence[Mapping[str, Any]]]:
        return await desk.get(refund_id), await desk.steps(refund_id)

    refund, steps = look(RefundDesk, whole)
    if as_json:
        print_json({"refund": refund, "steps": [{**step, "id": str(step["id"])} for step in steps]})
        return
    for name in RefundView.__struct_fields__:
        typer.echo(f"{name}: {safe(str(getattr(refund, name)))}")
    for step in steps:
        why = f": {safe(step['detail'])}" if step["detail"] else ""
        typer.echo(f"{rfc3339(step['at_us'])} {safe(step['actor'])} {step['to_status']}{why}")


@app.command()
def create(
    reason: Annotated[str, typer.Option(help="Why the money goes back.")],
    key: Annotated[str, typer.Option(help="Makes it count once: the same key again gives the same refund.")],
    payment: Annotated[int | None, typer.Option(min=1, max=2**63 - 1, help="Of this payment.")] = None,
    order: Annotated[int | None, typer.Option(min=1, max=2**63 - 1, help="Of this order's payment.")] = None,
    amount: Annotated[int | None, typer.Option(min=1, help="In minor units; all that is left if not given.")] = None,
    actor: Actor = None,
    as_json: AsJson = False,
) -> None:
    """Put a refund on the books; the workers ask the provider for it."""
    wish = RefundWish(
        key=key, actor=actor_or_user(actor), reason=reason, payment_id=payment, order_id=order, amount_minor=amount
    )
    booked = change(lambda system: system.refunds.request(wish))
    if as_json:
        print_json(refund_view(booked.refund))
    else:
        again = ", as before" if booked.replayed else ""
        typer.echo(f"refund {booked.refund.id} of {booked.refund.amount_minor} {booked.refund.currency}{again}")


@app.command()
def retry(refund_id: Id, actor: Actor = None, as_json: AsJson = False) -> None:
    """Have the provider asked again for a pending refund, or for one that it refused."""
    refund = change(lambda system: system.refunds.retry(refund_id, actor_or_user(actor)))
    if as_json:
        print_json(refund)
    else:
        typer.echo(f"refund {refund.id} is {refund.status}; the provider is asked again")


def _refunds_table(found: Sequence[RefundView]) -> None:
    rows = [
        (
            *(each.id, each.payment_id, each.order_id, each.status.value, each.kind),
            *(str(each.amount_minor), each.currency, each.created_at, each.actor, each.reason),
        )
        for each in found
    ]
    table(("id", "payment", "order", "status", "kind", "amount", "currency", "created", "actor", "reason"), rows)
