"""Adapters and published checkpoints: saving, loading, converting, merging and describing them."""

from ahn.checkpoint.adapter import save
from ahn.checkpoint.anchors import load_anchors, save_anchors
from ahn.checkpoint.hub import push_to_hub
from ahn.checkpoint.loading import from_pretrained, load
from ahn.checkpoint.tools import Description, convert, describe, merge

__all__ = [
    "Description",
    "convert",
    "describe",
    "from_pretrained",
    "load",
    "load_anchors",
    "merge",
    "push_to_hub",
    "save",
    "save_anchors",
]
