"""Rules of carts. Pure: no await, no clock, no I/O."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from holdfast.errors import Refused
from holdfast.services.contracts.values import Code

ITEMS_MAX = 500
CartQuantity = Annotated[int, Meta(ge=0, le=1_000_000)]


class Item(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """So many units of a SKU in a cart."""

    sku: str
    quantity: int


class PutItem(msgspec.Struct, frozen=True, kw_only=True):
    """A buyer's wish to have so many units of a SKU in his cart; 0 takes it out."""

    buyer: str
    sku: Code
    quantity: CartQuantity


class CartFull(Refused):
    """The cart holds as many different SKUs as it can; take one out first."""

    code = "cart_full"
