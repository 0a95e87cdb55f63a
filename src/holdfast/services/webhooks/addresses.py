"""Resolution: the addresses of a host, refused unless all of them may be connected to."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from holdfast.services.webhooks.model import ForbiddenUrl, is_public

RESOLVE_S = 5.0
THREADS = 32

Key = tuple[str, int]


class SafeResolver:
    """Asks the system's resolver. One address that is not public refuses the host, unless private ones are allowed.

    A question whose answer does not come keeps a thread busy, which cannot be stopped. So there are threads for this
    alone, and a host is asked about once at a time: whoever asks meanwhile waits for the same answer.
    """

    def __init__(self, *, allow_private: bool) -> None:
        self._allow_private = allow_private
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="webhook-names")
        self._asking: dict[Key, asyncio.Future[list[str]]] = {}

    async def addresses(self, host: str, port: int) -> Sequence[str]:
        """The host's addresses, in the resolver's order; raises `ForbiddenUrl`, or `OSError` when there are none."""
        async with asyncio.timeout(RESOLVE_S):
            addresses = await asyncio.shield(self._ask((host, port)))
        if not addresses:
            raise OSError(f"{host} has no address")
        if not self._allow_private and not all(is_public(each) for each in addresses):
            raise ForbiddenUrl(f"{host[:100]} has an address that is not public; nothing is sent there")
        return addresses

    def close(self) -> None:
        """Let go of the threads; does not wait for answers."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _ask(self, key: Key) -> asyncio.Future[list[str]]:
        asked = self._asking.get(key)
        if asked is None:
            asked = asyncio.get_running_loop().run_in_executor(self._threads, _resolved, *key)
            self._asking[key] = asked
            asked.add_done_callback(lambda answered: self._answered(key, answered))
        return asked

    def _answered(self, key: Key, answered: asyncio.Future[list[str]]) -> None:
        del self._asking[key]
        if not answered.cancelled():
            answered.exception()  # seen, though nobody may be waiting any more


def _resolved(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(each[4][0]) for each in found))
