"""Refusals that several services give."""

from __future__ import annotations

from holdfast.errors import Refused


class KeyReused(Refused):
    """This idempotency key was used for another request; use a new key for a new one."""

    code = "idempotency_key_reused"
