"""What `ahn eval perplexity` shows: lines and tables on the terminal, and the same with the plot on a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ahn.cli.evaluation.by_arms import add_arms, print_by_arms
from ahn.cli.terminal import megabytes, output, say

if TYPE_CHECKING:
    from rich.table import Table

    from ahn.cli.loading import Loaded
    from ahn.evaluation.page import Page
    from ahn.evaluation.perplexity.documents import Document
    from ahn.evaluation.perplexity.measure import Plan
    from ahn.evaluation.report import EvaluationReport

Made = tuple[list[str], list[list[str]], str]
"""Columns, rows and caption of a table."""
_BESIDE = 2  # columns beside those of the arms, in tables that have some for them
_NARROWEST = 16  # characters of the first column of these, which may be wrapped
_GROUPS = {
    "evicted": "repeats what left the window",
    "window": "repeats what is in the window",
    "never": "stands there for the first time",
    "often": "not rare",
}


def opening(loaded: Loaded, documents: Sequence[Document], plan: Plan, left_out: int) -> list[str]:
    """What will be read, by what, as lines of text.

    Args:
        loaded: The model.
        documents: What will be read.
        plan: How.
        left_out: Documents that are too short.
    """
    sizes = [len(each.ids) for each in documents]
    config = loaded.config
    what = f"{len(sizes):,} documents of {min(sizes):,} to {max(sizes):,} tokens" if len(sizes) > 1 else ""
    lines = [
        f"{loaded.name} reads {what or f'{documents[0].name}: {sizes[0]:,} tokens'}. Sinks {config.sinks:,} "
        f"({config.sink_positions}), window {config.window:,}."
    ]
    if "ahn" in plan.arms:
        untrained = "untrained (no adapter): ahn says exactly what window says"
        weights = f"weights from {loaded.adapter}" if loaded.adapter else untrained
        lines.append(f"Memory: {config.memory}, {weights}.")
    if left_out:
        lines.append(
            f"{left_out:,} of {left_out + len(sizes):,} documents left out: not longer than sinks + window = "
            f"{plan.exact:,} tokens, up to which all arms read alike."
        )
    if "full" in plan.arms and max(sizes) > plan.full_limit:
        lines.append(
            f"full reads the first {plan.full_limit:,} tokens of a document: the model was trained on no more."
        )
    return lines


def print_results(report: EvaluationReport) -> None:
    """Prints all tables, and what must be known to read them."""
    arms = list(report.results["arms"])
    for table in tables(report):
        say(f"\n{table[2]}", console=output())
        if table[0][_BESIDE:] == arms:
            print_by_arms(output(), arms, partial(_shown, table))
        else:
            output().print(_shown(table))
    for line in remarks(report):
        say(line, console=output())


def _shown(table: Made, arms: Sequence[str] = ()) -> Table:
    """A table for the terminal; of one with columns for arms, those of some arms."""
    from rich import box
    from rich.table import Table

    columns, rows, _ = table
    labels = columns[:_BESIDE] if arms else columns
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="bold")
    for number, name in enumerate(labels):
        shown.add_column(
            name,
            justify="right" if number else "left",
            no_wrap=bool(number),
            min_width=_NARROWEST if arms and not number else None,
            overflow="fold",
        )
    add_arms(shown, arms)
    for row in rows:
        shown.add_row(*row[: len(labels)], *(row[columns.index(arm)] for arm in arms))
    return shown


def page(report: EvaluationReport, lines: Sequence[str]) -> tuple[Page, Any]:
    """The page of a report, and its figure.

    Args:
        report: The report.
        lines: What to say first.
    """
    from ahn.evaluation.page import Page
    from ahn.evaluation.perplexity.plot import plot

    of, results = report.settings, report.results
    made = Page(f"Streaming perplexity: {of['model']}")
    for line in lines:
        made.text(line)
    found = tables(report)
    made.table(*found[0])
    figure = plot(results, f"{of['model']}: sinks {of['sinks']:,}, window {of['window']:,}", of["sinks"] + of["window"])
    made.figure(
        figure,
        f"Mean score of the tokens in bins of {results['positions']['bin_tokens']:,}, over all documents; cache and "
        f"memory of the process while {results['points']['document']} is read. Dotted: sinks + window.",
    )
    for each in found[1:]:
        made.table(*each)
    for line in remarks(report):
        made.text(line)
    made.heading("Documents")
    made.table(*_documents(results))
    made.heading("Settings")
    made.facts({name: value for name, value in of.items() if name != "files"})
    made.heading("Measured with")
    made.facts(report.environment)
    return made, figure


def tables(report: EvaluationReport) -> list[Made]:
    """Columns, rows and caption of each table."""
    results, of = report.results, report.settings
    spans = [span for span in ("beyond", "after") if any(row["scored"][span] for row in results["arms"].values())]
    closed = any(row["closed"] for row in results["arms"].values())
    columns = ["arm", "nats", "perplexity", *(["gap closed\n(95 %)"] if closed else [])]
    columns += [*(["nats\nafter full"] if "after" in spans else []), "cache\nMB", "tokens\nper s"]
    rows = []
    for arm, row in results["arms"].items():
        cells = [arm, _number(row["nll"]["beyond"], 4), _number(row["perplexity"]["beyond"], 2)]
        cells += [_share(row["closed"])] if closed else []
        cells += [_number(row["nll"]["after"], 4)] if "after" in spans else []
        rows.append([*cells, megabytes(row["cache_bytes"]), f"{row['tokens_per_second']:,.0f}"])
    scored = max(row["scored"]["beyond"] for row in results["arms"].values())
    caption = f"{scored:,} tokens beyond sinks + window, nats per token"
    found = [(columns, rows, caption)]
    for span in spans:
        where = " after the part that full reads" if span == "after" else ""
        found.append(_group_table(results["groups"][span], list(results["arms"]), of, where))
    return found


def remarks(report: EvaluationReport) -> list[str]:
    """What the tables cannot say by themselves."""
    arms, count = report.results["arms"], len(report.results["documents"])
    if not {"full", "window"} <= set(arms):
        return ["With full and window among --arms the table says how much of the gap between them is closed."]
    if count < 2:
        return ["No interval from one document: --length and --pieces cut a text into several."]
    return [f"The interval is a bootstrap over the {count:,} documents."]


def _group_table(groups: dict[str, Any], arms: list[str], of: dict[str, Any], where: str) -> Made:
    rows = [
        [f"{group}: {_GROUPS[group]}", f"{each['tokens']:,}", *(_number(each["nll"][arm], 4) for arm in arms)]
        for group, each in groups.items()
    ]
    caption = (
        f"The same tokens{where} by the {of['ngram']}-gram that they close, rare if it stands in all texts at most "
        f"{of['rare']} times"
    )
    return ["group", "tokens", *arms], rows, caption


def _documents(results: dict[str, Any]) -> tuple[list[str], list[list[Any]], str]:
    arms = list(results["arms"])
    rows = [
        [each["name"], each["tokens"], *(_number(each["nll"]["beyond"][arm], 4) for arm in arms)]
        for each in results["documents"]
    ]
    return ["document", "tokens", *arms], rows, "Nats per token beyond sinks + window"


def _number(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}" if math.isfinite(value) else "-"


def _share(closed: dict[str, float] | None) -> str:
    """A share and its interval: "25 % (20 to 31)"."""
    if closed is None or not math.isfinite(closed["share"]):
        return "-"
    if not math.isfinite(closed["low"]):
        return f"{closed['share']:.0%}".replace("%", " %")
    return f"{100 * closed['share']:.0f} % ({100 * closed['low']:.0f} to {100 * closed['high']:.0f})"
