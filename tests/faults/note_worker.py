"""A consumer to be killed: `python -m tests.faults.note_worker URL`; it prints a dot whenever it has written an effect.

The dot comes before the commit, so a kill at the sight of one strikes between the write and the end of the ack, or soon
after.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence

from holdfast.db.database import Tx
from tests.conftest import WAIT_S, quick_settings
from tests.contract.notes import Ledger, Note, opened, with_messaging
from tests.faults.losses import consumer

DOT = b"."


async def work(url: str) -> None:
    """Write effects until killed."""

    async def effect(tx: Tx, notes: Sequence[Note]) -> None:
        for each in notes:
            await Ledger.write(tx, [each])
            os.write(sys.stdout.fileno(), DOT)

    async with opened(with_messaging(quick_settings(url), lease_ms=500)) as system:
        system.listen(consumer(effect))
        await asyncio.sleep(WAIT_S)


if __name__ == "__main__":
    asyncio.run(work(sys.argv[1]))
