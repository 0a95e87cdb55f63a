"""A worker process that dies between its business write and the commit: `python -m tests.contract.dying_worker URL`."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence

from holdfast.db.database import Tx
from tests.conftest import WAIT_S, quick_settings
from tests.contract.notes import Ledger, Note, effectively, opened

DIED = 17


async def work(url: str) -> None:
    """Take one note, write its effect, and be gone."""

    async def effect(tx: Tx, notes: Sequence[Note]) -> None:
        await Ledger.write(tx, notes)
        os._exit(DIED)  # no rollback, no goodbye: as kill -9 would

    async with opened(quick_settings(url)) as system:
        system.listen(effectively(effect))
        await asyncio.sleep(WAIT_S)


if __name__ == "__main__":
    asyncio.run(work(sys.argv[1]))
