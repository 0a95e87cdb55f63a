"""What differs, and what mends it. Pure: no await, no clock, no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from holdfast.audit import Check
from holdfast.clock import rfc3339
from holdfast.errors import Refused

Reason = Annotated[str, Meta(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f-\x9f]+\Z")]
Actor = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f-\x9f]+\Z")]


class State(StrEnum):
    """Where a difference is; the first two are still there when the books are compared."""

    OPEN = "open"
    DISMISSED = "dismissed"  # somebody knows of it and leaves it
    REPAIRED = "repaired"  # gone after its repair was run
    GONE = "gone"  # by itself, or by hand


LIVE = (State.OPEN, State.DISMISSED)


class Repair(StrEnum):
    """What can be done through the services' own verbs."""

    EXPIRE_ORDER = "expire_order"
    SETTLE_STOCK = "settle_stock"
    RELEASE_STOCK = "release_stock"
    TELL_PAYMENT = "tell_payment"
    LEARN_PAYMENT = "learn_payment"
    GIVE_BACK = "give_back"
    REMIND_REFUND = "remind_refund"
    ASK_REFUND = "ask_refund"
    REPLAY_MESSAGE = "replay_message"


WHAT: Mapping[Repair, str] = {
    Repair.EXPIRE_ORDER: "close the order as its deadline does: the trade at the provider first, then the order",
    Repair.SETTLE_STOCK: "ask what became of the order, then give back or deduct what is held for it",
    Repair.RELEASE_STOCK: "give back what is held for the order",
    Repair.TELL_PAYMENT: "tell orders again that the payment succeeded; they mark the order paid or ask for a refund",
    Repair.LEARN_PAYMENT: "ask the provider for the trade and apply its capture as a notice would",
    Repair.GIVE_BACK: "refund what is kept, or try the refund again that was refused",
    Repair.REMIND_REFUND: "ask the provider for the refund now",
    Repair.ASK_REFUND: "ask the provider for the refund again under its own id and book the answer",
    Repair.REPLAY_MESSAGE: "put the message back into its queue, as `holdfast errors replay` does",
}


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of difference: what names it, what mends it, or what a human has to do."""

    subject: tuple[str, ...]
    repair: Repair | None = None
    safe: bool = False  # may be run without asking
    human: str = ""


_COUNTERS = (
    "Counters are never changed by a repair: count the shelf, compare stock_task_detail and stock_ledger of this SKU, "
    "and book the difference as an adjustment."
)
_TRACE = "Rows were changed past the services: look into who wrote to the database, restore the row from the backup."
_MONEY = "Compare the payment with the provider's own page; book or give back what is missing by hand."

KINDS: Mapping[str, Kind] = {
    "stock.counters": Kind(subject=("sku", "warehouse"), human=_COUNTERS),
    "stock.rows": Kind(subject=("sku", "warehouse"), human=_COUNTERS),
    "stock.ledger_sums": Kind(subject=("sku", "warehouse"), human=_COUNTERS),
    "stock.ledger_kinds": Kind(subject=("entry_id",), human=_COUNTERS),
    "stock.ledger_entries": Kind(subject=("detail_id",), human=_TRACE),
    "stock.orders": Kind(subject=("order_id", "sku"), human=_TRACE),
    "stock.ghost_holds": Kind(
        subject=("detail_id",),
        repair=Repair.RELEASE_STOCK,
        human="Find out first what became of the order; units that were sold to it stay sold until they are adjusted.",
    ),
    "stock.outcome": Kind(
        subject=("detail_id",),
        human="Stock and order disagree for good: refund or ship by hand, then adjust the stock.",
    ),
    "stock.stranded": Kind(subject=("detail_id",), repair=Repair.SETTLE_STOCK, safe=True),
    "orders.path": Kind(subject=("order_id",), human=_TRACE),
    "orders.log_without_order": Kind(subject=("entry_id",), human=_TRACE),
    "orders.amount": Kind(subject=("order_id",), human=_TRACE),
    "orders.reply": Kind(subject=("order_id",), human=_TRACE),
    "orders.overdue": Kind(subject=("order_id",), repair=Repair.EXPIRE_ORDER, safe=True),
    "money.payment_order": Kind(subject=("order_id",), human=_TRACE),
    "money.paid": Kind(subject=("order_id",), human=_MONEY),
    "money.refunded": Kind(subject=("order_id",), human=_MONEY),
    "money.kept": Kind(subject=("order_id",), repair=Repair.GIVE_BACK, safe=True),
    "money.unnoticed": Kind(subject=("order_id",), repair=Repair.TELL_PAYMENT, safe=True),
    "money.unaccepted": Kind(subject=("payment_id",), repair=Repair.TELL_PAYMENT, safe=True),
    "money.payable": Kind(
        subject=("order_id",),
        human="Nobody can pay this order any more: let it close, and ask the buyer to order again.",
    ),
    "money.refunds": Kind(subject=("payment_id",), human=_MONEY),
    "money.refund_overdue": Kind(subject=("refund_id",), repair=Repair.REMIND_REFUND, safe=True),
    "money.notices": Kind(
        subject=("provider", "event_id"),
        human="Read the notice (payment_notice.raw): money may have come that no payment order expects; give it back "
        "at the provider, then dismiss this.",
    ),
    "messages.unsent": Kind(subject=("row_id",), human="No worker took it in time: see that `holdfast work` runs."),
    "messages.parked": Kind(
        subject=("row_id",),
        repair=Repair.REPLAY_MESSAGE,
        human="Read why with `holdfast errors show`; replay it once the cause is gone.",
    ),
    "messages.replays": Kind(subject=("row_id",), human="Its replay vanished: replay it again with `holdfast errors`."),
    "provider.capture_not_booked": Kind(subject=("provider", "payment_id"), repair=Repair.LEARN_PAYMENT, safe=True),
    "provider.capture_unknown": Kind(
        subject=("provider", "payment_id", "trade_no"),
        human="The provider took money for a payment that is not in the book: give it back at the provider.",
    ),
    "provider.capture_missing": Kind(
        subject=("provider", "payment_id"),
        human="The book has money that the provider denies: ask the provider, and hold the goods until it is clear.",
    ),
    "provider.amount_differs": Kind(subject=("provider", "payment_id", "trade_no"), human=_MONEY),
    "provider.refund_not_booked": Kind(subject=("provider", "refund_id"), repair=Repair.ASK_REFUND, safe=True),
    "provider.refund_unknown": Kind(
        subject=("provider", "payment_id", "trade_no", "refund_id"),
        human="Somebody gave money back past the book, perhaps on the provider's own page: find out who and why.",
    ),
    "provider.refund_missing": Kind(
        subject=("provider", "refund_id"),
        repair=Repair.ASK_REFUND,
        human="The book says that the money is back, the provider does not. Asking again under its id is once only.",
    ),
    "provider.refund_differs": Kind(subject=("provider", "refund_id"), human=_MONEY),
}

PROVIDER_KINDS = frozenset(name for name in KINDS if name.startswith("provider."))
CHANGING = frozenset({"attempt", "due_us"})
"""Facts of a row that change by themselves; a dismissed difference is not opened again for them."""


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """A difference as it was seen."""

    kind: str
    subject: str
    detail: dict[str, Any]


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """A difference as it stands in its table."""

    id: int
    kind: str
    subject: str
    detail: str
    repair: str
    advice: str
    state: str
    first_seen_us: int
    last_seen_us: int
    repair_us: int | None
    closed_us: int | None

    @property
    def facts(self) -> dict[str, Any]:
        """The row that was found."""
        facts: dict[str, Any] = msgspec.json.decode(self.detail)
        return facts

    @property
    def mend(self) -> Repair | None:
        """The proposed repair."""
        return Repair(self.repair) if self.repair else None


class DifferenceView(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A difference as staff see it; `advice` says what the repair does, or what a human has to do."""

    id: str
    kind: str
    subject: str
    state: State
    detail: dict[str, Any]
    repair: str | None
    safe: bool
    advice: str
    first_seen_at: str
    last_seen_at: str
    repair_at: str | None
    closed_at: str | None


