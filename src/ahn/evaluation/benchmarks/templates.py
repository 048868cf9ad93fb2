"""The built-in prompts, out of `prompts.yaml`."""

from __future__ import annotations

from pathlib import Path

from ahn.evaluation.libraries import library

_PROMPTS: dict[str, dict[str, str]] = library("yaml", "the benchmarks").safe_load(
    Path(__file__).with_name("prompts.yaml").read_text(encoding="utf-8")
)
OFFICIAL = _PROMPTS["official"]
"""A template by the name of each task."""

PAPER = _PROMPTS["paper"]
"""Those of arXiv 2510.07318."""
