"""`ahn eval perplexity`: how well each arm predicts long texts, and what it holds of them meanwhile."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ahn._home import write_figure
from ahn.cli import checks
from ahn.cli.evaluation.runs import Run, RunOptions, open_run
from ahn.cli.loading import ModelSettings
from ahn.cli.options import from_fields
from ahn.cli.terminal import UsageError, log, output
from ahn.config import setting
from ahn.evaluation.arm_names import ARMS_HELP, find_arm

if TYPE_CHECKING:
    from ahn.cli.loading import Loaded
    from ahn.evaluation.perplexity.cache_sizes import CacheSizes
    from ahn.evaluation.perplexity.documents import Ids, TokenDocument

Precision = Literal["float32", "bfloat16"]
EXAMPLES = """Examples:

ahn eval perplexity book.txt --out book  [dim]# a whole book: one plot, constant memory[/dim]

ahn eval perplexity texts --arms full,window,ahn --length 4096 --pieces 8

ahn eval perplexity texts --length 2048 --pieces 24 --arms full,window,ahn,ahn+64 --equal-bytes --plot gap.png

ahn eval perplexity texts --length 2048 --pieces 24 --arms full,window,ahn --other-text
"""


@dataclasses.dataclass(frozen=True)
class PerplexitySettings:
    """What is read, and how its tokens are grouped."""

    files: tuple[str, ...] = setting(
        help="Texts, or folders of them; - is standard input.", argument=True, metavar="FILE"
    )
    length: int | None = setting(None, "Tokens of each document at most.", least=2, unset="all")
    pieces: int | None = setting(
        None, "Cut all texts into pieces of --length, and read this number at even distances.", least=1
    )
    ngram: int = setting(3, "Tokens of the n-grams whose repetition is looked at.", least=2)
    rare: int = setting(8, "Occurrences in all texts up to which one is rare.", least=2)
    arms: tuple[str, ...] = setting(("window", "ahn"), ARMS_HELP, joined=True)
    equal_bytes: bool = setting(
        False, "For each arm with memory or anchors also read with a window of as many bytes.", names="--equal-bytes"
    )
    other_text: bool = setting(
        False,
        "Also read each arm with a memory whose state is that of another text, to see what the own state is worth.",
        names="--other-text",
    )
    precision: Precision = setting("float32", "What products are rounded to.", choices=get_args(Precision))
    plot: tuple[Path, ...] = setting(
        (), "Draw the share of the gap against bytes to a .png or .svg file; may be given several times."
    )


@from_fields
def command(settings: PerplexitySettings, source: ModelSettings, options: RunOptions) -> None:
    """Read texts of any length and compare how well each way to read (arm) predicts every token."""
    if settings.pieces is not None and settings.length is None:
        raise UsageError("--pieces needs --length, the tokens of a piece. Name both.")
    plots = checks.plots_to_write(settings.plot)
    if plots and not {"full", "window"} <= set(settings.arms):
        raise UsageError("--plot needs full and window among --arms, whose gap it shows. Add them.")
    texts = _texts(settings.files)
    checksums = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    names = ("length", "pieces", "ngram", "rare", "equal_bytes", "other_text", "precision")
    own = {name: getattr(settings, name) for name in names}
    run = open_run("perplexity", source, options, settings.arms, files=checksums, **own)
    if settings.other_text and not any(find_arm(arm).method == "ahn" for arm in settings.arms):
        raise UsageError("--other-text needs an arm with a memory among --arms, ahn or ahn+64. Add one.")
    _evaluate(run, run.load(), texts, plots)


def _evaluate(run: Run, loaded: Loaded, texts: dict[str, str], plots: list[Path]) -> None:
    """The work: reads everything that the journal lacks, and reports."""
    from ahn.cli.evaluation import perplexity_tables
    from ahn.evaluation.perplexity.averages import Averages
    from ahn.evaluation.perplexity.ngrams import group_tokens
    from ahn.evaluation.perplexity.reading import make_plan, read_all

    settings = run.settings
    tokens, every = _documents(settings, loaded, texts)
    documents = [each for each in every if len(each.ids) > settings["sinks"] + settings["window"] + 1]
    if not documents:
        raise UsageError(
            f"no document is longer than sinks + window = {settings['sinks'] + settings['window']:,} tokens, up to "
            "which all arms read alike. Use a smaller --window or longer texts."
        )
    sizes, equal_windows = _sizes(run, loaded, documents, bool(plots))
    arms = list(dict.fromkeys((*run.arms, *equal_windows.values())))
    plan = make_plan(loaded.model, arms, documents, settings["precision"], settings["other_text"])
    opening = perplexity_tables.opening(loaded, documents, plan, len(every) - len(documents))
    for line in opening:
        log(line, console=output())
    ids = [each.ids for each in documents]
    groups = group_tokens(tokens, ids, *(settings[name] for name in ("ngram", "rare", "sinks", "window")))
    read = (*plan.arms, *plan.controlled)
    with run.reading(sum(plan.limit(arm, len(each)) for each in ids for arm in read)) as progress:
        read_all(loaded.model, documents, groups, plan, run.journal, progress)
    averages = Averages(documents, plan, run.journal.done, settings["seed"])
    results = averages.report(loaded.model, sizes, equal_windows)
    for table in perplexity_tables.tables(settings, results):
        table.print(output())
    for line in perplexity_tables.remarks(results):
        log(line, console=output())
    for file in plots:
        write_figure(file, perplexity_tables.gap_figure(settings, results))
        log(f"wrote {file}", console=output())
    if run.out is not None:
        run.finish(results, perplexity_tables.make_page(settings, results, opening), loaded.model)


def _sizes(
    run: Run, loaded: Loaded, documents: Sequence[TokenDocument], counted: bool
) -> tuple[CacheSizes | None, dict[str, str]]:
    """What counts the bytes of caches, where that is wanted, and the windows of as many bytes by the names of arms."""
    if not (counted or run.settings["equal_bytes"]):
        return None, {}
    from ahn.evaluation.perplexity.cache_sizes import CacheSizes

    sizes = CacheSizes(loaded.model, max(len(each.ids) for each in documents))
    equal = {arm: sizes.equal_window(arm) for arm in run.arms} if run.settings["equal_bytes"] else {}
    return sizes, {arm: other for arm, other in equal.items() if other is not None}


def _texts(paths: Sequence[str]) -> dict[str, str]:
    """All texts by the names of their files; those of a folder in the order of their names."""
    from ahn.models.text import TEXT_FILES

    texts: dict[str, str] = {}
    for path in paths:
        folder = Path(path).expanduser()
        names = [path]
        if folder.is_dir():
            names = [str(file) for file in sorted(folder.rglob("*")) if file.suffix in TEXT_FILES and file.is_file()]
            if not names:
                raise UsageError(f"{path} holds no text ({', '.join(TEXT_FILES)}). Name a file or another folder.")
        for name in names:
            if name in texts:
                raise UsageError(f"{name} is named twice. Name it once.")
            texts[name] = checks.text_file("FILE", name)
    return texts


def _documents(
    settings: dict[str, Any], loaded: Loaded, texts: dict[str, str]
) -> tuple[list[Ids], list[TokenDocument]]:
    """All texts as tokens, and what is to be read of them."""
    import numpy as np

    from ahn.evaluation.perplexity import documents
    from ahn.models.text import opening_of, text_tokens

    tokens = {name: np.array(text_tokens(text, loaded.tokenizer), dtype=np.int64) for name, text in texts.items()}
    opening = opening_of(loaded.tokenizer)
    if settings["pieces"] is None:
        read = documents.whole(tokens, opening, settings["length"])
    else:
        read = documents.excerpts(tokens, opening, settings["length"], settings["pieces"])
    return list(tokens.values()), read
