"""Settings of Alipay: what is taken, what is refused at the start, and that the answer says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import InvalidSettings
from holdfast.services.payments.alipay_account import TIME_OUT_MS_MAX, TIME_OUT_MS_MIN, read_account
from holdfast.settings import PaymentsSettings, Secret, load
from tests.servers.alipay import APP_ID, NOTIFY_URL, SELLER_ID, bare, settings_of
from tests.servers.alipay_keys import ALIPAY_PUBLIC, APP_PRIVATE

GATEWAY = PaymentsSettings().alipay_gateway
HALF_AN_HOUR_MS = 1_800_000


def test_the_gateway_is_alipays_own_unless_another_is_set() -> None:
    account = read_account(settings_of(GATEWAY), HALF_AN_HOUR_MS)
    assert account.gateway == "https://openapi.alipay.com/gateway.do"
    assert account.encrypted
    assert (account.app_id, account.seller_id, account.notify_url) == (APP_ID, SELLER_ID, NOTIFY_URL)


def test_everything_can_come_from_the_environment_and_keys_from_files(tmp_path: Path) -> None:
    (tmp_path / "app.pem").write_text(APP_PRIVATE)
    (tmp_path / "alipay.txt").write_text(bare(ALIPAY_PUBLIC))
    settings = load(
        {
            "HOLDFAST_PAYMENTS__PROVIDER": "alipay",
            "HOLDFAST_PAYMENTS__ALIPAY_APP_ID": APP_ID,
            "HOLDFAST_PAYMENTS__ALIPAY_SELLER_ID": SELLER_ID,
            "HOLDFAST_PAYMENTS__ALIPAY_PRIVATE_KEY_FILE": str(tmp_path / "app.pem"),
            "HOLDFAST_PAYMENTS__ALIPAY_PUBLIC_KEY_FILE": str(tmp_path / "alipay.txt"),
            "HOLDFAST_PAYMENTS__ALIPAY_NOTIFY_URL": NOTIFY_URL,
        }
    )
    account = read_account(settings.payments, settings.orders.time_out_ms)
    direct = read_account(settings_of(GATEWAY), HALF_AN_HOUR_MS)
    assert account.keys.sign(b"content") == direct.keys.sign(b"content")
    assert account.return_url == ""


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"alipay_app_id": ""}, "ALIPAY_APP_ID"),
        ({"alipay_app_id": "my-app"}, "ALIPAY_APP_ID"),
        ({"alipay_app_id": "٢٠٠٠٠٠٠٠"}, "ALIPAY_APP_ID"),
        ({"alipay_seller_id": ""}, "ALIPAY_SELLER_ID"),
        ({"alipay_seller_id": "1234567890123456"}, "ALIPAY_SELLER_ID"),
        ({"alipay_private_key": Secret("")}, "ALIPAY_PRIVATE_KEY: it is missing"),
        ({"alipay_private_key": Secret("x")}, "ALIPAY_PRIVATE_KEY"),
        (
            {"alipay_private_key": Secret(""), "alipay_private_key_file": "/none/at/all"},
            "PRIVATE_KEY_FILE: cannot read",
        ),
        ({"alipay_public_key": ""}, "ALIPAY_PUBLIC_KEY: it is missing"),
        ({"alipay_public_key": "", "alipay_public_key_file": "/none/at/all"}, "PUBLIC_KEY_FILE: cannot read"),
        ({"alipay_notify_url": ""}, "ALIPAY_NOTIFY_URL: it is missing"),
        ({"alipay_notify_url": "shop.example/v1/notices/alipay"}, "ALIPAY_NOTIFY_URL"),
        ({"alipay_notify_url": "ftp://shop.example/v1"}, "ALIPAY_NOTIFY_URL"),
        ({"alipay_notify_url": "https://[shop/v1"}, "ALIPAY_NOTIFY_URL"),
        ({"alipay_notify_url": "https://shop.example/notices?id=1"}, "ALIPAY_NOTIFY_URL"),
        ({"alipay_notify_url": f"https://shop.example/{'a' * 256}"}, "ALIPAY_NOTIFY_URL"),
        ({"alipay_return_url": "/thanks"}, "ALIPAY_RETURN_URL"),
        ({"alipay_gateway": ""}, "ALIPAY_GATEWAY"),
        ({"alipay_gateway": "http://openapi.alipay.com/gateway.do"}, "ALIPAY_GATEWAY: it must begin with https://"),
        ({"alipay_gateway": "https://openapi.alipay.com/gateway.do?x=1"}, "ALIPAY_GATEWAY"),
        ({"alipay_gateway": "https://a@openapi.alipay.com/gateway.do"}, "ALIPAY_GATEWAY"),
        ({"alipay_subject": " "}, "ALIPAY_SUBJECT"),
        ({"alipay_subject": "Order=1"}, "ALIPAY_SUBJECT"),
        ({"alipay_subject": "Order \U0001f600"}, "ALIPAY_SUBJECT"),
        ({"alipay_subject": "a" * 201}, "ALIPAY_SUBJECT"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidSettings) as caught:
        read_account(settings_of(GATEWAY, **changes), HALF_AN_HOUR_MS)
    assert told in caught.value.detail
    assert bare(APP_PRIVATE)[:20] not in caught.value.detail


def test_a_key_file_that_holds_something_else_is_refused_unseen(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"\xff\xfehidden")
    settings = settings_of(GATEWAY, alipay_private_key=Secret(""), alipay_private_key_file=str(tmp_path / "key"))
    with pytest.raises(InvalidSettings, match="no PEM and no base64") as caught:
        read_account(settings, HALF_AN_HOUR_MS)
    assert "hidden" not in caught.value.detail
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("time_out_ms", [TIME_OUT_MS_MIN - 1, TIME_OUT_MS_MAX + 1])
def test_a_time_to_pay_that_alipay_does_not_take_is_refused(time_out_ms: int) -> None:
    with pytest.raises(InvalidSettings, match="HOLDFAST_ORDERS__TIME_OUT_MS"):
        read_account(settings_of(GATEWAY), time_out_ms)


def test_secrets_do_not_show_themselves() -> None:
    settings = settings_of(GATEWAY)
    shown = f"{settings!r} {read_account(settings, HALF_AN_HOUR_MS)!r}"
    assert bare(APP_PRIVATE)[:20] not in shown
