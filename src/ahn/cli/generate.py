"""`ahn generate`: reads a prompt, or a text of any length and a question about it, and streams the answer."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ahn.cli import checks
from ahn.cli.loading import ModelChoice
from ahn.cli.options import from_fields
from ahn.cli.terminal import UsageError, log, megabytes, notes
from ahn.config import setting

if TYPE_CHECKING:
    from ahn.cli.loading import Loaded
    from ahn.config import AHNConfig
    from ahn.generation import Reader

EXAMPLES = """Examples:

ahn generate "What is a context manager?"

ahn generate "Who tells the story?" --file book.txt

git log | ahn generate "What has changed?" --file - --window 2048

ahn generate "Who is Ishmael?" --file moby.txt --mode ahn+64  [dim]# anchors too[/dim]

ahn generate --file book.txt --cache-out book.cache  [dim]# read once,[/dim]

ahn generate "Where does it begin?" --cache-in book.cache  [dim]# ask often[/dim]
"""


@dataclass(frozen=True)
class GenerateSettings:
    """What to read, and how to answer."""

    prompt: str = setting("", "What to answer; with --file, a question.", argument=True, metavar="PROMPT")
    file: str | None = setting(None, "A text to read before the prompt; - for standard input.")
    mode: str | None = setting(
        None, "What to read with; ahn+64 keeps 64 anchors too.", metavar="ahn|window|full", unset="ahn"
    )
    max_new_tokens: int = setting(256, "Most tokens to write.", least=1)
    chunk: int | None = setting(None, "Tokens to read at a time.", least=1, unset="512")
    temperature: float = setting(0.0, "0 writes the likeliest token; above, tokens are drawn.", least=0)
    seed: int | None = setting(None, "Of the random numbers.")
    chat: bool | None = setting(None, "Use the chat template.", names="--chat/--no-chat", unset="if the model has one")
    cache_in: Path | None = setting(None, "Go on from this saved cache.")
    cache_out: Path | None = setting(None, "Save the cache here; without a prompt, only read.")

    @property
    def only_reads(self) -> bool:
        """Whether a text is to be read and saved, with no question about it."""
        return self.cache_out is not None and not self.prompt.strip()


@from_fields
def command(settings: GenerateSettings, source: ModelChoice) -> None:
    """Read a prompt, or a text of any length and a question about it, and write the answer."""
    checks.mode("--mode", settings.mode)
    _check_caches(settings, source)
    if settings.file is None and not settings.prompt.strip():
        raise UsageError('there is nothing to read. Give a prompt ("..."), or a text with --file.')
    text = "" if settings.file is None else checks.text_file("--file", settings.file)
    saved = _saved_settings(settings.cache_in) if settings.cache_in is not None else None
    from ahn.cli import loading

    loaded = loading.load(source, like=saved)
    reader = _read(loaded, settings, text, follows=saved is not None)
    if not settings.only_reads:
        _answer(loaded, settings, reader)
    if settings.cache_out is not None:
        cache: Any = reader.cache
        cache.save(settings.cache_out)
        log(f"saved {settings.cache_out}: {cache.seen_tokens:,} tokens in {megabytes(cache.nbytes)} MB", "dim")


def _check_caches(settings: GenerateSettings, source: ModelChoice) -> None:
    checks.file_to_read("--cache-in", settings.cache_in)
    checks.file_to_write("--cache-out", settings.cache_out)
    if settings.cache_out is not None and settings.mode == "full":
        raise UsageError("--cache-out saves what a memory or a window keeps. Use it with --mode ahn or window.")
    if settings.cache_in is None:
        return
    fixed = {"window": source.window, "sinks": source.sinks, "sink-positions": source.sink_positions}
    for name, value in {**fixed, "mode": settings.mode}.items():
        if value is not None:
            raise UsageError(f"--{name} does not go with --cache-in, which keeps what it was made with. Leave it out.")


def _saved_settings(path: Path) -> AHNConfig:
    """The memory that a saved cache asks for."""
    from ahn.cache.storage import describe_cache
    from ahn.config import AHNConfig

    saved = describe_cache(path)
    settings, fingerprint = saved["settings"], saved["model"]
    layers = tuple(index for index, layer in enumerate(fingerprint["layers"]) if layer[6])
    return AHNConfig(
        memory=fingerprint["memory"],
        window=settings["window"],
        sinks=settings["sinks"],
        layers=layers,
        sink_positions=settings["sink_positions"],
        memory_positions=fingerprint["memory_positions"],
    )


def _read(loaded: Loaded, settings: GenerateSettings, text: str, follows: bool) -> Reader:
    """Reads text and prompt, with a progress bar on a terminal and a closing line anywhere."""
    import torch

    import ahn
    from ahn.cli.terminal import reading_bar, summary
    from ahn.evaluation.arm_names import find_arm
    from ahn.generation import Reader
    from ahn.models import prompts

    chat = prompts.has_chat(loaded.tokenizer) if settings.chat is None else settings.chat
    if chat and not prompts.has_chat(loaded.tokenizer):
        raise UsageError(f"{loaded.name} has no chat template. Leave --chat out.")
    make = prompts.follow_up if follows else prompts.passage
    passage = make(loaded.tokenizer, text, settings.prompt, chat)
    closing = passage.closing[:0] if settings.only_reads else passage.closing
    ids = torch.cat((passage.opening, passage.text, closing))
    if ids.numel() == 0:
        raise UsageError("the tokenizer makes no token of this text. Give a longer one.")
    arm = find_arm(settings.mode or "ahn")
    with ahn.mode(loaded.model, arm.method, **arm.settings(loaded.config.window)):  # type: ignore[arg-type]
        cache = None if settings.cache_in is None else ahn.HippocampalCache.load(settings.cache_in, loaded.model)
        reader = Reader(loaded.model, cache, score=False)
        with reading_bar(notes(), ids.numel()) as update:
            reader.prefill(ids, settings.chunk, update)
    if text:
        log(summary(loaded.model, reader), "dim")
    return reader


def _answer(loaded: Loaded, settings: GenerateSettings, reader: Reader) -> None:
    """Writes the answer while it grows."""
    from ahn.generation import decode, stream_text
    from ahn.models import prompts

    stop = prompts.stop_ids(loaded.model, loaded.tokenizer)
    ids = decode(reader, settings.max_new_tokens, stop, settings.temperature, settings.seed)
    for words in stream_text(loaded.tokenizer, ids):
        sys.stdout.write(words)
        sys.stdout.flush()
    sys.stdout.write("\n")
