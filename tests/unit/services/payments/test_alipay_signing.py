"""RSA2 signatures: known answers of OpenSSL and of Alipay's own library, keys in every form, keys that do not fit."""

from __future__ import annotations

import pytest
from alipay.aop.api.util.SignatureUtils import get_sign_content, sign_with_rsa2, verify_with_rsa
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.errors import InvalidSettings
from holdfast.services.payments.alipay_signing import read_keys, signed_content
from holdfast.settings import Secret
from tests.servers.alipay import bare
from tests.servers.alipay_keys import ALIPAY_PRIVATE, ALIPAY_PUBLIC, APP_PRIVATE, APP_PUBLIC
from tests.unit.given import steady

# The example of Alipay's documentation: the parameters of a notice, and the text that its signature covers.
EXAMPLE = {
    "total_amount": "2.00",
    "buyer_id": "2088102116773037",
    "body": "大乐透2.1",
    "trade_no": "2016071921001003030200089909",
    "refund_fee": "0.00",
    "notify_time": "2016-07-19 14:10:49",
    "subject": "大乐透2.1",
    "sign_type": "RSA2",
    "charset": "utf-8",
    "notify_type": "trade_status_sync",
    "out_trade_no": "0719141034-6418",
    "gmt_close": "2016-07-19 14:10:46",
    "gmt_payment": "2016-07-19 14:10:47",
    "trade_status": "TRADE_SUCCESS",
    "version": "1.0",
    "sign": "what is not signed itself",
    "app_id": "2015102700040153",
    "seller_id": "2088102119685838",
    "notify_id": "4a91b7a78a503640467525113fb7d8bg8e",
}
EXAMPLE_CONTENT = (
    "app_id=2015102700040153&body=大乐透2.1&buyer_id=2088102116773037&charset=utf-8&gmt_close=2016-07-19 14:10:46"
    "&gmt_payment=2016-07-19 14:10:47&notify_id=4a91b7a78a503640467525113fb7d8bg8e&notify_time=2016-07-19 14:10:49"
    "&notify_type=trade_status_sync&out_trade_no=0719141034-6418&refund_fee=0.00&seller_id=2088102119685838"
    "&subject=大乐透2.1&total_amount=2.00&trade_no=2016071921001003030200089909&trade_status=TRADE_SUCCESS&version=1.0"
)
# openssl dgst -sha256 -sign KEY content.txt | base64
BY_APP = (
    "GqN19eURzsXearIigblKwRgdlH1bQJie8/2rCe+m+bqx/Dw7IapYQWbHBlBGIkFjSkeAn7N+evd/VWTyD5nd9Y9cojBuJpDjDDxJ"
    "Eq6j35QDdYmv+d9FuVRTMooeNKtJJSyHRUL7E5Vhk7BTjgeFCSP2mFLdoTlYbMXIUKu3SueH1YkSIOHZamOgUnoPxiD0VgQ+RTT8"
    "CmW/JTyeLEh8UyN8zzXETsHcUWAFP5VgNsvOgwJbGHubU1ViQtb3ILW2LETtw6jCqMl8imYQdZcePVnfkFkRq1aoaCZg1ZsZE77S"
    "EYqoWEMj+2JgPAq+rPUSZUD3Xx/yOSm942XuExxzkA=="
)
BY_ALIPAY = (
    "ifM9ecuKdMFobXrK4xTNGV+Q4wXRg2o3I7WhuqhsPzD2gMvAhnUgoDXURhIsIs1cgzWunOOzsCLWLp7guK8EhBZGjeZd1flt7hiI"
    "/0znYb2o+4LNN5vJzGeFN7MHtGcgksjJuXU2MusDHjDgnFwuNhR4u5FFP/g0c94W+0B1N3bFa/QgPkCqiNfi0o2VAgZea0P+1gWX"
    "ILawPpmunaVJXECroAjM+y7/Ii9TKhlHBwB4VaCGVJQ9bN+zU3acTuS3iE9xmkA5yC6Sd7NXFjleGNfR5nunqvlZeayQ9296nqJm"
    "aJhNl/8V8TgXN9RExPl0aoSsc38+T6foysZ/CgexvQ=="
)
BY_ALIPAY_WITH_SHA1 = (
    "HNJcAR2EDwnEV+QpCePEXOYPZEdLhp7RubEI6u8mpvps9zIajH3PgmRVIDx3oViHsMmkk50W19/ndLpWYWcjqgTr8wZOgLr8zLYx"
    "MSX5WVotB8On7OQKKGIgLl09lZBDDGpETOOGWLYUtrNnlMCeYbTIZoRZb+ls+OItQqcyBUQHWHKuIQwLQsQerschhhGXubfXmian"
    "1rYLLstwzwSCwfKYQIzOdI3covGVvdbv6Tnk1+FNv0f4ZHtQLho3TCpbfj6XLinlQyDkq67vwi8J2AhQePZUlRsu+vV9Rs8lrga6"
    "S5JAd9LcE1yPIKQs6cf80nxsViX2Ww1JbzOfhakIxA=="
)

