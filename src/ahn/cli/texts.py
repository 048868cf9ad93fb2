"""The long text of the demo."""

from __future__ import annotations

from importlib import import_module


def reference() -> str:
    """Python's own language reference, about 113,000 tokens of SmolLM2, as every Python carries it for `help()`."""
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    return "\n\n".join(f"{title}\n\n{text}" for title, text in topics.items())
