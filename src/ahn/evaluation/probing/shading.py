"""Tokens as coloured text in HTML. One hue in several strengths, so that nothing hangs on telling colours apart."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ahn.evaluation.probing.tokens import PARTS, Scale, ShownToken

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