KEYS = read_keys(Secret(APP_PRIVATE), ALIPAY_PUBLIC)


def test_what_is_signed_is_what_the_documentation_says() -> None:
    assert signed_content(EXAMPLE, "sign", "sign_type").decode() == EXAMPLE_CONTENT


def test_signatures_are_those_of_openssl() -> None:
    assert KEYS.sign(EXAMPLE_CONTENT.encode()) == BY_APP
    assert KEYS.signed_by_alipay(EXAMPLE_CONTENT.encode(), BY_ALIPAY)


@settings(steady, max_examples=30)  # the library is slow
@given(st.dictionaries(st.text(min_size=1), st.text()))
def test_signatures_are_those_of_alipays_own_library(parameters: dict[str, str]) -> None:
    parameters = {name: _storable(value) for name, value in parameters.items() if name == _storable(name)}
    content = signed_content(parameters)
    assert content.decode() == get_sign_content(parameters)
    assert KEYS.sign(content) == sign_with_rsa2(bare(APP_PRIVATE), content.decode(), "utf-8")
    assert verify_with_rsa(bare(APP_PUBLIC), content, KEYS.sign(content))
    assert KEYS.signed_by_alipay(content, sign_with_rsa2(bare(ALIPAY_PRIVATE), content.decode(), "utf-8"))


def _storable(text: str) -> str:
    return text.encode(errors="replace").decode()


@pytest.mark.parametrize(
    "signature",
    [
        BY_APP,
        BY_ALIPAY_WITH_SHA1,
        "",
        "===",
        BY_ALIPAY[:-4],
        BY_ALIPAY + "AAAA",
        BY_ALIPAY.replace("+", " "),
        " " + BY_ALIPAY,
        "A" * 344,
        "é" * 344,
    ],
)
def test_any_other_signature_is_none(signature: str) -> None:
    assert not KEYS.signed_by_alipay(EXAMPLE_CONTENT.encode(), signature)


def test_another_text_has_another_signature() -> None:
    changed = EXAMPLE_CONTENT.replace("total_amount=2.00", "total_amount=2.01")
    assert changed != EXAMPLE_CONTENT
    assert not KEYS.signed_by_alipay(changed.encode(), BY_ALIPAY)
    assert KEYS.sign(changed.encode()) != BY_APP


def pkcs8(pem: str) -> str:
    key = load_pem_private_key(pem.encode(), None)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


@pytest.mark.parametrize("private", [APP_PRIVATE, pkcs8(APP_PRIVATE), bare(APP_PRIVATE), bare(pkcs8(APP_PRIVATE))])
@pytest.mark.parametrize("public", [ALIPAY_PUBLIC, bare(ALIPAY_PUBLIC)])
def test_keys_come_as_pem_or_bare(private: str, public: str) -> None:
    keys = read_keys(Secret(f"\n{private}\r\n"), f"  {public}\n")
    assert keys.sign(EXAMPLE_CONTENT.encode()) == BY_APP
    assert keys.signed_by_alipay(EXAMPLE_CONTENT.encode(), BY_ALIPAY)


def weak() -> tuple[str, str]:
    key = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    return written(key)


def elliptic() -> tuple[str, str]:
    return written(ec.generate_private_key(ec.SECP256R1()))


def written(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> tuple[str, str]:
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    return private, key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


@pytest.mark.parametrize(
    ("private", "public", "named"),
    [
        ("no key", ALIPAY_PUBLIC, "ALIPAY_PRIVATE_KEY"),
        (bare(APP_PRIVATE)[:-40], ALIPAY_PUBLIC, "ALIPAY_PRIVATE_KEY"),
        (ALIPAY_PUBLIC, ALIPAY_PUBLIC, "ALIPAY_PRIVATE_KEY"),
        (weak()[0], ALIPAY_PUBLIC, "ALIPAY_PRIVATE_KEY"),
        (elliptic()[0], ALIPAY_PUBLIC, "ALIPAY_PRIVATE_KEY"),
        (APP_PRIVATE, "no key", "ALIPAY_PUBLIC_KEY"),
        (APP_PRIVATE, weak()[1], "ALIPAY_PUBLIC_KEY"),
        (APP_PRIVATE, elliptic()[1], "ALIPAY_PUBLIC_KEY"),
        (APP_PRIVATE, ALIPAY_PRIVATE, "ALIPAY_PUBLIC_KEY"),
        (APP_PRIVATE, APP_PUBLIC, "your app's own public key"),
    ],
)
def test_keys_that_do_not_fit_are_refused_by_name_and_never_shown(private: str, public: str, named: str) -> None:
    with pytest.raises(InvalidSettings) as caught:
        read_keys(Secret(private), public)
    assert named in caught.value.detail
    assert caught.value.__cause__ is None
    hidden = bare(private) or private
    assert hidden[:24] not in caught.value.detail


def test_keys_do_not_show_themselves() -> None:
    shown = f"{KEYS!r} {KEYS} {[KEYS]}"
    assert bare(APP_PRIVATE)[:20] not in shown
    assert "***" in shown
