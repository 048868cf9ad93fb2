"""The single tokens of many requests in one step: read together, where their rings and states lie.

A request's token has its own place in its ring, and its own number of places to read. So nothing is turned or copied:
one kernel call for each layer takes the blocks, and how full each is. As in `ahn.attention.decoding`, the tokens that
leave update the states of all layers at the start of the step, and the gates of new tokens come at its end: at once for
all layers with one kind of memory.

Legend of shapes: L layers, B requests, T tokens of the batch, D hidden size, H query heads, G key/value heads, K key
size, V value size, N gates per head, F numbers of a record, S sinks, A anchors, R rotated size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ahn import native
from ahn.attention.call import Call, LayerCall, Softmax
from ahn.attention.decoding import KernelProgress
from ahn.attention.function import softmax_of
from ahn.attention.softmax import Reading, explicit_log_sum, explicit_weights
from ahn.backbone.rotary import Rotary
from ahn.cache.record import TokenRecord
from ahn.native import Segment
from ahn.serving.vllm.anchors import DecodedAnchors
from ahn.serving.vllm.runtime import Rows, Runtime, ServedCall, ServedGroup, ServedLayer
from ahn.tokens import Attended


class DecodedTokens(KernelProgress):
    """The tokens of requests that read one each, the first of the batch.

    Args:
        runtime: What all steps share.
        rows: The requests.

    Attributes:
        runtime: What all steps share.
        count: B.
        call: What all layers share in this step.
        hidden: What each attention layer has read so far, `[B, 1, D]`, by layer index.
        blocks: The requests' blocks, `[B]`.
        seen: Tokens that each has read before, `[B]`.
        slots: Places of the new tokens in the rings, `[B]`.
        used: Places that hold tokens, the new ones included, `[B]`.
        longest: Tokens of the longest text.
        evicts: Whether something has left the window of each, `[B]`.
        anchors: Their anchors, or `None` where there are none.
    """

    def __init__(self, runtime: Runtime, rows: Sequence[Rows]) -> None:
        super().__init__()
        self.runtime = runtime
        self.count = len(rows)
        self.call = Call(runtime.attachment, runtime.settings, None)
        self.hidden: dict[int, torch.Tensor] = {}
        exact = runtime.exact
        device = runtime.layers[runtime.first].pages["keys"].device
        self.blocks = torch.tensor([each.block for each in rows], device=device)
        self.seen = torch.tensor([each.seen for each in rows], device=device)
        beyond = self.seen - exact.sinks
        self.slots = torch.where(beyond < 0, self.seen, exact.sinks + beyond % exact.window)
        self.used = (self.seen + 1).clamp(max=exact.sinks + exact.window)
        self.longest = max(each.seen for each in rows) + 1
        self.evicts = beyond >= exact.window
        board = runtime.board
        self.anchors = None if board is None else DecodedAnchors(runtime, board, self.blocks, self.seen)
        if bool(self.evicts.any()):
            for group in runtime.groups:
                self._update(group)

    def _update(self, group: ServedGroup) -> None:
        """Updates the states and the anchors of some layers with the tokens that leave."""
        pages, memories = group.pages, group.memories
        keys, values = (pages[name][:, self.blocks, :, self.slots].transpose(0, 1) for name in ("keys", "values"))
        is_written_B = self.evicts
        if self.anchors is not None:
            leaving = keys, values
            if memories[0].leaves_anchors_out:
                keys, values, is_written_B = self.anchors.displaced(pages, leaving)
            self.anchors.keep(pages, *leaving)
        record_LBF = pages["record"][:, self.blocks, 0, self.slots]
        gates = TokenRecord.unpack(record_LBF, memories[0].gate_count, memories[0].shape.query_heads).gates
        # Gates of zero leave a state as it is: that of a request whose window is not full.
        gates_LBNH = gates * (self.evicts & is_written_B)[:, None, None]
        type(memories[0]).update(memories, keys, values, gates_LBNH, pages["state"], self.blocks)

    def attend(self, asked: ServedCall) -> torch.Tensor:
        """Attention of the tokens in one layer, `[B, 1, H, V]`; see `Step.attend`."""
        served, _, projected, inputs, options = asked
        q_BH1K, k_BG1K, v_BG1V = (x[:, :, : self.count].transpose(0, 2) for x in projected)
        hidden = inputs["hidden_states"][0, : self.count, None]
        served.pages["keys"][self.blocks, :, self.slots] = k_BG1K.squeeze(2)
        served.pages["values"][self.blocks, :, self.slots] = v_BG1V.squeeze(2)
        call = self.layer_call(served, hidden, inputs)
        self.note(call, served, (q_BH1K, k_BG1K, v_BG1V))
        sink_q = call.sink_queries(q_BH1K, self.longest)
        softmax = softmax_of(q_BH1K, options.get("scaling"), 0.0, dict(options))
        local = self._attend_local(served, q_BH1K.contiguous(), sink_q, softmax)
        rows, q_B1HK = (served.pages["state"], self.blocks), q_BH1K.transpose(1, 2)
        return served.memory.decode_add(local, q_B1HK, hidden, *rows)

    def layer_call(self, served: ServedLayer, hidden: torch.Tensor, inputs: Mapping[str, Any]) -> LayerCall:
        """A layer in this step.

        Args:
            served: The layer.
            hidden: What its attention reads, `[B, 1, D]`.
            inputs: Its rotary tables and the positions of the tokens, as in `ServedCall`.
        """
        return LayerCall(served.layer, served.memory, self.call, hidden, None, self._rotary(served, inputs))

    def note(
        self, call: LayerCall, served: ServedLayer, projected: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    ) -> None:
        """Keeps what a layer has read, for the gates of the tokens, and scores the tokens.

        Args:
            call: The layer in this step.
            served: The layer.
            projected: Queries, keys and values of the tokens, `[B, ?, 1, ?]` each; `None` where nothing scores them.
        """
        self.hidden[served.layer.index] = call.hidden
        if self.anchors is not None and projected is not None:
            self.anchors.score(served, call, projected)

    def _rotary(self, served: ServedLayer, inputs: Mapping[str, Any]) -> Rotary | None:
        tables = inputs.get("position_embeddings")
        if served.layer.rotation is None or tables is None:
            return None

        def turned() -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
            own = tuple(table[0, : self.count, None] for table in tables)
            return own, inputs["position_ids"][0, : self.count, None]

        (cos, sin), positions = self.call.shared("tables", tables[0], turned)
        return Rotary(served.layer.rotation, (cos, sin), positions, False)

    def _attend_local(
        self, served: ServedLayer, q_BH1K: torch.Tensor, sink_q_BH1K: torch.Tensor | None, softmax: Softmax
    ) -> Attended:
        keys, values, sinks = served.pages["keys"], served.pages["values"], self.runtime.exact.sinks
        if softmax.is_plain and native.ready(q_BH1K, keys, values, sizes=(keys.size(3), values.size(3))):
            parts = [(q_BH1K, slice(0, None), self.used)]
            if sink_q_BH1K is not None and sinks:
                counts = self.used.clamp(max=sinks)
                parts = [
                    (sink_q_BH1K.contiguous(), slice(0, sinks), counts),
                    (q_BH1K, slice(sinks, None), self.used - counts),
                ]
            segments = [
                Segment(query, keys[:, :, span], values[:, :, span], rows=self.blocks, counts=counts)
                for query, span, counts in parts
            ]
            if self.anchors is not None:
                extra = served.pages["anchor_keys"], served.pages["anchor_values"]
                segments.append(Segment(parts[0][0], *extra, rows=self.blocks, counts=self.anchors.counts))
            B, H, _, _ = q_BH1K.shape
            log_sum_B1H = q_BH1K.new_empty(B, 1, H) if served.memory.reads_log_sum else None
            return Attended(native.attend_one(segments, 0, softmax.scaling, log_sum_B1H), log_sum_B1H)
        return self._attend_in_torch(served, q_BH1K, sink_q_BH1K, softmax)

    def _attend_in_torch(
        self, served: ServedLayer, q_BH1K: torch.Tensor, sink_q_BH1K: torch.Tensor | None, softmax: Softmax
    ) -> Attended:
        """The same in torch, on a copy of the rings."""
        keys, values = (served.pages[name][self.blocks] for name in ("keys", "values"))
        beyond, sinks = torch.arange(keys.size(2), device=keys.device) >= self.used[:, None], self.runtime.exact.sinks
        if self.anchors is not None:
            extra = (served.pages[name][self.blocks] for name in ("anchor_keys", "anchor_values"))
            keys, values = (torch.cat(pair, dim=2) for pair in zip(extra, (keys, values), strict=True))
            missing = self.anchors.missing
            beyond, sinks = torch.cat((missing, beyond), dim=1), sinks + missing.size(1)
        mask_B11N = torch.zeros(beyond.shape, device=keys.device).masked_fill_(beyond, float("-inf"))[:, None, None]
        reading = Reading(q_BH1K, sink_q_BH1K, keys, values, mask_B11N, slice(0, sinks))
        weights = explicit_weights(reading, softmax)
        output = torch.matmul(weights.to(values.dtype), values).view(self.count, 1, -1, values.size(3))
        wants_log_sum = served.memory.reads_log_sum
        return Attended(output, explicit_log_sum(reading, softmax).transpose(1, 2) if wants_log_sum else None)

    def close(self) -> None:
        """Stores the gates of the new tokens, which every layer has read."""
        for group in self.runtime.groups:
            memories, record = group.memories, group.pages["record"]
            x_LBD = torch.stack([self.hidden[served.layer.index] for served in group.layers]).squeeze(2)
            gates_LBNH = type(memories[0]).gates_of_layers(memories, x_LBD)
            record[:, self.blocks, 0, self.slots] = TokenRecord(gates_LBNH, None).pack().to(record.dtype)
        if self.anchors is not None:
            self.anchors.close()
