"""Alipay's RSA2 signatures: keys as its console gives them, what is signed, signing and checking. No I/O.

RSA2 is SHA256withRSA with PKCS#1 v1.5 padding, in base64. The older RSA (SHA-1) is neither made nor taken.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Mapping

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_der_private_key, load_der_public_key

from holdfast.errors import InvalidSettings
from holdfast.settings import Secret

SIGN_TYPE = "RSA2"
KEY_BITS_MIN = 2048


class Keys:
    """The app's private key and Alipay's public key; neither shows itself in a repr."""

    __slots__ = ("_alipay", "_app")

    def __init__(self, app: RSAPrivateKey, alipay: RSAPublicKey) -> None:
        self._app = app
        self._alipay = alipay

    def __repr__(self) -> str:
        return "Keys('***')"

    def sign(self, content: bytes) -> str:
        """The app's signature, the same each time."""
        return base64.b64encode(self._app.sign(content, PKCS1v15(), SHA256())).decode()

    def signed_by_alipay(self, content: bytes, signature: str) -> bool:
        """Whether Alipay signed exactly these bytes."""
        try:
            self._alipay.verify(base64.b64decode(signature, validate=True), content, PKCS1v15(), SHA256())
        except (InvalidSignature, ValueError):  # no base64 is no signature either
            return False
        return True


def signed_content(parameters: Mapping[str, str], *without: str) -> bytes:
    """What a signature over parameters covers: `name=value` sorted by name, joined by `&`, as text before encoding."""
    chosen = sorted((name, value) for name, value in parameters.items() if name not in without)
    return "&".join(f"{name}={value}" for name, value in chosen).encode()


def read_keys(app_private: Secret, alipay_public: str) -> Keys:
    """Read the keys: PEM, or the bare base64 that Alipay's key tool and console give (PKCS#8 or PKCS#1).

    Raises `InvalidSettings` that says which key it is and where to take it from; it never shows a private key.
    """
    app = _loaded("private_key", app_private.reveal(), lambda der: load_der_private_key(der, password=None))
    alipay = _loaded("public_key", alipay_public, load_der_public_key)
    if not isinstance(app, RSAPrivateKey) or app.key_size < KEY_BITS_MIN:
        raise _unfit("private_key", f"it is no RSA private key of {KEY_BITS_MIN} bits or more")
    if not isinstance(alipay, RSAPublicKey) or alipay.key_size < KEY_BITS_MIN:
        raise _unfit("public_key", f"it is no RSA public key of {KEY_BITS_MIN} bits or more")
    if alipay.public_numbers() == app.public_key().public_numbers():
        raise _unfit("public_key", "it is your app's own public key, with which no answer of Alipay can be checked")
    return Keys(app, alipay)


def _loaded(name: str, text: str, load: Callable[[bytes], object]) -> object:
    body = re.sub(r"-----(BEGIN|END) [A-Z ]+-----|\s", "", text)
    try:
        return load(base64.b64decode(body, validate=True))
    except (ValueError, TypeError, binascii.Error, UnsupportedAlgorithm):
        raise _unfit(name, "it cannot be read as a key") from None  # the cause could quote a private key


def _unfit(name: str, why: str) -> InvalidSettings:
    where = {
        "private_key": "give the private key that you made for the app, as PEM or base64 (RSA2, PKCS#8 or PKCS#1)",
        "public_key": "take Alipay's public key from the app's page at open.alipay.com (not the app's public key)",
    }
    return InvalidSettings(f"HOLDFAST_PAYMENTS__ALIPAY_{name.upper()} (or its file): {why}; {where[name]}")
