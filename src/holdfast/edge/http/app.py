"""The application: routes, errors and limits put together."""

from __future__ import annotations

from litestar import Litestar
from litestar.datastructures import State
from litestar.di import Provide
from litestar.exceptions import HTTPException
from litestar.openapi import OpenAPIConfig
from litestar.types import ASGIApp

from holdfast.bootstrap import System
from holdfast.edge.http import (
    carts,
    events,
    health,
    orders,
    payments,
    reconciliations,
    refunds,
    stock,
    webhooks,
)
from holdfast.edge.http.auth import Tokens, caller
from holdfast.edge.http.hot import HotRoutes
from holdfast.edge.http.problems import from_error, from_framework, page_not_found
from holdfast.edge.http.shell import Shell
from holdfast.errors import HoldfastError


def build_app(system: System) -> ASGIApp:
    """The ASGI application over a running system; raises `InvalidSettings` without a token secret."""
    tokens = Tokens(system.settings.http.token_secret.reveal(), system.clock)

    def the_system() -> System:
        return system

    app = Litestar(
        route_handlers=[
            orders.router(),
            carts.router(),
            stock.router(),
            payments.router(),
            refunds.router(),
            reconciliations.router(),
            events.router(),
            webhooks.router(),
            health.router(),
        ],
        dependencies={
            "system": Provide(the_system, sync_to_thread=False, use_cache=True),
            "caller": Provide(caller, sync_to_thread=False),
        },
        exception_handlers={
            HoldfastError: from_error,
            HTTPException: from_framework,
            Exception: from_error,
        },
        after_request=page_not_found,
        openapi_config=OpenAPIConfig(title="holdfast", version="1", path="/schema"),
        request_max_body_size=system.settings.http.body_bytes_max,
        state=State({"tokens": tokens}),
        logging_config=None,
        signature_namespace={"System": System},
    )
    hot = HotRoutes(
        app,
        {
            ("POST", orders.PLACE_PATH): orders.placing(system, tokens),
            **payments.notice_routes(system),
        },
        system.settings.http.body_bytes_max,
        behind={("GET", orders.PLACE_PATH)},
    )
    return Shell(hot, system.clock, system.settings.http.request_timeout_ms / 1_000)
