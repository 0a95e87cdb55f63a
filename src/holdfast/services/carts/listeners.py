"""Carts' listeners: message -> one action."""

from __future__ import annotations

from holdfast.db.database import Tx
from holdfast.errors import InvalidInput
from holdfast.messaging.listen import Listen
from holdfast.messaging.message import Message
from holdfast.services.carts.actions import Carts
from holdfast.services.contracts import topology
from holdfast.services.contracts.events import CartOrdered


def listeners(carts: Carts) -> list[Listen]:
    """What was ordered from a cart is taken out of it: of the cart that the header names, and of no other."""

    async def on_ordered(tx: Tx, event: CartOrdered, message: Message) -> None:
        buyer = message.headers.get(topology.USER_HEADER)
        if not buyer:
            raise InvalidInput(f"the header {topology.USER_HEADER} is missing: it says whose cart this is")
        await carts.clear(tx, [(buyer, event.skus)])

    return [Listen(name="carts.clear", queue=topology.CART_CLEAR_QUEUE, handlers=[on_ordered])]
