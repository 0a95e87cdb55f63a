"""What stock asks of other services, in its own words."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

from holdfast.services.contracts.values import Fate


class Orders(Protocol):
    """Orders, as those see them who hold something for one."""

    async def fates(self, order_ids: Collection[int]) -> Mapping[int, Fate]:
        """What those orders that exist mean; raises when that is not known, and unknown means keep holding."""
        ...
