"""Virtual buyers that place an order and settle it with a signed notice, for any system with the contract.

Both systems get byte-for-byte the same kind of requests from here.  Run as a program, this is the
load process of a benchmark: it prints one JSON object (``RunReport``) on standard output.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import os
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

import jwt
import msgspec
import uvloop

from benchmarks.loadgen import BuyerOutcome, HttpClient, LoadReport, probe_machine, run_load

LOOPBACK = "127.0.0.1"  # A load generator must not be able to aim at anyone else's machine.
MERCHANT_ID = "holdfast-demo"
TOKEN_LIFETIME_SECONDS = 3600
TOKEN_SECRET_VARIABLE = "BENCH_TOKEN_SECRET"
NOTICE_SECRET_VARIABLE = "BENCH_NOTICE_SECRET"


class _Payment(msgspec.Struct):
    id: str


class _PlacedOrder(msgspec.Struct, rename="camel"):
    """The part of the order a buyer needs in order to pay."""

    id: str
    amount_minor: int
    currency: str
    payment: _Payment


class _OrderStatus(msgspec.Struct):
    status: str


class _Problem(msgspec.Struct):
    code: str = ""


_decode_order = msgspec.json.Decoder(_PlacedOrder).decode
_decode_status = msgspec.json.Decoder(_OrderStatus).decode
_decode_problem = msgspec.json.Decoder(_Problem).decode


@dataclass(frozen=True, slots=True)
class RunReport:
    """A measured load, and whether the orders it calls settled really read as paid right after it.

    ``confirmed`` counts the sampled orders that a GET showed as paid without any wait.  Anything less
    than ``sampled`` means that the system acknowledges notices before it settles them: its settled
    orders per second must then be counted to the moment the last one is settled.  ``probe_seconds``
    is the speed of the machine before the first request (see ``probe_machine``).
    """

    load: LoadReport
    probe_seconds: float
    sampled: int
    confirmed: int


def sku_name(number: int) -> str:
    """Return the name of a seeded SKU; numbers start at 1."""
    return f"SKU-{number:02d}"


def bearer_token(buyer: str, secret: str, *, now: float | None = None) -> str:
    """Return the HS256 token that a sign-in service would have issued to this buyer."""
    expires = int(time.time() if now is None else now) + TOKEN_LIFETIME_SECONDS
    return jwt.encode({"sub": buyer, "exp": expires}, secret, algorithm="HS256")


def place_headers(token: str, key: str) -> dict[str, str]:
    """Return the headers of a place request."""
    return {"authorization": f"Bearer {token}", "idempotency-key": key, "content-type": "application/json"}


def order_body(sku: str, quantity: int = 1) -> bytes:
    """Return the body of a place request with one line."""
    return msgspec.json.encode({"lines": [{"sku": sku, "quantity": quantity}]})


def notice_body(payment_id: str, amount_minor: int, currency: str) -> bytes:
    """Return the body of the notice the sandbox provider sends once this payment has been made."""
    paid_at = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return msgspec.json.encode(
        {
            "eventId": f"evt-{payment_id}",
            "merchantId": MERCHANT_ID,
            "paymentId": payment_id,
            "tradeNo": f"trade-{payment_id}",
            "amountMinor": amount_minor,
            "currency": currency,
            "paidAt": paid_at,
        }
    )


def notice_headers(secret: bytes, body: bytes, *, now: float | None = None) -> dict[str, str]:
    """Return the headers of a notice: its signature covers the time stamp and the raw body."""
    stamp = str(int(time.time() if now is None else now))
    digest = hmac.digest(secret, stamp.encode() + b"." + body, hashlib.sha256).hex()
    return {"sandbox-signature": f"t={stamp},v1={digest}", "content-type": "application/json"}


class Buyers:
    """All virtual buyers of one run; buyer ``index`` is the same person with the same key every time.

    Tokens are made here, ahead of the measured time.  ``skus=1`` sends every buyer to one hot SKU.
    """

    def __init__(self, total: int, *, skus: int, token_secret: str, notice_secret: str, run: str = "") -> None:
        self._run = run or secrets.token_hex(6)
        self._notice_secret = notice_secret.encode()
        self._bodies = [order_body(sku_name(number)) for number in range(1, skus + 1)]
        self._tokens = [bearer_token(f"buyer-{self._run}-{index}", token_secret) for index in range(total)]
        self.settled: list[tuple[int, str]] = []
        """Index of the buyer and id of the order, for each order whose notice was accepted."""

    async def place(self, client: HttpClient, index: int) -> BuyerOutcome:
        """Place one order and leave it unpaid: ends as ``placed``, ``sold_out`` or ``place_<status>``."""
        outcome, _, seconds = await self._place(client, index)
        return BuyerOutcome(outcome, {"place": seconds})

    async def settle(self, client: HttpClient, index: int) -> BuyerOutcome:
        """Place one order and pay for it: ends as ``paid``, ``pay_<status>``, or as ``place`` does."""
        outcome, order, placed = await self._place(client, index)
        if order is None:
            return BuyerOutcome(outcome, {"place": placed})
        body = notice_body(order.payment.id, order.amount_minor, order.currency)
        headers = notice_headers(self._notice_secret, body)
        started = time.perf_counter()
        response = await client.request("POST", "/v1/notices/sandbox", headers, body)
        seconds = {"place": placed, "pay": time.perf_counter() - started}
        if response.status != 200 or response.body != b"success":
            return BuyerOutcome(f"pay_{response.status}", seconds)
        self.settled.append((index, order.id))
        return BuyerOutcome("paid", seconds)

    async def status(self, client: HttpClient, index: int, order_id: str) -> str:
        """Return the status that the buyer's own GET of the order shows."""
        headers = {"authorization": f"Bearer {self._tokens[index]}"}
        response = await client.request("GET", f"/v1/orders/{order_id}", headers, b"")
        return _decode_status(response.body).status if response.status == 200 else f"http_{response.status}"

    async def _place(self, client: HttpClient, index: int) -> tuple[str, _PlacedOrder | None, float]:
        headers = place_headers(self._tokens[index], f"{self._run}-{index}")
        body = self._bodies[index % len(self._bodies)]
        started = time.perf_counter()
        response = await client.request("POST", "/v1/orders", headers, body)
        seconds = time.perf_counter() - started
        if response.status == 201:
            return "placed", _decode_order(response.body), seconds
        if response.status == 409 and _decode_problem(response.body).code == "sold_out":
            return "sold_out", None, seconds
        return f"place_{response.status}", None, seconds


