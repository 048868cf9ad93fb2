"""The routes of whoever runs the server, `/health` and `/metrics`, and the page at `/`."""

from __future__ import annotations

from importlib import resources
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ahn.attachment import attachment_of
from ahn.generation import full_cache_bytes
from ahn.serving.errors import RequestError
from ahn.serving.service import Service

_PAGE = resources.files("ahn.serving") / "page"
_KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'"

router = APIRouter()


def add_gauges(service: Service) -> None:
    """Adds what `/metrics` looks up."""
    engine, gauge = service.engine, service.metrics.gauge
    gauge("ahn_queue", "Requests whose turn has not come.", lambda: engine.waiting)
    gauge("ahn_active", "Answers that are being written.", lambda: engine.active)
    gauge("ahn_active_bytes", "Bytes of their caches.", lambda: engine.batch_bytes)
    gauge("ahn_sessions_memory", "Stored sessions in memory.", lambda: engine.store.size.in_memory)
    gauge("ahn_sessions_memory_bytes", "Their bytes.", lambda: engine.store.size.memory_bytes)
    gauge("ahn_sessions_disk", "Stored sessions on disk.", lambda: engine.store.size.on_disk)
    gauge("ahn_sessions_disk_bytes", "Their bytes.", lambda: engine.store.size.disk_bytes)


@router.get("/health", response_model=None)
async def health(request: Request) -> Any:
    """Whether the engine works."""
    alive = request.app.state.service.engine.is_alive
    return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)


@router.get("/metrics", response_model=None)
async def metrics(request: Request) -> Any:
    """All counts in the format of Prometheus."""
    return Response(request.app.state.service.metrics.page(), media_type="text/plain; version=0.0.4")


@router.get("/v1/ahn")
async def about(request: Request) -> dict[str, Any]:
    """What is served and how it reads, for the page."""
    service: Service = request.app.state.service
    model = service.engine.model
    settings = attachment_of(model).settings
    return {
        "model": service.name,
        "window": settings.window,
        "sinks": settings.sinks,
        "anchors": settings.anchors,
        "full_bytes_per_token": full_cache_bytes(model, 2000) - full_cache_bytes(model, 1999),
        "max_sessions": service.settings.max_sessions,
        "keeps": service.settings.session_dir is not None,
    }


@router.get("/", response_model=None)
@router.get("/page/{name}", response_model=None)
async def page(request: Request, name: str = "index.html") -> Any:
    """A file of the page."""
    kind = _KINDS.get(name.rpartition(".")[2])
    file = _PAGE / name
    if kind is None or name not in {each.name for each in _PAGE.iterdir()}:
        raise RequestError(f"there is no page {name!r}", 404)
    headers = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}
    return Response(file.read_bytes(), media_type=f"{kind}; charset=utf-8", headers=headers)
