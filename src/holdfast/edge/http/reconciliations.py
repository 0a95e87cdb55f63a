"""Routes of reconciliation, all for staff."""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import Request, Router, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, RawBody

from holdfast.bootstrap import System
from holdfast.edge.http.auth import Caller, staff
from holdfast.edge.http.reading import body_of, page_of, row_id
from holdfast.errors import InvalidInput
from holdfast.reconciliation.model import DifferenceNotFound, DifferenceView, Reason, RepairReport, State
from holdfast.reconciliation.service import LIST_MAX

RECONCILIATIONS = "reconciliations:write"


class RepairBody(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """Why, and whether to say only what would be done."""

    reason: Reason
    dry_run: bool = False


class DismissBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why it is left as it is."""

    reason: Reason


class DifferencePage(msgspec.Struct, frozen=True, kw_only=True):
    """Differences in order of id; `next` is the `after` of the next page, if there may be one."""

    items: list[DifferenceView]
    next: str | None


_read_repair = body_of(RepairBody)
_read_dismiss = body_of(DismissBody)


@get("/reconciliations", summary="Differences between the books (staff)", **staff(RECONCILIATIONS))
async def page(
    request: Request[Any, Any, Any], caller: NamedDependency[Caller], system: NamedDependency[System]
) -> DifferencePage:
    """Differences in order of id: the open ones, or those in another state; of one kind or of all."""
    query = request.query_params
    after, limit = page_of(query, LIST_MAX)
    try:
        state = State(query.get("state", State.OPEN))
    except ValueError:
        raise InvalidInput(f"state is one of {', '.join(State)}") from None
    found = await system.reconciliation.list(states=[state], kind=query.get("kind"), after=after, limit=limit)
    return DifferencePage(items=list(found), next=found[-1].id if len(found) == limit else None)


@post(
    "/reconciliations/{difference_id:str}/repair",
    summary="Repair a difference (staff)",
    status_code=200,
    **staff(RECONCILIATIONS),
)
async def repair(
    difference_id: FromPath[str],
    body: RawBody,
    caller: NamedDependency[Caller],
    system: NamedDependency[System],
) -> RepairReport:
    """Run the proposed repair, or say what it would do."""
    data = _read_repair(body)
    known = checked(difference_id)
    return await system.reconciliation.repair(known, caller.subject, data.reason, dry_run=data.dry_run)


@post(
    "/reconciliations/{difference_id:str}/dismiss",
    summary="Leave a difference as it is (staff)",
    status_code=200,
    **staff(RECONCILIATIONS),
)
async def dismiss(
    difference_id: FromPath[str],
    body: RawBody,
    caller: NamedDependency[Caller],
    system: NamedDependency[System],
) -> DifferenceView:
    """Leave it; it is not proposed again while it says the same."""
    data = _read_dismiss(body)
    return await system.reconciliation.dismiss(checked(difference_id), caller.subject, data.reason)


def checked(text: str) -> int:
    """The id of a difference from a path; what is no id names none."""
    known = row_id(text)
    if known is None:
        raise DifferenceNotFound
    return known


def router() -> Router:
    """The routes below /v1."""
    handlers: list[Any] = [page, repair, dismiss]
    return Router(path="/v1", route_handlers=handlers, tags=["reconciliations"])
