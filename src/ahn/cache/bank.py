"""The anchors of one layer: a bank of exact tokens, read by the same softmax as sinks and window.

Legend of shapes: B batch, E tokens that leave the window in a call, C of them that enter the bank of some row, G
key/value heads, K key size, V value size, N anchors.
"""

from __future__ import annotations

import torch

from ahn.anchors.selection import Selected
from ahn.cache.store import Store
from ahn.tokens import ExtraKV, Tokens


class Bank(Store):
    """Keys and values of the anchors of one layer.

    Args:
        anchors: Number of anchors, N.
    """

    def __init__(self, anchors: int) -> None:
        super().__init__("anchor_keys", "anchor_values")
        self.anchors = anchors

    def unchanged(self, selected: Selected) -> ExtraKV | None:
        """What the queries of a call read in which no token enters; `None` where one does, or nothing was stored yet.

        Args:
            selected: What was chosen.
        """
        if not self.stored or selected.entering.numel() or selected.source is not None:
            return None
        return _read(self.stored["anchor_keys"], self.stored["anchor_values"], selected)

    def append(self, evicted: Tokens, selected: Selected) -> ExtraKV:
        """Takes in what was chosen; what the queries of the call read.

        Args:
            evicted: The tokens that leave the window, oldest first.
            selected: What was chosen of them.
        """
        keys, values = self.reserve(evicted.keys, evicted.values)
        if selected.entering.numel():
            entering = selected.entering.to(keys.device)
            keys = torch.cat((keys, evicted.keys.index_select(2, entering)), dim=2)
            values = torch.cat((values, evicted.values.index_select(2, entering)), dim=2)
        if selected.source is not None:
            source = selected.source.to(keys.device)[:, None, :, None]
            for name, all_ in (("anchor_keys", keys), ("anchor_values", values)):
                index = source.expand(all_.size(0), all_.size(1), -1, all_.size(3))
                self.stored[name] = all_.gather(2, index)
        return _read(keys, values, selected)

    def reserve(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of all anchors, made if they are not there yet.

        Args:
            keys: Some of the layer, whose dtype, device and sizes they get, `[B, G, ?, K]`.
            values: The same of its values, `[B, G, ?, V]`.
        """
        for name, like in (("anchor_keys", keys), ("anchor_values", values)):
            if name not in self.stored:
                self.stored[name] = like.new_zeros(*like.shape[:2], self.anchors, like.size(3))
        return self.stored["anchor_keys"], self.stored["anchor_values"]


def _read(keys: torch.Tensor, values: torch.Tensor, selected: Selected) -> ExtraKV:
    """Keys and values with the queries that read them."""
    return ExtraKV(keys, values, selected.visible_from.to(keys.device), selected.visible_until.to(keys.device))
