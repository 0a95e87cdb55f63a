"""Resolution: the addresses of a host, refused unless all of them may be connected to."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

from holdfast.services.webhooks.model import ForbiddenUrl, is_public

RESOLVE_S = 5.0


class SafeResolver:
    """Asks the system's resolver. One address that is not public refuses the host, unless private ones are allowed."""

    def __init__(self, *, allow_private: bool) -> None:
        self._allow_private = allow_private

    async def addresses(self, host: str, port: int) -> Sequence[str]:
        """The host's addresses, in the resolver's order; raises `ForbiddenUrl`, or `OSError` when there are none."""
        async with asyncio.timeout(RESOLVE_S):
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(each[4][0]) for each in found))
        if not addresses:
            raise OSError(f"{host} has no address")
        if not self._allow_private and not all(is_public(each) for each in addresses):
            raise ForbiddenUrl(f"{host[:100]} has an address that is not public; nothing is sent there")
        return addresses
