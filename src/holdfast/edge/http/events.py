"""The route of the event feed: what happened, in order."""

from __future__ import annotations

import re
from typing import Any

from litestar import Request, Router, get
from litestar.di import NamedDependency

from holdfast.bootstrap import System
from holdfast.edge.http.auth import Caller
from holdfast.errors import InvalidInput
from holdfast.services.feed.model import EventPage

EVENTS = "orders:read"
ID_MAX = 2**63 - 1
LIMIT = 100


@get("/events", summary="What happened")
async def read(
    request: Request[Any, Any, Any], caller: NamedDependency[Caller], system: NamedDependency[System]
) -> EventPage:
    """Events after an id, in order; a buyer's own, or all of them for staff with the scope orders:read."""
    given = asked(request, "after", "limit", "types")
    types = tuple(each for each in given.get("types", "").split(",") if each)
    return await system.events.read(
        after=number(given, "after", 0),
        limit=number(given, "limit", LIMIT),
        types=types,
        owner=None if EVENTS in caller.scopes else caller.subject,
    )


def asked(request: Request[Any, Any, Any], *known: str) -> dict[str, str]:
    """The parameters of a query, each once; raises `InvalidInput` for one that is not known or comes twice."""
    found: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name not in known:
            raise InvalidInput(f"the query may have {', '.join(known)}; not {name[:80]!r}")
        if name in found:
            raise InvalidInput(f"the query has {name} twice")
        found[name] = str(value)
    return found


def number(given: dict[str, str], name: str, default: int) -> int:
    """A parameter that is a number of at most 63 bits; raises `InvalidInput`."""
    text = given.get(name)
    if text is None:
        return default
    if not re.fullmatch(r"[0-9]{1,19}", text) or int(text) > ID_MAX:
        raise InvalidInput(f"{name} in the query is a whole number, not {text[:40]!r}")
    return int(text)


def router() -> Router:
    """The routes below /v1."""
    return Router(
        path="/v1",
        route_handlers=[read],
        tags=["events"],
    )
