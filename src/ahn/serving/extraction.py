"""The text of a file: plain text, Markdown, HTML or PDF."""

from __future__ import annotations

import io
import re
from pathlib import PurePath

from ahn.serving.errors import RequestError

_HIDDEN = ("script", "style", "noscript", "template", "svg", "head")


def text_of_file(name: str, data: bytes) -> str:
    """The text of a file, by the end of its name or by how it begins.

    Raises:
        RequestError: It has no text, or none that can be read.
    """
    kind = PurePath(name).suffix.lower()
    if kind == ".pdf" or data.startswith(b"%PDF-"):
        text = _text_of_pdf(name, data)
    else:
        text = _decoded(name, data)
        if kind in (".html", ".htm", ".xhtml") or text.lstrip()[:15].lower().startswith(("<!doctype html", "<html")):
            text = _text_of_html(text)
    text = text.replace("\r\n", "\n").replace("\r", "\n").encode("utf-8", "replace").decode("utf-8")
    if not text.strip():
        raise RequestError(f"{name} has no text; a scanned page must go through text recognition first", param="file")
    return text


def _decoded(name: str, data: bytes) -> str:
    marks = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
    encoding = marks.get(data[:2], "utf-8-sig")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise RequestError(f"{name} is no text in UTF-8, no HTML and no PDF; convert it first", param="file")
    return text


def _text_of_html(page: str) -> str:
    from selectolax.lexbor import LexborHTMLParser

    parsed = LexborHTMLParser(page)
    parsed.strip_tags(list(_HIDDEN))
    text = "" if parsed.body is None else parsed.body.text(separator="\n")
    lines = [" ".join(line.split()) for line in str(text).splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def _text_of_pdf(name: str, data: bytes) -> str:
    from pypdf import PdfReader

    try:
        reader = PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise RequestError(f"{name} is encrypted; save it without a password", param="file")
        return "\n\n".join(page.extract_text() for page in reader.pages)
    except RequestError:
        raise
    except Exception as error:  # of many kinds, from a file that anybody made
        raise RequestError(
            f"{name} cannot be read as PDF ({type(error).__name__}); save it anew", param="file"
        ) from None
