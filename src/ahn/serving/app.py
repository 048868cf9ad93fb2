"""The application: routes, what answers errors, and the gate around them."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ahn.errors import OutputError
from ahn.serving import files, operations, routes
from ahn.serving.errors import RequestError
from ahn.serving.gate import Gate
from ahn.serving.service import Service

_log = logging.getLogger("ahn.serving")


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
    app.add_exception_handler(OutputError, _full)
    app.add_exception_handler(Exception, _failed)
    if origins := list(service.settings.cors_origin):
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    return Gate(app, service.settings, service.metrics)


async def _refused(request: Request, error: Any) -> Any:
    return JSONResponse(error.body(), error.status, error.headers)


async def _full(request: Request, error: Any) -> Any:
    _log.warning("a request found no space: %s", error)
    message = "the server cannot write what it should keep; ask whoever runs it to make space"
    return await _refused(request, RequestError(message, 503, code="disk"))


async def _failed(request: Request, error: Any) -> Any:
    return await _refused(request, RequestError(f"the server failed: {type(error).__name__}", 500))


async def _invalid(request: Request, error: Any) -> Any:
    # The form that came closest, and rather what is wrong with it than that another was expected.
    first = max(error.errors(), key=lambda each: (len(each["loc"]), not each["type"].endswith("_type")))
    param = ".".join(str(part) for part in first["loc"][1:] if _is_name(part))
    kind = request.headers.get("content-type", "")
    if first["type"] == "json_invalid":
        message, param = f"the body is no JSON: {first['ctx']['error']}", ""
    elif first["type"] == "extra_forbidden":
        message = f"{param or repr(first['loc'][-1])} is not supported by this server; leave it out"
    elif first["type"] == "missing":
        message = f"{param or 'the body'} is missing"
    elif not param and "json" not in kind:
        message = f"the body is {kind or 'of no type'}; send JSON with the header Content-Type: application/json"
    elif param == "file":
        message = "file must be a file with a name, in multipart/form-data"
    else:
        message = f"{param or 'the body'}: {first['msg']}"
    return await _refused(request, RequestError(message, 400, param or None))


def _is_name(part: Any) -> bool:
    """Whether a part of a place in a body is the client's: others name the form that was tried."""
    return isinstance(part, int) or (part.isidentifier() and part not in ("str", "int"))


async def _unknown(request: Request, error: Any) -> Any:
    cause = error.__cause__  # why the body could not be read
    if isinstance(cause, RequestError):
        return await _refused(request, cause)
    if isinstance(cause, (UnicodeDecodeError, RecursionError)):
        return await _refused(request, RequestError("the body is no JSON in UTF-8, or is nested too deeply"))
    message = f"{request.method} {request.url.path}: {error.detail}"
    return await _refused(request, RequestError(message, error.status_code))
