"""Names of what was read: a digest of the tokens, and one of the model that read them."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ahn.attachment import attachment_of

_SAMPLE = 4096


class PrefixKey(NamedTuple):
    """The beginning of a text.

    Attributes:
        root: The document that it follows; empty without one.
        length: Tokens after the document.
        digest: SHA-256 of these tokens.
    """

    root: str
    length: int
    digest: str

    @property
    def file_name(self) -> str:
        """Name of its file."""
        return f"{self.root or 'text'}.{self.length}.{self.digest}.cache"

    @classmethod
    def of_file(cls, name: str) -> PrefixKey | None:
        """The key that `file_name` made a name of, or `None`."""
        parts = name.split(".")
        if len(parts) != 4 or parts[3] != "cache" or not parts[1].isdecimal() or len(parts[2]) != 64:
            return None
        return cls("" if parts[0] == "text" else parts[0], int(parts[1]), parts[2])


def prefix_keys(root: str, tokens: Sequence[int], lengths: Iterable[int]) -> Iterator[PrefixKey]:
    """Keys of the first tokens of a text, in one pass.

    Args:
        root: The document that it follows; empty without one.
        tokens: Its tokens.
        lengths: How many of them, for each key; in rising order.
    """
    data, digest, done = np.asarray(tokens, dtype="<i4"), hashlib.sha256(), 0
    for length in lengths:
        digest.update(data[done:length].tobytes())
        done = length
        yield PrefixKey(root, length, digest.copy().hexdigest())


def model_key(model: Any, name: str) -> str:
    """A digest of a model, its memory and how it reads: caches of one are of no use to another.

    Weights of the base model go in by a sample, those of the memory in whole.
    """
    attachment = attachment_of(model)
    facts = {"name": name, "config": attachment.config.to_dict(), "run": attachment.settings.to_dict()}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    memories = {id(each) for layer in attachment.layers if layer.memory for each in layer.memory.parameters()}
    # Quantised weights are no parameters.
    for key, parameter in itertools.chain(model.named_parameters(), model.named_buffers()):
        part = parameter.detach().flatten()
        part = part if id(parameter) in memories else part[:: max(1, part.numel() // _SAMPLE)]
        digest.update(f"{key} {list(parameter.shape)} {parameter.dtype}".encode())
        digest.update(part.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:24]
