"""A report as one HTML file that needs nothing else: no script, no style sheet, no picture from elsewhere."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from ahn._home import write_figure, write_text
from ahn.evaluation.tables import ResultTable, show_cell

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .4rem; opacity: .8; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { background: var(--soft); white-space: nowrap; } .number { text-align: right; white-space: nowrap; }
figure { margin: 1rem 0; } figure svg { width: 100%; height: auto; background: #fff; border-radius: 6px; }
figcaption { opacity: .8; } p { overflow-wrap: anywhere; }
"""


class Page:
    """Paragraphs, tables and figures, one below the other; every text is shown as it is, markup included.

    Args:
        title: Title and first heading.

    Attributes:
        plots: Figures of matplotlib by name.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = []
        self._styles = [_STYLE]
        self.plots: dict[str, Any] = {}

    def text(self, *paragraphs: str) -> None:
        """Adds paragraphs."""
        self._parts += [f"<p>{escape(paragraph)}</p>" for paragraph in paragraphs]

    def heading(self, text: str) -> None:
        """Adds a heading."""
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def table(self, table: ResultTable) -> None:
        """Adds a table, which scrolls by itself where the screen is narrow."""
        marks = [' class="number"' if numeric else "" for numeric in table.numeric]
        head = "".join(f'<th scope="col"{mark}>{escape(name)}</th>' for name, mark in zip(table.columns, marks))
        body = "".join(
            f"<tr>{''.join(f'<td{mark}>{escape(cell)}</td>' for cell, mark in zip(row, marks))}</tr>\n"
            for row in table.cells
        )
        title = f"<caption>{escape(table.caption)}</caption>" if table.caption else ""
        self._parts.append(
            f'<div class="wide"><table>{title}<thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'
        )

    def facts(self, mapping: Mapping[str, Any]) -> None:
        """Adds names and values, such as settings.

        Args:
            mapping: Values by name; lists are joined by commas, mappings written as "name value".
        """
        rows = "".join(
            f'<tr><th scope="row">{escape(str(name))}</th><td>{escape(_fact(value))}</td></tr>\n'
            for name, value in mapping.items()
        )
        self._parts.append(f'<div class="wide"><table><tbody>\n{rows}</tbody></table></div>')

    def figure(self, name: str, figure: Any, caption: str) -> None:
        """Adds a figure of matplotlib as SVG inside the page.

        Args:
            name: Name of the figure's own file, without a suffix.
            figure: A `matplotlib.figure.Figure`.
            caption: What it shows; also read out by screen readers.
        """
        self.plots[name] = figure
        label = escape(caption)
        prefix = f"figure{len(self.plots)}-"
        drawing = _svg(figure, prefix).replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
        self._parts.append(f"<figure>{drawing}<figcaption>{label}</figcaption></figure>")

    def write_figures(self, folder: Path) -> list[str]:
        """Writes the figures as PNG files.

        Args:
            folder: Where to; it is there.

        Returns:
            Names of the files.
        """
        for name, figure in self.plots.items():
            write_figure(folder / f"{name}.png", figure)
        return [f"{name}.png" for name in self.plots]

    def markup(self, html: str, style: str = "") -> None:
        """Adds markup as it is, for what has a form of its own.

        Args:
            html: HTML whose texts are escaped already.
            style: Rules of CSS that it needs.
        """
        self._parts.append(html)
        if style not in self._styles:
            self._styles.append(style)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the page in UTF-8, whole or not at all.

        Raises:
            OutputError: It cannot be written.
        """
        title, style = escape(self.title), "".join(self._styles)
        head = (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{title}</title>\n<style>{style}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        )
        write_text(path, head + "\n".join(self._parts) + "\n</body>\n</html>\n")


def _svg(figure: Any, prefix: str) -> str:
    """The drawing alone, its ids made unique on the page."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "ahn"}):  # the same figure gives the same page
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    drawing = buffer.getvalue()
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing[drawing.index("<svg") :], flags=re.DOTALL)
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", drawing)


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_fact(each)}" for name, each in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_fact(each) for each in value)
    return show_cell(value)
