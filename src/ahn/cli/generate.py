"""`ahn generate`: reads a prompt, or a text of any length and a question about it, and streams the answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ahn.cli import checks
from ahn.cli.conversation import Conversation, read_all, write_answer
from ahn.cli.loading import AnchoredModel
from ahn.cli.options import from_fields
from ahn.cli.terminal import UsageError, log, megabytes
from ahn.config import setting

if TYPE_CHECKING:
    from ahn.cli.loading import Loaded
    from ahn.config import AHNConfig
    from ahn.generation import Reader

EXAMPLES = """Examples:

ahn generate "What is a context manager?"

ahn generate "Who tells the story?" --file book.txt

git log | ahn generate "What has changed?" --file - --window 2048

ahn generate "Who is Ishmael?" --file moby.txt --anchors 0  [dim]# the memory alone[/dim]

ahn generate --file book.txt --cache-out book.cache  [dim]# read once,[/dim]

ahn generate "Where does it begin?" --cache-in book.cache  [dim]# ask often[/dim]

ahn generate --chat --file book.txt  [dim]# talk about it; /exit ends[/dim]
"""


@dataclass(frozen=True)
class GenerateSettings:
    """What to read, and how to answer."""

    prompt: str = setting("", "What to answer; with --file, a question.", argument=True, metavar="PROMPT")
    file: str | None = setting(None, "A text to read before the prompt; - for standard input.")
    mode: str | None = setting(
        None, "What to read with; ahn+64 keeps 64 anchors.", metavar="ahn|window|full", unset="ahn"
    )
    max_new_tokens: int = setting(256, "Most tokens to write.", least=1)
    chunk: int | None = setting(None, "Tokens to read at a time.", least=1, unset="512")
    temperature: float = setting(0.0, "0 writes the likeliest token; above, tokens are drawn.", least=0)
    top_k: int | None = setting(None, "Draw from so many of the likeliest tokens only.", least=1)
    top_p: float | None = setting(None, "Draw from the likeliest tokens of this probability together.", least=0)
    repetition_penalty: float | None = setting(
        None, "Above 1, tokens that the answer has already are less likely.", least=0
    )
    seed: int | None = setting(None, "Of the random numbers.")
    system: str | None = setting(None, "What the model is told first, in a chat.")
    chat: bool | None = setting(
        None,
        "Use the chat template; without a prompt, talk in the terminal.",
        names="--chat/--no-chat",
        unset="if the model has one",
    )
    cache_in: Path | None = setting(None, "Go on from this saved cache.")
    cache_out: Path | None = setting(None, "Save the cache here; without a prompt, only read.")

    @property
    def talks(self) -> bool:
        """Whether there is to be a conversation in the terminal."""
        return bool(self.chat) and not self.prompt.strip()

    @property
    def only_reads(self) -> bool:
        """Whether a text is to be read and saved, with no question about it."""
        return self.cache_out is not None and not self.prompt.strip() and not self.talks


@from_fields
def command(settings: GenerateSettings, source: AnchoredModel) -> None:
    """Read a prompt, or a text of any length and a question about it, and write the answer."""
    checks.mode("--mode", settings.mode)
    _check_mode(settings.mode, source)
    _check_caches(settings, source)
    _check_words(settings)
    text = "" if settings.file is None else checks.text_file("--file", settings.file)
    saved = _saved_settings(settings.cache_in) if settings.cache_in is not None else None
    import ahn
    from ahn.cli import loading
    from ahn.evaluation.arm_names import find_arm

    if saved is None and source.sink_positions is None:
        source = replace(source, sink_positions="bounded")  # a text may be longer than those of the base's training
    loaded = loading.load(source, like=saved)
    chat = _uses_template(loaded, settings)
    arm = find_arm(settings.mode or "ahn")
    if settings.mode in (None, "ahn") and saved is None:
        arm = arm._replace(anchors=loaded.anchors(source.anchors))
    with ahn.mode(loaded.model, arm.method, **arm.settings(loaded.config.window)):  # type: ignore[arg-type]
        reader = _reader(loaded, settings)
        _say_what_reads(loaded, reader)
        if settings.talks:
            _converse(loaded, settings, reader, text)
        else:
            _read(loaded, settings, reader, text, chat)
            if not settings.only_reads:
                write_answer(loaded, _answer_of(loaded, settings, reader))
    if settings.cache_out is not None:
        cache: Any = reader.cache
        cache.save(settings.cache_out)
        log(f"saved {settings.cache_out}: {cache.seen_tokens:,} tokens in {megabytes(cache.nbytes)} MB", "dim")


def _check_mode(mode: str | None, source: AnchoredModel) -> None:
    """Checks that a mode is given nothing that it does not read with."""
    exact = ("window", "sinks", "sink_positions", "cache_dtype")
    unread = {None: (), "ahn": (), "full": ("anchors", *exact)}.get(mode, ("anchors",))
    for name in unread:
        if getattr(source, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} does not go with --mode {mode}. Leave one of them out.")


def _check_words(settings: GenerateSettings) -> None:
    """Checks what is to be read and how tokens are drawn."""
    if settings.file is None and not settings.prompt.strip() and not settings.talks:
        raise UsageError('there is nothing to read. Give a prompt ("..."), a text with --file, or talk with --chat.')
    if settings.talks and settings.file == "-":
        raise UsageError("--file - takes the standard input, which --chat needs for your words. Name a file.")
    if settings.system is not None and settings.cache_in is not None:
        raise UsageError("--system stands at the beginning, which --cache-in has read already. Leave one of them out.")
    if settings.system is not None and settings.chat is False:
        raise UsageError("--system is told in a chat. Leave --no-chat out.")
    if settings.top_p is not None and not 0 < settings.top_p <= 1:
        raise UsageError(f"--top-p must be above 0 and at most 1, not {settings.top_p}.")
    if settings.repetition_penalty is not None and settings.repetition_penalty <= 0:
        raise UsageError(f"--repetition-penalty must be above 0, not {settings.repetition_penalty}.")
    if settings.temperature == 0:
        for option, value in (("--top-k", settings.top_k), ("--top-p", settings.top_p)):
            if value is not None:
                raise UsageError(f"{option} does nothing at --temperature 0. Draw tokens, as with --temperature 0.7.")


def _check_caches(settings: GenerateSettings, source: AnchoredModel) -> None:
    checks.file_to_read("--cache-in", settings.cache_in)
    checks.file_to_write("--cache-out", settings.cache_out)
    if settings.cache_out is not None and settings.mode == "full":
        raise UsageError("--cache-out saves what a memory or a window keeps. Use it with --mode ahn or window.")
    if settings.cache_in is None:
        return
    fixed = {name: getattr(source, name) for name in ("window", "sinks", "sink_positions", "anchors", "cache_dtype")}
    for name, value in {**fixed, "mode": settings.mode}.items():
        if value is not None:
            option = name.replace("_", "-")
            raise UsageError(
                f"--{option} does not go with --cache-in, which keeps what it was made with. Leave it out."
            )


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


def _uses_template(loaded: Loaded, settings: GenerateSettings) -> bool:
    """Whether the chat template is used."""
    from ahn.models import prompts

    has = prompts.has_chat(loaded.tokenizer)
    if not has and (settings.chat or settings.system is not None):
        option = "--chat" if settings.chat else "--system"
        raise UsageError(f"{loaded.name} has no chat template. Leave {option} out.")
    return has if settings.chat is None else settings.chat


def _reader(loaded: Loaded, settings: GenerateSettings) -> Reader:
    """A reader of nothing yet, or of what a saved cache holds."""
    import ahn
    from ahn.generation import Reader

    cache = None if settings.cache_in is None else ahn.HippocampalCache.load(settings.cache_in, loaded.model)
    return Reader(loaded.model, cache, score=False)


def _say_what_reads(loaded: Loaded, reader: Reader) -> None:
    """Says in a line which memory and anchors read, where they add something."""
    settings = getattr(reader.cache, "settings", None)
    if settings is not None and settings.mode == "ahn" and (loaded.adapter is not None or settings.anchors):
        log(f"reads with {loaded.reads_with(settings.anchors)}", "dim")


def _read(loaded: Loaded, settings: GenerateSettings, reader: Reader, text: str, chat: bool) -> None:
    """Reads text and prompt, with a progress bar on a terminal and a closing line anywhere."""
    import torch

    from ahn.cli.terminal import summary
    from ahn.models import prompts

    if settings.cache_in is not None:
        passage = prompts.follow_up(loaded.tokenizer, text, settings.prompt, chat)
    else:
        passage = prompts.passage(loaded.tokenizer, text, settings.prompt, chat, settings.system or "")
    closing = passage.closing[:0] if settings.only_reads else passage.closing
    ids = torch.cat((passage.opening, passage.text, closing))
    if ids.numel() == 0:
        raise UsageError("the tokenizer makes no token of this text. Give a longer one.")
    read_all(reader, ids, settings.chunk)
    if text:
        log(summary(loaded.model, reader), "dim")


def _answer_of(loaded: Loaded, settings: GenerateSettings, reader: Reader) -> Iterator[int]:
    """Tokens of an answer."""
    from ahn.generation import decode
    from ahn.models import prompts

    return decode(
        reader,
        settings.max_new_tokens,
        prompts.stop_ids(loaded.model, loaded.tokenizer),
        settings.temperature,
        settings.seed,
        top_k=settings.top_k,
        top_p=settings.top_p,
        repetition_penalty=settings.repetition_penalty,
    )


def _converse(loaded: Loaded, settings: GenerateSettings, reader: Reader, text: str) -> None:
    """Talks in the terminal."""
    talk = Conversation(loaded, reader, lambda: _answer_of(loaded, settings, reader), settings.chunk)
    talk.run(text, settings.system or "", goes_on=settings.cache_in is not None)
