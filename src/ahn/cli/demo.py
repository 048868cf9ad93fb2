"""`ahn demo`: a small model reads a long text in several modes, and is asked for a fact from its beginning."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING

from ahn.cli import checks
from ahn.cli.loading import AnchoredModel, ModelSettings
from ahn.cli.options import from_fields
from ahn.cli.terminal import UsageError, output
from ahn.config import USUAL_ANCHORS, same_setting, setting

if TYPE_CHECKING:
    from ahn.cli.comparison import Comparison
    from ahn.cli.screen import Screen

EXAMPLES = """Examples:

ahn demo  [dim]# under two minutes[/dim]

ahn demo --tokens all --modes window  [dim]# far past the trained context[/dim]

ahn demo --file book.txt --question "Who tells the story?"
"""
FACT = "The secret number of the quiet-harbour is 4815162."
QUESTION = "What is the secret number of the quiet-harbour?"


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    """What is read, for how long, in which modes, and what is asked at the end."""

    tokens: str | None = setting(
        None, "How many tokens to read.", metavar="N|all", unset="as --seconds allow, at most 4,096 if a fact is hidden"
    )
    seconds: float = setting(75.0, "Without --tokens: start to answer after this time, loading included.", least=1)
    file: str | None = setting(None, "A text; - for standard input.", unset="Python's reference")
    question: str | None = setting(None, "What to ask at the end; empty for nothing.", unset="for a hidden fact")
    fact: str | None = setting(
        None, "A sentence to hide near the beginning; none without it where --question is given."
    )
    modes: str | None = setting(
        None,
        "Modes to compare, joined by commas; ahn+64 keeps 64 anchors.",
        unset=f"ahn+{USUAL_ANCHORS}, ahn, window, full",
    )
    max_new_tokens: int = setting(48, "Most tokens of an answer.", least=1)
    seed: int = setting(0, "Of the weights of an untrained memory.")


@dataclasses.dataclass(frozen=True)
class DemoModel(ModelSettings):
    """Which model is shown, with which window and how many anchors; a small window soon has something to forget."""

    window: int = same_setting(ModelSettings, "window", default=256)
    anchors: int | None = same_setting(AnchoredModel, "anchors", unset=str(USUAL_ANCHORS))


@from_fields
def command(settings: DemoSettings, source: DemoModel) -> None:
    """A small model reads a long text in several modes, and is asked for a fact that was hidden near its beginning."""
    started = time.monotonic()
    modes = _modes(settings.modes, source.anchors)
    limit = _limit(settings.tokens)
    text = None if settings.file is None else checks.text_file("--file", settings.file)
    from ahn.cli import loading
    from ahn.cli.comparison import IN_A_HURRY, Comparison, ReadingLimits
    from ahn.cli.screen import Screen
    from ahn.cli.texts import reference, with_fact
    from ahn.models import prompts

    loading.seed(settings.seed)
    loaded = loading.load(source)
    fact = settings.fact if settings.fact is not None else FACT if settings.question is None else ""
    limits = ReadingLimits(
        IN_A_HURRY if settings.tokens is None and fact else limit,
        started + settings.seconds if settings.tokens is None else None,
        settings.max_new_tokens,
    )
    title = "standard input" if settings.file == "-" else settings.file or "Python's language reference"
    whole = reference() if text is None else text
    question = QUESTION if settings.question is None else settings.question
    words = with_fact(whole, fact) if fact else whole
    passage = prompts.passage(loaded.tokenizer, words, question, prompts.has_chat(loaded.tokenizer))
    compare(Comparison(loaded, passage, modes, limits), Screen(output()), title, question, fact)


def compare(comparison: Comparison, screen: Screen, title: str, question: str, fact: str = "") -> None:
    """Reads, asks, and shows both on the screen; interrupted, it shows how far it came.

    Args:
        comparison: The modes and what they read.
        screen: Where to show it.
        title: What the text is called.
        question: What is asked at the end; empty for nothing.
        fact: A sentence that was hidden in the text near its beginning, or nothing.
    """
    screen.opening(comparison, title, fact)
    try:
        with screen.live(comparison):
            comparison.read(lambda: screen.update(comparison))
    finally:  # also when interrupted: the table so far
        screen.table(comparison)
    screen.remarks(comparison)
    if question.strip():
        gone = fact if comparison.read_tokens > 2 * comparison.exact else ""
        with screen.thinking():
            comparison.answer()
        screen.answers(comparison, question, gone)


def _modes(named: str | None, anchors: int | None) -> list[str]:
    """Modes to compare: those that the user named, or all with so many anchors in the first."""
    if named is None:
        count = USUAL_ANCHORS if anchors is None else anchors
        return [*([f"ahn+{count}"] if count else []), "ahn", "window", "full"]
    if anchors is not None:
        raise UsageError("--anchors does not go with --modes, whose names say how many: ahn+64. Leave it out.")
    return checks.modes("--modes", named)


def _limit(tokens: str | None) -> int | None:
    """Most tokens to read, or `None` for all."""
    if tokens is None or tokens in ("all", "0"):
        return None
    if not tokens.isdecimal() or int(tokens) < 2:
        raise UsageError(f"--tokens must be a number of at least 2, or all, not '{tokens}'.")
    return int(tokens)
