"""Verbs of carts: put, take out. Each takes a batch within the caller's transaction."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from holdfast.clock import Clock
from holdfast.db.database import Tx
from holdfast.errors import HoldfastError
from holdfast.services.carts import store
from holdfast.services.carts.model import ITEMS_MAX, CartFull, Item, PutItem
from holdfast.services.contracts.values import Line


class Carts:
    """What carts can do; what a verb does commits with the caller's `tx` or not at all."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    async def put(self, tx: Tx, wishes: Sequence[PutItem]) -> list[list[Item] | HoldfastError]:
        """Let carts hold so many units of a SKU, which need not exist yet; answers each cart, or `CartFull`."""
        answers: list[list[Item] | HoldfastError] = []
        for wish in wishes:
            held = {line.sku for line in (await store.contents(tx, [wish.buyer])).get(wish.buyer, [])}
            if wish.quantity == 0:
                await store.take_out(tx, wish.buyer, [wish.sku])
            elif wish.sku not in held and len(held) >= ITEMS_MAX:
                answers.append(CartFull(f"a cart holds at most {ITEMS_MAX} different SKUs"))
                continue
            else:
                await store.put(tx, wish.buyer, wish.sku, wish.quantity, self._clock.now_us())
            answers.append(await store.read(tx, wish.buyer))
        return answers

    async def contents(self, tx: Tx, buyers: Collection[str]) -> Mapping[str, Sequence[Line]]:
        """The lines in these buyers' carts; who has none is missing."""
        return await store.contents(tx, buyers)

    async def clear(self, tx: Tx, ordered: Sequence[tuple[str, Sequence[str]]]) -> None:
        """Take out what was ordered, by (buyer, SKUs); safe to repeat."""
        for buyer, skus in ordered:
            await store.take_out(tx, buyer, skus)
