"""`ahn eval perplexity`: how well each arm predicts long texts, and what it holds of them meanwhile."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ahn.cli import checks
from ahn.cli.evaluation import options
from ahn.cli.terminal import UsageError, notes, output, say

if TYPE_CHECKING:
    from ahn.cli.loading import Loaded
    from ahn.evaluation.perplexity.documents import Document, Ids
    from ahn.evaluation.perplexity.measure import Plan

EXAMPLES = """Examples:

ahn eval perplexity book.txt --out book  [dim]# a whole book: one plot, constant memory[/dim]

ahn eval perplexity texts --arms full,window,ahn --length 4096 --pieces 8
"""


def command(
    files: Annotated[list[str], typer.Argument(metavar="FILE", help="Texts, or folders of them; - is standard input.")],
    length: Annotated[
        int | None, typer.Option(help="Tokens of each document at most.  [dim]\\[default: all][/dim]")
    ] = None,
    pieces: Annotated[
        int | None, typer.Option(help="Cut all texts into pieces of --length and read so many, at even distances.")
    ] = None,
    arms: options.Arms = "window,ahn",
    window: options.Window = options.WINDOW,
    sinks: options.Sinks = options.SINKS,
    sink_positions: options.SinkPositions = options.SINK_POSITIONS,
    adapter: options.Adapter = None,
    model: options.Model = options.MODEL,
    ngram: Annotated[int, typer.Option(help="Tokens of the n-grams whose repetition is looked at.")] = 3,
    rare: Annotated[int, typer.Option(help="Occurrences in all texts up to which one is rare.")] = 8,
    out: options.Out = None,
    seed: options.Seed = 0,
) -> None:
    """Read texts of any length and compare how well each arm predicts them, token by token."""
    checks.at_least("--length", length, 2)
    checks.at_least("--pieces", pieces, 1)
    checks.at_least("--ngram", ngram, 2)
    checks.at_least("--rare", rare, 2)
    if pieces is not None and length is None:
        raise UsageError("--pieces needs --length, the tokens of a piece. Name both.")
    texts = _texts(files)
    run = options.open_run(
        "perplexity",
        model=model,
        adapter=adapter,
        window=window,
        sinks=sinks,
        sink_positions=sink_positions,
        arms=arms,
        out=out,
        seed=seed,
        files={name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()},
        length=length,
        pieces=pieces,
        ngram=ngram,
        rare=rare,
    )
    loaded = run.load()
    _evaluate(run, loaded, texts)


def _evaluate(run: options.Run, loaded: Loaded, texts: dict[str, str]) -> None:
    """The work: reads everything that the journal lacks, and reports."""
    from ahn.cli.evaluation import perplexity_show as show
    from ahn.cli.terminal import work_bar
    from ahn.evaluation.perplexity.measure import make_plan, read_all
    from ahn.evaluation.perplexity.ngrams import group_tokens
    from ahn.evaluation.perplexity.results import results
    from ahn.evaluation.report import EvaluationReport, environment

    of = run.settings
    tokens, found = _documents(of, loaded, texts)
    documents = [each for each in found if len(each.ids) > of["sinks"] + of["window"] + 1]
    if not documents:
        raise UsageError(
            f"no document is longer than sinks + window = {of['sinks'] + of['window']:,} tokens, up to which all arms "
            "read alike. Use a smaller --window or longer texts."
        )
    plan = make_plan(loaded.model, run.arms, documents)
    opening = show.opening(loaded, documents, plan, len(found) - len(documents))
    for line in opening:
        say(line, console=output())
    ids = [each.ids for each in documents]
    groups = group_tokens(tokens, ids, of["ngram"], of["rare"], of["sinks"], of["window"])
    with run.working(), work_bar(notes(), _total(documents, plan), "tokens", "read") as progress:
        read_all(loaded.model, documents, groups, plan, run.journal, progress)
    facts = results(loaded.model, documents, plan, run.journal.done, of["seed"])
    report = EvaluationReport("perplexity", of, facts, environment(loaded.model, of["seed"]))
    show.print_results(report)
    if run.out is not None:
        page, figure = show.page(report, opening)
        run.finish(report, page, {"perplexity": figure})


def _texts(places: Sequence[str]) -> dict[str, str]:
    """All texts by the names of their files; those of a folder in the order of their names."""
    from ahn.models.text import TEXT_FILES

    texts: dict[str, str] = {}
    for place in places:
        folder = Path(place).expanduser()
        names = [place]
        if folder.is_dir():
            names = [str(file) for file in sorted(folder.rglob("*")) if file.suffix in TEXT_FILES and file.is_file()]
            if not names:
                raise UsageError(f"{place} holds no text ({', '.join(TEXT_FILES)}). Name a file or another folder.")
        for name in names:
            if name in texts:
                raise UsageError(f"{name} is named twice. Name it once.")
            texts[name] = checks.text_file("FILE", name)
    return texts


def _documents(of: dict[str, Any], loaded: Loaded, texts: dict[str, str]) -> tuple[list[Ids], list[Document]]:
    """All texts as tokens, and what is to be read of them."""
    import numpy as np

    from ahn.evaluation.perplexity import documents
    from ahn.models.text import opening_of, text_tokens

    tokens = {name: np.array(text_tokens(text, loaded.tokenizer), dtype=np.int64) for name, text in texts.items()}
    opening = opening_of(loaded.tokenizer)
    if of["pieces"] is None:
        read = documents.whole(tokens, opening, of["length"])
    else:
        read = documents.pieces(tokens, opening, of["length"], of["pieces"])
    return list(tokens.values()), read


def _total(documents: Sequence[Document], plan: Plan) -> int:
    return sum(plan.limit(arm, len(each.ids)) for each in documents for arm in plan.arms)
