"""Routes of carts."""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import Router, get, put
from litestar.di import NamedDependency
from litestar.params import FromPath, RawBody

from holdfast.bootstrap import System
from holdfast.edge.http.auth import Caller
from holdfast.edge.http.reading import body_of
from holdfast.edge.http.stock import checked
from holdfast.services.carts.model import CartQuantity, Item, PutItem


class ItemBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many units of a SKU; 0 takes it out."""

    quantity: CartQuantity


_read_item = body_of(ItemBody)


@get("/cart", summary="What is in the cart")
async def read(caller: NamedDependency[Caller], system: NamedDependency[System]) -> list[Item]:
    """The caller's own cart, in order of SKU."""
    return await system.carts.read(caller.subject)


@put("/cart/{sku:str}", summary="Put into the cart")
async def keep(
    sku: FromPath[str], body: RawBody, caller: NamedDependency[Caller], system: NamedDependency[System]
) -> list[Item]:
    """Let the caller's cart hold so many units of a SKU; answers the cart."""
    wish = PutItem(buyer=caller.subject, sku=checked(sku), quantity=_read_item(body).quantity)
    return await system.carts.put(wish)


def router() -> Router:
    """The routes below /v1."""
    handlers: list[Any] = [read, keep]
    return Router(path="/v1", route_handlers=handlers, tags=["carts"])
