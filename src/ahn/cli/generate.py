"""`ahn generate`: reads a prompt, or a text of any length and a question about it, and streams the answer."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ahn.cli import checks
from ahn.cli.terminal import UsageError, megabytes, notes, say

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
class Request:
    """What the user asked for, as it came."""

    prompt: str
    text: str
    settings: dict[str, Any]
    mode: str | None
    chunk: int | None
    limit: int
    temperature: float
    seed: int | None
    chat: bool | None
    cache_in: Path | None
    cache_out: Path | None

    @property
    def only_reads(self) -> bool:
        """Whether a text is to be read and saved, with no question about it."""
        return self.cache_out is not None and not self.prompt.strip()


def command(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to answer; with --file, a question.")] = "",
    model: Annotated[str, typer.Option(help="A built-in name, a folder, or a hub id owner/name.")] = "smollm2-135m",
    file: Annotated[str | None, typer.Option(help="A text to read before the prompt; - for standard input.")] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            metavar="ahn|window|full",
            help="What to read with; ahn+64 keeps 64 anchors too.  [dim]\\[default: ahn][/dim]",
        ),
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens of the window.  [dim]\\[default: the adapter's or 1024][/dim]")
    ] = None,
    sinks: Annotated[
        int | None, typer.Option(help="First tokens to keep for ever.  [dim]\\[default: the adapter's, or 32][/dim]")
    ] = None,
    sink_positions: Annotated[
        str | None,
        typer.Option(
            metavar="bounded|absolute",
            help="How far away the sinks may seem.  [dim]\\[default: the adapter's, or bounded][/dim]",
        ),
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="Folder or hub id of a memory's weights; none for an untrained one.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to write.")] = 256,
    chunk: Annotated[int | None, typer.Option(help="Tokens to read at a time.  [dim]\\[default: 512][/dim]")] = None,
    temperature: Annotated[float, typer.Option(help="0 writes the likeliest token; above, tokens are drawn.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Of the random numbers.")] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Use the chat template.  [dim]\\[default: if the model has one][/dim]"),
    ] = None,
    cache_in: Annotated[Path | None, typer.Option(help="Go on from this saved cache.")] = None,
    cache_out: Annotated[Path | None, typer.Option(help="Save the cache here; without a prompt, only read.")] = None,
) -> None:
    """Read a prompt, or a text of any length and a question about it, and write the answer."""
    checks.span(window, sinks, sink_positions)
    checks.mode("--mode", mode)
    checks.at_least("--max-new-tokens", max_new_tokens, 1)
    checks.at_least("--chunk", chunk, 1)
    checks.at_least("--temperature", temperature, 0)
    checks.adapter(adapter)
    settings = {"window": window, "sinks": sinks, "sink_positions": sink_positions}
    _check_caches(cache_in, cache_out, {**settings, "mode": mode}, prompt)
    if file is None and not prompt.strip():
        raise UsageError('there is nothing to read. Give a prompt ("..."), or a text with --file.')
    text = "" if file is None else checks.text_file("--file", file)
    _run(
        model,
        adapter,
        Request(prompt, text, settings, mode, chunk, max_new_tokens, temperature, seed, chat, cache_in, cache_out),
    )


def _check_caches(source: Path | None, target: Path | None, settings: dict[str, Any], prompt: str) -> None:
    checks.file_to_read("--cache-in", source)
    checks.file_to_write("--cache-out", target)
    if target is not None and settings["mode"] == "full":
        raise UsageError("--cache-out saves what a memory or a window keeps. Use it with --mode ahn or window.")
    if source is None:
        return
    for name, value in settings.items():
        if value is not None:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} does not go with --cache-in, which keeps what it was made with. Leave it out.")


def _run(name: str, adapter: str | None, request: Request) -> None:
    """The part that needs the library: loads, reads, writes, saves."""
    saved = _saved_settings(request.cache_in) if request.cache_in is not None else None
    from ahn.cli import loading, writing
    from ahn.generation import decode
    from ahn.models import prompts

    loaded = loading.load(name, adapter, **request.settings, like=saved)
    chat = prompts.has_chat(loaded.tokenizer) if request.chat is None else request.chat
    if chat and not prompts.has_chat(loaded.tokenizer):
        raise UsageError(f"{name} has no chat template. Leave --chat out.")
    make = prompts.passage if saved is None else prompts.follow_up
    passage = make(loaded.tokenizer, request.text, request.prompt, chat)
    import torch

    closing = passage.closing[:0] if request.only_reads else passage.closing
    reader = _read(loaded, request, torch.cat((passage.opening, passage.text, closing)))
    if not request.only_reads:
        ids = decode(
            reader,
            request.limit,
            prompts.stop_ids(loaded.model, loaded.tokenizer),
            request.temperature,
            request.seed,
        )
        for piece in writing.words(loaded.tokenizer, ids):
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
    if request.cache_out is not None:
        cache: Any = reader.cache
        cache.save(request.cache_out)
        say(f"saved {request.cache_out}: {cache.seen_tokens:,} tokens in {megabytes(cache.nbytes)} MB", "dim")


def _saved_settings(path: Path) -> AHNConfig:
    """The memory that a saved cache asks for."""
    from ahn.cache.storage import describe_cache
    from ahn.config import AHNConfig

    held = describe_cache(path)
    settings, fingerprint = held["settings"], held["model"]
    layers = tuple(index for index, layer in enumerate(fingerprint["layers"]) if layer[6])
    return AHNConfig(
        memory=fingerprint["memory"],
        window=settings["window"],
        sinks=settings["sinks"],
        layers=layers,
        sink_positions=settings["sink_positions"],
        memory_positions=fingerprint["memory_positions"],
    )


def _read(loaded: Loaded, request: Request, ids: Any) -> Reader:
    """Reads all tokens, with a progress bar on a terminal and a closing line anywhere."""
    import ahn
    from ahn.cli.progress import reading_bar, summary
    from ahn.evaluation.arm_names import find_arm
    from ahn.generation import Reader, automatic_chunk

    if ids.numel() == 0:
        raise UsageError("the tokenizer makes no token of this text. Give a longer one.")
    arm = find_arm(request.mode or "ahn")
    with ahn.mode(loaded.model, arm.way, **arm.settings(loaded.config.window)):  # type: ignore[arg-type]
        cache = None if request.cache_in is None else ahn.HippocampalCache.load(request.cache_in, loaded.model)
        reader = Reader(loaded.model, cache, score=False)
        with reading_bar(notes(), ids.numel()) as show:
            for piece in ids.split(request.chunk or automatic_chunk(loaded.model)):
                reader.feed(piece)
                show(reader.progress)
    if request.text:
        say(summary(loaded.model, reader), "dim")
    return reader
