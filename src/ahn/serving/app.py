"""The application: routes, what answers errors, and the gate around them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ahn.serving import files, operations, routes
from ahn.serving.errors import RequestError
from ahn.serving.gate import Gate
from ahn.serving.service import Service


def make_app(service: Service) -> Any:
    """The application that serves a model; its engine runs while the application does."""

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        service.engine.start()
        service.shelf.resume()
        yield
        service.engine.close()

    app = FastAPI(title="ahn", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.service = service
    for part in (routes, files, operations):
        app.include_router(part.router)
    operations.add_gauges(service)
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _unknown)
    if origins := list(service.settings.cors_origin):
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    return Gate(app, service.settings, service.metrics)


async def _refused(request: Request, error: Any) -> Any:
    return JSONResponse(error.body(), error.status, error.headers)


async def _invalid(request: Request, error: Any) -> Any:
    first = max(error.errors(), key=lambda each: len(each["loc"]))  # the form that came closest
    param = ".".join(str(part) for part in first["loc"][1:] if isinstance(part, int) or part.isidentifier())
    if first["type"] == "json_invalid":
        message, param = f"the body is no JSON: {first['ctx']['error']}", ""
    elif first["type"] == "extra_forbidden":
        message = f"{param} is not supported by this server; leave it out"
    elif first["type"] == "missing":
        message = f"{param or 'the body'} is missing"
    else:
        message = f"{param}: {first['msg']}"
    return await _refused(request, RequestError(message, 400, param or None))


async def _unknown(request: Request, error: Any) -> Any:
    message = f"{request.method} {request.url.path}: {error.detail}"
    return await _refused(request, RequestError(message, error.status_code))