async def confirm_settled(client: HttpClient, buyers: Buyers, sample: int) -> tuple[int, int]:
    """Read back an even sample of the settled orders; return how many, and how many of them show as paid."""
    step = max(len(buyers.settled) // sample, 1) if sample else 1
    chosen = buyers.settled[::step][:sample]
    statuses = [await buyers.status(client, index, order_id) for index, order_id in chosen]
    return len(chosen), statuses.count("paid")


async def _run(options: argparse.Namespace) -> RunReport:
    make = partial(
        Buyers,
        skus=options.skus,
        token_secret=os.environ[TOKEN_SECRET_VARIABLE],
        notice_secret=os.environ[NOTICE_SECRET_VARIABLE],
    )
    early, buyers = make(options.warmup), make(options.buyers)
    act = Buyers.settle if options.goal == "settle" else Buyers.place
    probe_seconds = probe_machine()
    async with HttpClient(LOOPBACK, options.port, options.connections) as client:
        await run_load(partial(act, early, client), options.warmup, options.connections)
        load = await run_load(partial(act, buyers, client), options.buyers, options.connections)
        sampled, confirmed = await confirm_settled(client, buyers, options.sample)
    return RunReport(load, probe_seconds, sampled, confirmed)


def main(arguments: Sequence[str] | None = None) -> None:
    """Put load on the server at a local port and print the report as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.buyers", description=main.__doc__)
    parser.add_argument("--port", type=int, required=True, help="local port of the measured server")
    parser.add_argument("--goal", choices=("place", "settle"), default="settle", help="leave orders unpaid, or pay")
    parser.add_argument("--buyers", type=int, default=3000, help="virtual buyers, one order each")
    parser.add_argument("--connections", type=int, default=64, help="keep-alive connections, each one buyer at a time")
    parser.add_argument("--skus", type=int, default=100, help="how many SKUs the buyers spread over; 1 is a hot SKU")
    parser.add_argument("--warmup", type=int, default=300, help="buyers that run first and are not counted")
    parser.add_argument("--sample", type=int, default=50, help="settled orders to read back afterwards")
    report = uvloop.run(_run(parser.parse_args(arguments)))
    sys.stdout.buffer.write(msgspec.json.encode(report) + b"\n")


if __name__ == "__main__":
    main()
