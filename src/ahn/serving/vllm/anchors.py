"""The choice of anchors among tokens that leave in one step, for requests that have read texts of different length.

All requests are counted as one batch whose shorter texts have padding before them, as in `ahn.cache.slots`. So the
scores of a request are turned to where the others' are when the step begins, and turned back when it ends.

Legend of shapes: L layers, B requests, G key/value heads, K key size, V value size, A anchors, P places of a
scoreboard, R pooling kernels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ahn.anchors.base import LayerTokens
from ahn.anchors.selection import Scoreboard, Selection
from ahn.attention.call import LayerCall
from ahn.cache.groups import displaced
from ahn.serving.vllm.layout import BOARD
from ahn.serving.vllm.runtime import Runtime, ServedLayer
from ahn.tokens import Padding


class DecodedAnchors:
    """The anchors of requests that read one token each.

    Args:
        runtime: What all steps share, with anchors.
        board: The scoreboard of those anchors, empty.
        blocks: The requests' blocks, `[B]`.
        seen: Tokens that each has read before, `[B]`.

    Attributes:
        counts: How many anchors each request reads, `[B]`.
    """

    def __init__(self, runtime: Runtime, board: Scoreboard, blocks: torch.Tensor, seen: torch.Tensor) -> None:
        self.runtime = runtime
        self.blocks = blocks
        self.board = Scoreboard(board.anchors, board.sinks, board.windows, board.layers, board.score)
        self.window = next(iter(board.windows))
        self._padding = int(seen.max()) - seen
        self._open(seen)
        padding = Padding(self._padding, int(self._padding.max()))
        self.selection = Selection(self.board, int(seen.max()), 1, padding)
        self.counts = (self._stored("tokens") >= 0).sum(1)
        self._states: dict[int, dict[str, torch.Tensor]] = {}

    @property
    def missing(self) -> torch.Tensor:
        """Which places for anchors hold none, `[B, A]`."""
        return torch.arange(self.board.anchors, device=self.counts.device) >= self.counts[:, None]

    @property
    def _pages(self) -> Mapping[str, torch.Tensor]:
        """Pages of the layer that holds what all share."""
        return self.runtime.layers[self.runtime.first].pages

    def _stored(self, name: str) -> torch.Tensor:
        return self.board.stored[f"{name}.{self.window}"]

    def _open(self, seen: torch.Tensor) -> None:
        """Turns the scores of all requests to where those of the longest text are."""
        slot = torch.arange(self.board.length, device=self.blocks.device)
        scores_BPR = self._pages[BOARD + "votes"][self.blocks]
        index = ((slot - self._padding[:, None]) % self.board.length)[..., None].expand_as(scores_BPR)
        has_some = (seen > self.board.sinks + self.window)[:, None]
        scores = self._pages[f"{BOARD}scores.{self.window}"][self.blocks].masked_fill(~has_some, float("-inf"))
        tokens = self._pages[f"{BOARD}tokens.{self.window}"][self.blocks].masked_fill(~has_some, -1)
        self.board.stored = {
            "votes": scores_BPR.gather(1, index),
            f"scores.{self.window}": scores,
            f"tokens.{self.window}": torch.where(tokens >= 0, tokens + self._padding[:, None], tokens),
        }

    def displaced(
        self, pages: Mapping[str, torch.Tensor], leaving_LBGK: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What is written into the states of layers that leave anchors out, before `keep`; see `groups.displaced`.

        Args:
            pages: The pages of the layers, `[L, blocks, ...]` each.
            leaving_LBGK: Keys and values of the tokens that leave.
        """

        def find(name: str, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
            return pages[name][:, self.blocks[rows], :, places].transpose(0, 1)

        return displaced(self.selection.selected[self.window], self.selection.seen, leaving_LBGK, find)

    def keep(self, pages: Mapping[str, torch.Tensor], keys_LBGK: torch.Tensor, values_LBGV: torch.Tensor) -> None:
        """Stores those of the leaving tokens of some layers that become anchors.

        Args:
            pages: The pages of the layers, `[L, blocks, ...]` each.
            keys_LBGK: The keys of the leaving tokens.
            values_LBGV: Their values.
        """
        source = self.selection.selected[self.window].source
        if source is not None:
            rows, slots = (source >= self.board.anchors).nonzero().unbind(1)
            for name, leaving in (("anchor_keys", keys_LBGK), ("anchor_values", values_LBGV)):
                pages[name][:, self.blocks[rows], :, slots] = leaving[:, rows].transpose(0, 1)

    def score(
        self, served: ServedLayer, call: LayerCall, projected: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    ) -> None:
        """Scores the new tokens in a layer that takes part in the choice.

        Args:
            served: The layer.
            call: What it was called with.
            projected: Queries, keys and values of the tokens, `[B, ?, 1, ?]` each.
        """
        index = served.layer.index
        if index not in self.board.layers:
            return
        state = {name: served.pages[name][self.blocks] for name in self.board.score.state_names}
        self._states[index] = state
        self.selection.add(
            LayerTokens(
                self.selection.seen,
                self.board.delay,
                self.selection.padding,
                call.hidden,
                *projected,
                attention=tuple,
                weights=served.layer.score_weights(self.board.score.name),
                state=state,
                rotary=call.rotary,
            ),
            later=True,
        )

    def close(self) -> None:
        """Writes the scores back to the blocks."""
        self.selection.close()
        for index, state in self._states.items():
            for name, tensor in state.items():
                self.runtime.layers[index].pages[name][self.blocks] = tensor
        scores_BPR, tokens = self.board.stored["votes"], self._stored("tokens")
        slot = torch.arange(self.board.length, device=self.blocks.device)
        index_BPR = ((slot + self._padding[:, None]) % self.board.length)[..., None].expand_as(scores_BPR)
        self._pages[BOARD + "votes"][self.blocks] = scores_BPR.gather(1, index_BPR)
        self._pages[f"{BOARD}scores.{self.window}"][self.blocks] = self._stored("scores")
        own = torch.where(tokens >= 0, tokens - self._padding[:, None], tokens)
        self._pages[f"{BOARD}tokens.{self.window}"][self.blocks] = own
