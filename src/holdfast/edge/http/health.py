"""Health and metrics."""

from __future__ import annotations

from typing import Any

from litestar import Response, Router, get
from litestar.di import NamedDependency
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from holdfast import observe
from holdfast.bootstrap import System


@get("/healthz/live", summary="The process runs")
async def live() -> dict[str, str]:
    """Answers as long as the event loop turns."""
    return {"status": "ok"}


@get("/healthz/ready", summary="The process can serve")
async def ready(system: NamedDependency[System]) -> dict[str, str]:
    """Asks the database; 503 when it is away."""
    await system.check()
    return {"status": "ok"}


@get("/metrics", summary="Prometheus metrics")
async def metrics(system: NamedDependency[System]) -> Response[bytes]:
    """All collectors of this process, and how full the database's queues are; a slow database is not waited for."""
    await system.messaging.observe_queues()
    # The framework adds the charset to every text by itself.
    media_type = CONTENT_TYPE_LATEST.removesuffix("; charset=utf-8")
    return Response(content=generate_latest(observe.registry), media_type=media_type)


def router() -> Router:
    """The routes at the root."""
    handlers: list[Any] = [live, ready, metrics]
    return Router(path="/", route_handlers=handlers, include_in_schema=False)
