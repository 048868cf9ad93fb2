"""What vLLM does around `ahn.serving.vllm`, without vLLM: pages, blocks, and batches of tokens of several requests."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface

from ahn.attachment import attachment_of
from ahn.attention.decoder_parts import PartReader, decoder_layers
from ahn.backbone.survey import find_backbone
from ahn.config import RunSettings
from ahn.serving.vllm.decoder import leave_to_kernels
from ahn.serving.vllm.layout import block_bytes, block_tensors, empty_cache
from ahn.serving.vllm.runtime import Rows, Runtime, ServedCall, ServedLayer
from ahn.serving.vllm.step import ServedStep

NAME = "ahn_fake_engine"


@dataclasses.dataclass
class Request:
    """A text that is being read and written, in a block of its own."""

    tokens: list[int]
    block: int
    seen: int = 0
    hidden: list[torch.Tensor] = dataclasses.field(default_factory=list)


class Engine:
    """A model with a memory attached, read as vLLM reads one: all tokens of a step side by side in one row."""

    def __init__(self, model: Any, blocks: int = 6, together: bool = True, kernels: bool = True) -> None:
        attachment = attachment_of(model)
        self.backbone = find_backbone(model)
        settings = RunSettings.like(attachment.settings)
        cache = empty_cache(attachment, settings)
        layers = {i: ServedLayer(layer, block_tensors(cache, i)) for i, layer in enumerate(attachment.layers)}
        page = max(block_bytes(each.tensors) for each in layers.values())
        # What another request left there: no number may survive it.
        buffer = torch.full((len(layers), blocks, page), 127, dtype=torch.int8)
        for index, served in layers.items():
            offset = 0
            for tensor in served.tensors:
                part = buffer[index][:, offset : offset + tensor.nbytes]
                served.pages[tensor.name] = part.view(tensor.dtype).view(blocks, *tensor.shape)
                offset += tensor.nbytes
        self.runtime = Runtime(attachment, settings, layers)
        self.board = cache.scoreboard
        if not together:
            self.runtime.__dict__["decodes_together"] = False
        self.step: ServedStep | None = None
        self.inputs: dict[int, dict[str, Any]] = {}
        self.own_forwards = {
            layer: vars(layer).pop("forward", None)
            for layer, _ in decoder_layers(self.backbone, [each.module for each in attachment.layers])
        }
        self.fast = leave_to_kernels(self.backbone, self.runtime, lambda: self.step, PartReader()) if kernels else []
        self.forwards = {layer: vars(layer).pop("forward", None) for layer in self.own_forwards}
        _set_forwards(self.own_forwards)

    @torch.no_grad()
    def run(self, parts: list[tuple[Request, int]]) -> None:
        """Reads the next tokens of some requests, this many of each, single ones first as vLLM orders them."""
        parts = sorted(parts, key=lambda part: part[1])
        rows, ids, positions = [], [], []
        for request, count in parts:
            rows.append(Rows(request.block, request.seen, len(ids), len(ids) + count))
            ids += request.tokens[request.seen : request.seen + count]
            positions += range(request.seen, request.seen + count)
        self.step = ServedStep(self.runtime, rows)
        with _Hooked(self):
            out = self.backbone(
                input_ids=torch.tensor([ids]), position_ids=torch.tensor([positions]), use_cache=False
            ).last_hidden_state
        for (request, count), row in zip(parts, rows, strict=True):
            request.hidden.append(out[0, row.start : row.stop])
            request.seen += count

    def attend(self, module: Any, q: Any, k: Any, v: Any, mask: Any, **options: Any) -> tuple[torch.Tensor, None]:
        """The attention function of the model while it is read so."""
        assert self.step is not None
        served = self.runtime.layers[module.layer_idx]
        asked = ServedCall(served, module, (q, k, v), self.inputs.pop(module.layer_idx), options)
        return self.step.attend(asked), None

    def read(self, texts: list[list[int]], seed: int = 0, longest: int = 40) -> list[torch.Tensor]:
        """Last hidden states of texts that are read together in random chunks, many of one token."""
        draw = random.Random(seed)
        longest = min(longest, self.board.longest_call) if self.board is not None else longest
        blocks = draw.sample(range(1, 6), len(texts))
        requests = [Request(text, block) for text, block in zip(texts, blocks, strict=True)]
        while unread := [request for request in requests if request.seen < len(request.tokens)]:
            chosen = draw.sample(unread, draw.randint(1, len(unread)))
            self.run(
                [(r, min(len(r.tokens) - r.seen, draw.choice([1, 1, 1, draw.randint(2, longest)]))) for r in chosen]
            )
        return [torch.cat(request.hidden) for request in requests]


def _set_forwards(forwards: dict[Any, Any]) -> None:
    """Gives decoder layers forwards of their own, or takes them away."""
    for layer, forward in forwards.items():
        vars(layer).pop("forward", None)
        if forward is not None:
            layer.forward = forward


class _Hooked:
    """Sends the attention of the model to an engine inside a `with` block, past the hooks of the memory."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __enter__(self) -> None:
        engine, attachment = self.engine, self.engine.runtime.attachment
        AttentionInterface.register(NAME, engine.attend)
        AttentionMaskInterface.register(NAME, eager_mask)
        self.hooks = {}
        for module in {engine.backbone, *(layer.module for layer in attachment.layers)}:
            self.hooks[module] = module._forward_pre_hooks, module._forward_hooks
            module._forward_pre_hooks, module._forward_hooks = type(module._forward_pre_hooks)(), {}
        for config, _ in attachment.implementations:
            config._attn_implementation = NAME
        _set_forwards(engine.forwards)
        self.handles = [
            layer.module.register_forward_pre_hook(
                lambda module, args, kwargs: engine.inputs.update(
                    {module.layer_idx: {**({"hidden_states": args[0]} if args else {}), **kwargs}}
                ),
                with_kwargs=True,
            )
            for layer in attachment.layers
        ]

    def __exit__(self, *error: object) -> None:
        _set_forwards(self.engine.own_forwards)
        for handle in self.handles:
            handle.remove()
        for module, (before, after) in self.hooks.items():
            module._forward_pre_hooks, module._forward_hooks = before, after
        for config, _ in self.engine.runtime.attachment.implementations:
            config._attn_implementation = "ahn"
