"""One decoded token through decoder layers in one call of the kernels, where the layers are of the usual build.

A layer's own forward is the reference. The first token that the kernel could take goes both ways, and the kernel is
used from then on if it gives the same. Some layers compute otherwise further on in a text, so that a token goes both
ways again where the first one has left the window, where sinks are turned, and each time that the text has doubled.
Whatever it does not take goes through the layer's own forward: hooks and
adapters on parts of the layer, padding, autocast, other dtypes, several rows.

Layers of which each read what the one before gave are run together from the next token on, when the model comes to the
first of them. The others then give what they gave already, unless the model brings something else: what they have
stored is taken back, and they run one by one. No layer is run ahead of a hook that something else has put between
two of them: it may change what it is given without a trace.

Legend of shapes: D hidden size, K size of keys and values.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from ahn.attachment import Attachment
from ahn.attention.call import Call
from ahn.attention.decoder_parts import decoder_layers
from ahn.attention.decoder_run import FastPath, LayerInput, run_paths
from ahn.attention.decoding import KernelProgress, LayerRun, Precomputed
from ahn.attention.masks import CallMask
from ahn.backbone import compat


def speed_up(backbone: nn.Module, attachment: Attachment) -> None:
    """Lets decoder layers with a memory look for the kernel first. Those that something else has changed stay so."""
    served = [layer.module for layer in attachment.layers if layer.memory is not None]
    for layer, attention in decoder_layers(backbone, served):
        if "forward" not in vars(layer):
            layer.forward = FastForward(layer, attention)


def restore(backbone: nn.Module) -> None:
    """Takes back what `speed_up` did."""
    for module in backbone.modules():
        if isinstance(vars(module).get("forward"), KernelForward):
            del module.forward


class KernelForward:
    """The forward of a decoder layer: by the kernel where that can take the tokens, else the layer's own.

    A subclass says in which calls that may be, and how the kernel is called. What such a call is told to the layer by
    is its own; a `FastPath` or what works alike is the layer as the kernel takes it.

    Args:
        layer: The decoder layer.
        attention: Its attention module.

    Attributes:
        path: The layer as the kernel takes it; `None` before the first token.
        follower: The layer that was given what this one gave for the last token, and the same tables.
    """

    def __init__(self, layer: Any, attention: Any) -> None:
        self.path: Any = None
        self.follower: KernelForward | None = None
        self._layer, self._attention = layer, attention

    def __getstate__(self) -> dict[str, Any]:
        """A copied layer looks for the kernel anew."""
        return {**vars(self), "path": None, "follower": None}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer's forward gives."""
        own = partial(type(self._layer).forward, self._layer, *args, **kwargs)
        call, tables = self._find_call(kwargs), kwargs.get("position_embeddings")
        if call is None or not args or torch.compiler.is_compiling():
            return own()
        progress = self._progress(call)
        inputs = LayerInput(args[0], tables, kwargs.get("position_ids"))  # type: ignore[arg-type]
        run = self._foreseen(progress, inputs)
        if run is None:
            progress.take_back()
            path = self._find_path(call)
            if tables is None or not path.can_take(call) or not path.can_read(inputs, call):
                return own()
            if not path.is_verified(call):
                return path.verify(inputs, call, own)
            run = self._run_span(path, inputs, call)
        progress.last = self, run, tables
        if run.finish is not None:
            run.finish()
        return run.output

    def _find_call(self, kwargs: dict[str, Any]) -> Any:
        """The call that the layer is in, if the kernel may take part; else `None`."""
        raise NotImplementedError

    def _progress(self, call: Any) -> KernelProgress:
        """What the kernel has done of a call."""
        raise NotImplementedError

    def _new_path(self, call: Any) -> Any:
        """The layer as the kernel takes it."""
        raise NotImplementedError

    def _run_paths(self, paths: list[Any], inputs: LayerInput, call: Any) -> list[LayerRun]:
        """Takes the tokens of a call through layers of which each reads what the one before gives."""
        raise NotImplementedError

    def _foreseen(self, progress: KernelProgress, inputs: LayerInput) -> LayerRun | None:
        """What the layer has given already, where it was run ahead; notes whose output it is given."""
        run = None
        if progress.precomputed is not None and self.path is not None:
            run = progress.precomputed.take(self.path.index, inputs.hidden, inputs.tables)
        if run is None and progress.last is not None:
            previous, gave, tables = progress.last
            previous.follower = self if gave.is_given(inputs.hidden) and tables is inputs.tables else None
        return run

    def _find_path(self, call: Any) -> Any:
        if self.path is None or not self.path.is_of(call):
            self.path = self._new_path(call)
        return self.path

    def _run_span(self, path: Any, inputs: LayerInput, call: Any) -> LayerRun:
        """Runs the layer, and those behind it that the kernel can take too."""
        paths, last = [path], self
        while (after := last._ready_follower(call)) is not None and after.path not in paths:
            paths.append(after.path)
            last = after
        runs = self._run_paths(paths, inputs, call)
        if len(runs) > 1:
            self._progress(call).precomputed = Precomputed(runs, inputs.tables)
        return runs[0]

    def _ready_follower(self, call: Any) -> KernelForward | None:
        """The layer that reads what this one gives, if nothing is between them and the kernel can take it too."""
        after = self.follower
        if after is None or not compat.only_captures(self._layer) or after._layer._forward_pre_hooks:
            return None
        return after if after._is_ready(call) else None

    def _is_ready(self, call: Any) -> bool:
        """Whether the kernel can take the tokens of a call through the layer, and was seen to be right."""
        path = self.path
        if path is None or vars(self._layer).get("forward") is not self or not path.is_of(call):
            return False
        return bool(path.can_take(call) and path.is_verified(call))


class FastForward(KernelForward):
    """The forward of a decoder layer that reads a token into a cache."""

    def _find_call(self, kwargs: dict[str, Any]) -> Call | None:
        mask = kwargs.get("attention_mask")
        call = mask.call if type(mask) is CallMask else None
        return None if call is None or call.step is None else call

    def _progress(self, call: Call) -> KernelProgress:
        if call.step is None:
            raise TypeError("the call reads no single token")
        return call.step

    def _new_path(self, call: Call) -> FastPath:
        return FastPath(self._layer, self._attention, call)

    def _run_paths(self, paths: list[FastPath], inputs: LayerInput, call: Call) -> list[LayerRun]:
        return run_paths(paths, inputs, call)
