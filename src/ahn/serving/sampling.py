"""Which token comes next, and how likely it was.

Legend of shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from transformers.generation.logits_process import LogitsProcessorList

from ahn.generation import make_processors, next_token
from ahn.serving.stream import TokenChoice

_COLDEST = 1e-30  # below, logits over it are no float32


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the likeliest token; above, tokens are drawn.
        top_p: Share of the probability from which tokens are drawn, the likeliest ones first.
        seed: Of the random numbers; new ones if left out.
        top_logprobs: How many of the likeliest tokens are told with theirs; `None` tells no log-probabilities.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    top_logprobs: int | None = None

    def generator(self, choice: int) -> torch.Generator:
        """Random numbers of one of the answers to a request."""
        generator = torch.Generator()
        generator.seed() if self.seed is None else generator.manual_seed((self.seed + choice) % 2**63)
        return generator

    def choose(self, logits_V: torch.Tensor, generator: torch.Generator) -> int:
        """The next token."""
        return next_token(logits_V, self._processors, generator if self._draws else None)

    @functools.cached_property
    def _processors(self) -> LogitsProcessorList:
        return make_processors(self.temperature if self._draws else 0, top_p=self.top_p)

    @property
    def _draws(self) -> bool:
        return self.temperature > _COLDEST

    def token_choices(self, token: int, logits_V: torch.Tensor) -> tuple[TokenChoice, ...]:
        """What is told about a token: one entry, or none."""
        if self.top_logprobs is None:
            return ()
        return tuple(likelihoods(logits_V[None], torch.tensor([token]), self.top_logprobs))


def likelihoods(logits_TV: torch.Tensor, tokens_T: torch.Tensor, top: int) -> list[TokenChoice]:
    """How likely tokens were.

    Args:
        logits_TV: What the model expected in the place of each.
        tokens_T: The tokens.
        top: How many of the likeliest ones are told.
    """
    logprobs_TV = torch.log_softmax(logits_TV.float().cpu(), dim=-1)
    own = logprobs_TV.gather(1, tokens_T[:, None])[:, 0].tolist()
    best = logprobs_TV.topk(min(top, logprobs_TV.size(1)), dim=-1)
    pairs = [tuple(zip(ids, values)) for ids, values in zip(best.indices.tolist(), best.values.tolist())]
    return [TokenChoice(*each) for each in zip(tokens_T.tolist(), own, pairs)]