class RunReport(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What one comparison saw; with `dry_run` nothing was written."""

    dry_run: bool
    kinds: int
    found: int
    new: int
    gone: int
    repaired: int
    notes: tuple[str, ...]
    differences: tuple[DifferenceView, ...]


class RepairReport(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What a repair did, or would do; `state` is the difference's afterwards, open while the repair is on its way."""

    id: str
    dry_run: bool
    repair: str
    what: str
    state: State


class DifferenceNotFound(Refused):
    """There is no such difference."""

    code = "difference_not_found"


class DifferenceClosed(Refused):
    """The difference is not open any more; there is nothing to repair or dismiss."""

    code = "difference_not_open"


class NoSafeRepair(Refused):
    """No repair can be run for this difference; a human has to look."""

    code = "no_safe_repair"


def kind_of(name: str) -> Kind:
    """What is known of a kind; a check that nobody wrote a repair for is named by all that it tells."""
    return KINDS.get(name, Kind(subject=(), human=_TRACE))


def found_row(name: str, row: Mapping[str, Any]) -> Found:
    """A row of a check as a difference."""
    columns = kind_of(name).subject or tuple(row)
    detail = {column: value if isinstance(value, str | None) else int(value) for column, value in row.items()}
    return Found(kind=name, subject=" ".join(f"{column}={row[column]}" for column in columns)[:500], detail=detail)


def advice_of(name: str) -> str:
    """What a repair does and what a human has to know."""
    kind = kind_of(name)
    parts = [WHAT[kind.repair]] if kind.repair else []
    return ". ".join([*parts, *([kind.human] if kind.human else [])])


def checks_of(names: frozenset[str] | None, checks: tuple[Check, ...]) -> list[Check]:
    """Those of the checks that were asked for, all of them without names."""
    return [check for check in checks if names is None or check.name in names]


def view(difference: Difference) -> DifferenceView:
    """A difference as staff see it."""

    def shown(at_us: int | None) -> str | None:
        return None if at_us is None else rfc3339(at_us)

    return DifferenceView(
        id=str(difference.id),
        kind=difference.kind,
        subject=difference.subject,
        state=State(difference.state),
        # Ids go out as text: readers that know only doubles would change their last digits.
        detail={
            name: str(value) if name.endswith("_id") and value is not None else value
            for name, value in difference.facts.items()
        },
        repair=difference.repair or None,
        safe=kind_of(difference.kind).safe,
        advice=difference.advice,
        first_seen_at=rfc3339(difference.first_seen_us),
        last_seen_at=rfc3339(difference.last_seen_us),
        repair_at=shown(difference.repair_us),
        closed_at=shown(difference.closed_us),
    )


def is_news(before: str, now: Mapping[str, Any]) -> bool:
    """Whether a difference says something else than before, but for what changes by itself."""
    old: dict[str, Any] = msgspec.json.decode(before)
    return {k: v for k, v in old.items() if k not in CHANGING} != {k: v for k, v in now.items() if k not in CHANGING}
