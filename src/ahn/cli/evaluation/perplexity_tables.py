"""What `ahn eval perplexity` shows: lines and tables on the terminal, and the same with the curves on a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ahn.cli.terminal import megabytes
from ahn.evaluation.arm_names import find_arm
from ahn.evaluation.perplexity.averages import SPANS
from ahn.evaluation.tables import ResultTable, with_interval

if TYPE_CHECKING:
    from ahn.cli.loading import Loaded
    from ahn.evaluation.page import Page
    from ahn.evaluation.perplexity.documents import TokenDocument
    from ahn.evaluation.perplexity.reading import PerplexityPlan

_GROUPS = {
    "evicted": "repeats what left the window",
    "window": "repeats what is in the window",
    "never": "stands there for the first time",
    "often": "not rare",
}


def opening(loaded: Loaded, documents: Sequence[TokenDocument], plan: PerplexityPlan, left_out: int) -> list[str]:
    """What will be read, by what, and how many documents are left out as too short, as lines of text."""
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


def make_page(settings: dict[str, Any], results: dict[str, Any], lines: Sequence[str]) -> Page:
    """The page of a run.

    Args:
        settings: Those of the run.
        results: As `Averages.report` gives them.
        lines: What to say first.
    """
    from ahn.evaluation.page import Page
    from ahn.evaluation.perplexity.curves import plot

    page = Page(f"Streaming perplexity: {settings['model']}")
    page.text(*lines)
    first, *others = tables(settings, results)
    page.table(first)
    sinks, window = settings["sinks"], settings["window"]
    page.figure(
        "perplexity",
        plot(results, f"{settings['model']}: sinks {sinks:,}, window {window:,}", sinks + window),
        f"Mean score of the tokens in bins of {results['positions']['bin_tokens']:,}, over all documents; cache and "
        f"memory of the process while {results['points']['document']} is read. Dotted: sinks + window.",
    )
    for table in others:
        page.table(table)
    if _has_gap(results):
        caption = "Share of the gap from window to full attention that each arm closes, against the bytes of its cache."
        page.figure("gap", gap_figure(settings, results), f"{caption} With 95 % intervals over documents.")
    page.text(*remarks(results))
    page.heading("Documents")
    arms = list(results["arms"])
    rows = [[row["name"], row["tokens"], *_scores(row["nll"]["beyond"], arms)] for row in results["documents"]]
    page.table(ResultTable(["document", "tokens", *arms], rows, "Nats per token beyond sinks + window"))
    return page


def tables(settings: dict[str, Any], results: dict[str, Any]) -> list[ResultTable]:
    """The arms, and the groups of tokens in each span that any arm has read.

    Args:
        settings: Those of the run.
        results: As `Averages.report` gives them.
    """
    arms = list(results["arms"])
    spans = [span for span in SPANS if any(row["scored"][span] for row in results["arms"].values())]
    arm_rows = [_arm_cells(arm, row) for arm, row in results["arms"].items()]
    columns = [name for name in arm_rows[0] if any(row[name] is not None for row in arm_rows)]
    scored = max(row["scored"]["beyond"] for row in results["arms"].values())
    rows = [["-" if row[name] is None else row[name] for name in columns] for row in arm_rows]
    shown = [ResultTable(columns, rows, f"{scored:,} tokens beyond sinks + window, nats per token")]
    if results["equal_bytes"]:
        shown.append(_equal_bytes_table(settings, results))
    if results["other_text"]:
        shown.append(_other_text_table(results))
    for span in spans:
        where = " after the part that full reads" if span == "after" else ""
        caption = (
            f"The same tokens{where} by the {settings['ngram']}-gram that they close, rare if it stands in all texts "
            f"at most {settings['rare']} times"
        )
        rows = [
            [f"{group}: {_GROUPS[group]}", row["tokens"], *_scores(row["nll"], arms)]
            for group, row in results["groups"][span].items()
        ]
        shown.append(ResultTable(["group", "tokens", *arms], rows, caption, arms))
    return shown


def gap_figure(settings: dict[str, Any], results: dict[str, Any]) -> Any:
    """The share of the gap against bytes, see `ahn.evaluation.perplexity.gap.draw_gap`.

    Args:
        settings: Those of the run.
        results: As `Averages.report` gives them, bytes counted.
    """
    from ahn.evaluation.perplexity.gap import draw_gap

    sizes = sorted({row["tokens"] for row in results["documents"]})
    tokens = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
    title = f"{settings['model']}: {tokens} tokens, window {settings['window']:,}, {settings['sinks']:,} sinks"
    return draw_gap(results, title)


def _has_gap(results: dict[str, Any]) -> bool:
    return {"full", "window"} <= set(results["arms"]) and "counted_bytes" in results["arms"]["window"]


def _equal_bytes_table(settings: dict[str, Any], results: dict[str, Any]) -> ResultTable:
    """What each arm keeps beside sinks and window, and what a window of as many bytes achieves."""
    arms, rows = results["arms"], []
    for arm, equal in results["equal_bytes"].items():
        beside = arms[arm]["counted_bytes"] - arms["window"]["counted_bytes"] if "window" in arms else None
        closed, by_window = (arms[name]["closed"] for name in (arm, equal["arm"]))
        rows.append(
            [
                arm,
                None if beside is None else f"{beside / 1e6:.2f}",
                f"{settings['window'] + find_arm(equal['arm']).larger:,}",
                None if closed is None else _share(**closed),
                None if by_window is None else _share(by_window["share"]),
                with_interval(equal["nats_better"], equal["low"], equal["high"], digits=3, ends=3),
            ]
        )
    columns = ["arm", "MB\nmore", "equal\nwindow", "gap closed\n(95 %)", "by equal\nwindow", "nats better\n(95 %)"]
    return ResultTable(columns, rows, "Each arm beside a window enlarged to the same bytes, states and anchors counted")


def _other_text_table(results: dict[str, Any]) -> ResultTable:
    """What each arm achieves with the memory of another text, and what its own memory adds to that."""
    rows = [
        [
            arm,
            _number(other["nll"]["beyond"], 4),
            with_interval(other["nats_better"], other["low"], other["high"], digits=4, ends=4),
            *(None if share is None else _share(**share) for share in (other["closed"], other["own"])),
        ]
        for arm, other in results["other_text"].items()
    ]
    columns = ["nats", "own better by\n(95 %)", "gap closed\n(95 %)", "more by own\n(95 %)"]
    caption = "Each arm with the memory of another text, and how much better its own memory is"
    return ResultTable(["arm", *columns], rows, caption, columns)


def remarks(results: dict[str, Any]) -> list[str]:
    """What the tables cannot say by themselves.

    Args:
        results: As `Averages.report` gives them.
    """
    count = len(results["documents"])
    if not {"full", "window"} <= set(results["arms"]):
        return ["With full and window among --arms the table says how much of the gap between them is closed."]
    if count < 2:
        return ["No interval from one document: --length and --pieces cut a text into several."]
    return [f"The interval is a bootstrap over the {count:,} documents."]


def _arm_cells(arm: str, row: dict[str, Any]) -> dict[str, str | None]:
    """The cells of an arm by their titles; `None` where no arm of the run may have one."""
    return {
        "arm": arm,
        "nats": _number(row["nll"]["beyond"], 4),
        "perplexity": _number(row["perplexity"]["beyond"], 2),
        "gap closed\n(95 %)": None if row["closed"] is None else _share(**row["closed"]),
        "nats\nafter full": _number(row["nll"]["after"], 4) if row["scored"]["after"] else None,
        "cache\nMB": megabytes(row["cache_bytes"]),
        "tokens\nper s": f"{row['tokens_per_second']:,.0f}",
    }


def _scores(nll: dict[str, float], arms: Sequence[str]) -> list[str]:
    return [_number(nll[arm], 4) for arm in arms]


def _number(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}" if math.isfinite(value) else "-"


def _share(share: float, low: float = math.nan, high: float = math.nan) -> str:
    """A share and its interval: "25 % (20 to 31)"."""
    if not math.isfinite(share):
        return "-"
    return f"{100 * share:.0f} %" + (f" ({100 * low:.0f} to {100 * high:.0f})" if math.isfinite(low) else "")
