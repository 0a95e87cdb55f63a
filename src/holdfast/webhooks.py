"""Signatures of webhooks by the Standard Webhooks rules, for those who send them and those who receive them."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets as chance
from collections.abc import Mapping, Sequence

from holdfast.clock import US_PER_S, Clock, SystemClock
from holdfast.errors import InvalidInput

PREFIX = "whsec_"
SECRET_BYTES = 32
TOLERANCE_S = 300
ID_HEADER = "webhook-id"
TIMESTAMP_HEADER = "webhook-timestamp"
SIGNATURE_HEADER = "webhook-signature"


class ForgedWebhook(InvalidInput):
    """A webhook whose signature, age or headers are wrong; believe nothing of it."""

    code = "forged_webhook"


def new_secret() -> str:
    """A new secret: `whsec_` and 32 random bytes in base64."""
    return PREFIX + base64.b64encode(chance.token_bytes(SECRET_BYTES)).decode()


def sign(secrets: Sequence[str], message_id: str, timestamp_s: int, raw: bytes) -> str:
    """The header `webhook-signature`: one signature for each secret; raises `InvalidInput` for an odd secret."""
    signed = f"{message_id}.{timestamp_s}.".encode() + raw
    macs = [hmac.new(_key(secret), signed, hashlib.sha256).digest() for secret in secrets]
    return " ".join(f"v1,{base64.b64encode(mac).decode()}" for mac in macs)


def verify(
    secrets: str | Sequence[str],
    headers: Mapping[str, str],
    raw: bytes,
    *,
    tolerance_s: int = TOLERANCE_S,
    clock: Clock | None = None,
) -> str:
    """Check a received webhook over its raw bytes, before they are parsed; answers its id, which names the event.

    Several secrets are for the time of a rotation. The same event may come again, with the same id. Raises
    `ForgedWebhook`. Signatures are compared in constant time.
    """
    given = {name.lower(): value for name, value in headers.items()}
    message_id, signatures = given.get(ID_HEADER, ""), given.get(SIGNATURE_HEADER, "")
    sent = given.get(TIMESTAMP_HEADER, "")
    if not message_id or not signatures or not sent.isascii() or not sent.isdecimal() or len(sent) > 12:
        raise ForgedWebhook(f"the headers {ID_HEADER}, {TIMESTAMP_HEADER} and {SIGNATURE_HEADER} are needed")
    now_s = (clock or SystemClock()).now_us() // US_PER_S
    if abs(now_s - int(sent)) > tolerance_s:
        raise ForgedWebhook(f"{TIMESTAMP_HEADER} is more than {tolerance_s} s away from this clock")
    known = [secrets] if isinstance(secrets, str) else secrets
    wanted = sign(known, message_id, int(sent), raw).encode().split()
    found = signatures.encode(errors="replace").split(b" ")
    # Every pair is compared, so that the time taken tells nothing of which one fits.
    if not sum(hmac.compare_digest(mine, theirs) for mine in wanted for theirs in found):
        raise ForgedWebhook("no signature fits; check the secret, and that the body is the bytes as they came")
    return message_id


def _key(secret: str) -> bytes:
    try:
        key = base64.b64decode(secret.removeprefix(PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not key:
        raise InvalidInput(f"a secret is {PREFIX} and base64; this one is not")
    return key
