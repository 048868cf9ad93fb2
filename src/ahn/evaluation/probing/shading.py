"""The tokens of a text with what the loss still lacks of each: words, part of the text, shade, and all of it as HTML.

One hue in several strengths, so that nobody has to tell colours apart.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from html import escape
from typing import Any, Literal

import torch

from ahn.evaluation.probing.gradients import TokenGradients
from ahn.models.text import GrowingText

Part = Literal["sinks", "evicted", "window"]
PARTS: tuple[Part, ...] = ("sinks", "evicted", "window")
"""The three parts of a text, in their order."""

_OUTSIDE = 0.02  # share of the tokens at either end that do not stretch the scale


@dataclasses.dataclass(frozen=True)
class ShownToken:
    """One token of a text.

    Attributes:
        position: Its place in the text, from 0.
        text: What it adds to the text; empty for all but the last of several tokens that share one character.
        part: Where it is when the text ends.
        norm: Length of the gradient on its embedding.
        shade: Where an evicted token lies on the scale, from 0 to 1; 0 elsewhere.
    """

    position: int
    text: str
    part: Part
    norm: float
    shade: float


@dataclasses.dataclass(frozen=True)
class Scale:
    """A logarithmic scale from 0 to 1; what lies outside is shown at its ends.

    Attributes:
        low: Where it begins, above 0.
        high: Where it ends.
    """

    low: float
    high: float

    @classmethod
    def spanning(cls, values: torch.Tensor) -> Scale:
        """The scale of values, from the second to the ninety-eighth of a hundred; zeros do not count.

        Args:
            values: `[N]`, at least 0.
        """
        positive = values[values > 0].double()
        if not positive.numel():
            return cls(1.0, 1.0)
        low, high = positive.quantile(positive.new_tensor([_OUTSIDE, 1 - _OUTSIDE])).tolist()
        return cls(low, high)

    def shade(self, value: float) -> float:
        """Where a value lies."""
        if value <= self.low or self.high <= self.low:
            return 0.0
        return min(1.0, math.log(value / self.low) / math.log(self.high / self.low))


def show_tokens(texts: Sequence[str], gradients: TokenGradients, scale: Scale) -> list[ShownToken]:
    """The tokens of a text in their order.

    Args:
        texts: What each token adds to the text, as `token_texts` gives it.
        gradients: What was measured.
        scale: Of the evicted tokens' gradients.
    """
    evicted, shown = gradients.evicted, []
    for position, (text, norm) in enumerate(zip(texts, gradients.norms.tolist(), strict=True)):
        part: Part = "sinks" if position < evicted.start else "evicted" if position in evicted else "window"
        shown.append(ShownToken(position, text, part, norm, scale.shade(norm) if part == "evicted" else 0.0))
    return shown


def strongest(tokens: Sequence[ShownToken], count: int) -> list[tuple[ShownToken, str]]:
    """The evicted tokens with the largest gradients, each with the words around it, itself in brackets.

    Args:
        tokens: All tokens of the text.
        count: How many.
    """
    ranked = sorted((token for token in tokens if token.part == "evicted"), key=lambda token: -token.norm)
    return [(token, _surroundings(tokens, token.position)) for token in ranked[:count]]


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; joined, the text that the tokenizer makes of all of them."""
    growing = GrowingText(tokenizer, special=True)
    texts = [growing.add(token) for token in ids]
    return [*texts[:-1], *(last + growing.end() for last in texts[-1:])]


def _surroundings(tokens: Sequence[ShownToken], position: int, before: int = 6, after: int = 4) -> str:
    """The words around a token in one line: "the tide table [ Mir]anda kept in"."""
    left = "".join(token.text for token in tokens[max(0, position - before) : position])
    right = "".join(token.text for token in tokens[position + 1 : position + 1 + after])
    return " ".join(f"{left}[{tokens[position].text}]{right}".split())


STYLE = """
:root { --heat: 236 126 20; } @media (prefers-color-scheme: dark) { :root { --heat: 186 82 0; } }
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.9; border: 1px solid var(--line);
  border-radius: 6px; padding: .6rem .8rem; }
.tokens span, .key i { border-radius: 3px; padding: .12em 0; }
.tokens .evicted { background: rgb(var(--heat) / calc(var(--s, 0) * .92)); }
.tokens .sinks, .key .sinks { text-decoration: underline dotted 2px; text-underline-offset: .25em; }
.tokens .window, .key .window { text-decoration: underline solid 1px; text-underline-offset: .25em; opacity: .75; }
.key { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; align-items: center; font-size: .9rem; }
.key .ramp { display: inline-block; width: 9rem; height: 1.1em; vertical-align: middle; margin: 0 .4rem;
  background: linear-gradient(90deg, rgb(var(--heat) / 0), rgb(var(--heat) / .92)); border: 1px solid var(--line); }
"""
"""What `coloured_text` needs beside the style of a page."""


def coloured_text(tokens: Sequence[ShownToken], scale: Scale) -> str:
    """The text as HTML, the evicted tokens coloured by their gradients, with a legend above.

    Args:
        tokens: All tokens of the text.
        scale: Of the evicted tokens' gradients.
    """
    spans = "".join(_span(token) for token in tokens if token.text)
    return f'{_legend(tokens, scale)}\n<div class="tokens">{spans}</div>'


def _span(token: ShownToken) -> str:
    shade = f' style="--s:{token.shade:.2f}"' if token.shade else ""
    title = f"token {token.position}, {token.part}: {token.norm:.3g}"
    return f'<span class="{token.part}" title="{title}"{shade}>{escape(token.text)}</span>'


def _legend(tokens: Sequence[ShownToken], scale: Scale) -> str:
    counts = {part: sum(token.part == part for token in tokens) for part in PARTS}
    return (
        f'<div class="key"><span>evicted ({counts["evicted"]:,}): {scale.low:.2g}<i class="ramp"></i>{scale.high:.2g}'
        f' (logarithmic)</span><span class="sinks">sinks ({counts["sinks"]:,})</span>'
        f'<span class="window">window ({counts["window"]:,})</span></div>'
    )
