"""The routes of documents, `/v1/files`, in the shape of OpenAI's files."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Form, Request, UploadFile
from fastapi.responses import PlainTextResponse

from ahn.serving.documents import DocumentShelf, StoredDocument
from ahn.serving.extraction import text_of_file

router = APIRouter(prefix="/v1/files")


@router.post("")
async def upload(request: Request, file: UploadFile, purpose: Annotated[str, Form()] = "user_data") -> dict[str, Any]:
    """Takes in a document and begins to read it."""
    shelf, data, name = _shelf(request), await file.read(), file.filename or "document"
    text = await asyncio.to_thread(text_of_file, name, data)
    return _shown(shelf, await asyncio.to_thread(shelf.add, name, len(data), text))


@router.get("")
async def documents(request: Request) -> dict[str, Any]:
    """All documents, the newest first."""
    shelf = _shelf(request)
    return {"object": "list", "data": [_shown(shelf, each) for each in shelf.documents()], "has_more": False}


@router.get("/{id}")
async def document(request: Request, id: str) -> dict[str, Any]:
    """A document, and how far it has been read."""
    shelf = _shelf(request)
    return _shown(shelf, shelf.get(id))


@router.delete("/{id}")
async def delete(request: Request, id: str) -> dict[str, Any]:
    """Forgets a document."""
    await asyncio.to_thread(_shelf(request).delete, id)
    return {"id": id, "object": "file", "deleted": True}


@router.get("/{id}/content", response_class=PlainTextResponse)
async def content(request: Request, id: str) -> str:
    """A document's text, as it was read."""
    return await asyncio.to_thread(_shelf(request).text, id)


@router.get("/{id}/anchors")
async def anchors(request: Request, id: str) -> dict[str, Any]:
    """The passages of a document that anchors keep word for word: first and last + 1 character of each."""
    return {"object": "list", "data": [list(span) for span in _shelf(request).ready(id).passages]}


def _shelf(request: Request) -> DocumentShelf:
    shelf: DocumentShelf = request.app.state.service.shelf
    return shelf


def _shown(shelf: DocumentShelf, document: StoredDocument) -> dict[str, Any]:
    rate = document.read_tokens / document.seconds if document.seconds else 0.0
    left = (document.tokens - document.read_tokens) / rate if rate else None
    return {
        "id": document.id,
        "object": "file",
        "bytes": document.size,
        "created_at": document.created,
        "filename": document.name,
        "purpose": "user_data",
        "status": document.status,
        "status_details": document.problem or None,
        "ahn": {
            "tokens": document.tokens,
            "read_tokens": document.read_tokens,
            "tokens_per_second": round(rate, 1),
            "seconds_left": None if left is None else round(left, 1),
            "cache_bytes": document.cache_bytes,
            "full_cache_bytes": shelf.full_bytes(document.read_tokens),
        },
    }
