"""How this library is laid out, in numbers: rooms, floors, circles, sizes, words and the prose of README and docs.

python benchmarks/house.py                       # the checkout at hand
python benchmarks/house.py --against a542a72     # and a revision, side by side, as a table in Markdown
python benchmarks/house.py --json house.json     # also written to a file
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.house_words import NAMES, PARTS  # noqa: E402
from benchmarks.revision import checked_out, git  # noqa: E402
from tests.rooms import arrows_up, circles, floors, module_graph, read_files, read_storeys, room_graph  # noqa: E402

Figures = dict[str, str]
LONG_FUNCTION, LONG_FILE, LONGEST_FILE = 40, 200, 400
_ITEM = re.compile(r"^\s*(?:[-*+]|\d+\.)\s")
_NO_PROSE = re.compile(r"\s*(?:[|#<!]|\[!|\[[^\]]+\]:)")
_NAME_PARTS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


def measure(root: Path) -> Figures:
    """Every figure of a checkout, as text by name.

    Args:
        root: Folder of the checkout.
    """
    files = read_files(root / "src" / "ahn")
    trees = {name: ast.parse(text) for name, text in files.items()}
    return {
        **room_figures(files, rule_of(root)),
        **line_figures(files, (root / "benchmarks" / "recall.py").read_text(encoding="utf-8")),
        **function_figures(files),
        **name_figures(trees),
        **prose_figures(root),
    }


def rule_of(root: Path) -> dict[str, set[str]]:
    """The rooms that each room may import from, by the rule that this checkout holds: storeys, or one order of all."""
    for file in (root / "tests" / "rooms.py", root / "tests" / "test_rooms.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body if file.is_file() else ():
            name = node.targets[0] if isinstance(node, ast.Assign) else None
            if isinstance(name, ast.Name) and isinstance(node, ast.Assign) and name.id in ("STOREYS", "ROOMS"):
                rule = ast.literal_eval(node.value)
                below = {room: set(rule[: place + 1]) for place, room in enumerate(rule)}
                return read_storeys(rule) if isinstance(rule, str) else below
    raise SystemExit(f"{root} has no rule about its rooms")


def room_figures(files: Mapping[str, str], allowed: Mapping[str, set[str]]) -> Figures:
    """Rooms, floors, arrows and circles of the import graph; lazy imports and those for the type checker count."""
    rooms, modules = room_graph(files), module_graph(files)
    up = arrows_up(rooms, allowed)
    return {
        "rooms": str(len(rooms)),
        "floors": str(floors(rooms)),
        "arrows between rooms": str(sum(map(len, rooms.values()))),
        "arrows up": _counted(up),
        "circles of rooms": _counted([" + ".join(sorted(circle)) for circle in circles(rooms)]),
        "circles of files": _counted([" + ".join(sorted(circle)) for circle in circles(modules)]),
    }


def line_figures(files: Mapping[str, str], recall_script: str) -> Figures:
    """Lines of Python, of all and of evaluation, and long files.

    Args:
        files: Text of each module of the library.
        recall_script: Text of `benchmarks/recall.py`, which is a part of what recall takes.
    """
    lines = {name: len(text.splitlines()) for name, text in files.items()}
    recall = _lines_of(lines, r"(cli\.)?evaluation\.recall.*")
    over = sorted((name for name in lines if lines[name] > LONGEST_FILE), key=lines.__getitem__)
    return {
        "files": str(len(files)),
        "lines of Python in src": f"{sum(lines.values()):,}",
        "of these, evaluation and its commands": f"{_lines_of(lines, r'(cli.)?evaluation([.].*)?'):,}",
        "of these, eval recall and its command": f"{recall:,}",
        "eval recall, its command and benchmarks/recall.py": f"{recall + len(recall_script.splitlines()):,}",
        f"files over {LONG_FILE} lines": str(sum(count > LONG_FILE for count in lines.values())),
        f"files over {LONGEST_FILE} lines": _counted(over),
    }


def function_figures(files: Mapping[str, str]) -> Figures:
    """Lines of code of functions."""
    sizes = {f"{module}.{name}": size for module, text in files.items() for name, size in function_sizes(text)}
    over = sorted((name for name in sizes if sizes[name] > LONG_FUNCTION), key=lambda name: -sizes[name])
    return {
        "functions": str(len(sizes)),
        "lines of a function: median, p90, max": _spread(list(sizes.values())),
        f"functions over {LONG_FUNCTION} lines": _counted(over),
    }


def function_sizes(text: str) -> Iterator[tuple[str, int]]:
    """Qualified name and lines of code of each function; the signature counts, docstrings and blank lines do not."""
    lines = text.splitlines()
    for path, node in _definitions(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            continue
        first = node.body[0]
        documented = ast.get_docstring(node) is not None
        docstring = range(first.lineno, (first.end_lineno or 0) + 1) if documented else range(0)
        own = (number for number in range(node.lineno, (node.end_lineno or 0) + 1) if number not in docstring)
        # The line keeps two functions of one name apart, such as a property and its setter.
        yield f"{path}:{node.lineno}", sum(bool(lines[number - 1].strip()) for number in own)


def name_figures(trees: Mapping[str, ast.Module]) -> Figures:
    """Docstrings of public names, class names with two meanings and words that are this library's own."""
    classes = Counter(node.name for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    documented = [has for name, tree in trees.items() for has in public_docstrings(name, tree)]
    words = Counter(word for name, tree in trees.items() for word in private_words(name, tree))
    return {
        "public names with a docstring": f"{100 * sum(documented) / len(documented):.1f} % of {len(documented)}",
        "class names used twice": _counted(sorted(name for name, count in classes.items() if count > 1)),
        "private words": _counted([f"{word} {count}" for word, count in words.most_common()]),
    }


def public_docstrings(module: str, tree: ast.Module) -> Iterator[bool]:
    """For a module and each class, function and method in it that is public, whether it has a docstring."""
    if any(part.startswith("_") and part not in ("__init__", "__main__", "_home") for part in module.split(".")):
        return
    yield ast.get_docstring(tree) is not None
    for path, node in _definitions(tree):
        if not any(part.startswith("_") for part in path.split(".")):
            yield ast.get_docstring(node) is not None


def _definitions(
    scope: ast.AST, path: str = "", in_function: bool = False
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]]:
    """Classes and functions of a module with their dotted names; what is in a function has a `_` before its name."""
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{path}.{'_' if in_function else ''}{node.name}".lstrip(".")
            yield name, node
            yield from _definitions(node, name, not isinstance(node, ast.ClassDef))
        else:
            yield from _definitions(node, path, in_function)


def private_words(module: str, tree: ast.Module) -> Iterator[str]:
    """The private words that a module defines or has as its own name, once for each time."""
    parts, names = (
        {word for modules, words in table.items() if re.fullmatch(modules, module) for word in words.split()}
        for table in (PARTS, NAMES)
    )
    for name in (module.split(".")[-1], *identifiers(tree)):
        yield from sorted(parts & {part.lower() for part in _NAME_PARTS.findall(name)} | names & {name.strip("_")})


def identifiers(tree: ast.AST) -> Iterator[str]:
    """Every name that a module defines: functions, classes, parameters, variables, attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


def prose_figures(root: Path) -> Figures:
    """Sentences of the README, its length, and the longest line of prose in README and docs."""
    readme = (root / "README.md").read_text(encoding="utf-8")
    sizes = [len(sentence.split()) for sentence in sentences(readme)]
    pages = {str(page.relative_to(root)): page for page in (root / "README.md", *sorted((root / "docs").glob("*.md")))}
    longest = {
        name: max(map(len, prose_lines(page.read_text(encoding="utf-8"))), default=0) for name, page in pages.items()
    }
    widest = max(longest, key=longest.__getitem__)
    return {
        "lines of the README": str(len(readme.splitlines())),
        "words of its sentences: median, p90, max": _spread(sizes),
        "longest line of prose, README": f"{longest['README.md']} characters",
        "longest line of prose, README and docs": f"{longest[widest]} characters ({widest})",
    }


def prose_lines(markdown: str) -> Iterator[str]:
    """Lines of a page that are neither code nor of a table, a heading, HTML, an image or a target of links."""
    is_code = False
    for line in markdown.splitlines():
        if line.lstrip().startswith("```"):
            is_code = not is_code
        elif not is_code and not _NO_PROSE.match(line):
            yield line


def sentences(markdown: str) -> Iterator[str]:
    """Sentences of the prose of a page, without the targets of links; an item of a list is one or more of its own."""
    paragraphs = [""]
    for line in prose_lines(markdown):
        if not line.strip() or _ITEM.match(line):
            paragraphs.append("")
        paragraphs[-1] += f" {_ITEM.sub('', line, count=1)}"
    for paragraph in paragraphs:
        bare = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", paragraph)
        yield from (sentence for sentence in re.split(r"(?<=[.!?])\s+", bare) if sentence.strip())


def _spread(values: list[int]) -> str:
    ordered = sorted(values)
    return f"{median(ordered):g}, {ordered[round(0.9 * (len(ordered) - 1))]}, {ordered[-1]}"


def _counted(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names)})" if names else "0"


def _lines_of(lines: Mapping[str, int], modules: str) -> int:
    return sum(count for name, count in lines.items() if re.fullmatch(modules, name))


def as_table(columns: Mapping[str, Figures]) -> str:
    """Figures of several checkouts side by side, in Markdown."""
    names = dict.fromkeys(name for figures in columns.values() for name in figures)
    rows = [["", *columns], ["---"] * (len(columns) + 1)]
    rows += [[name, *(figures.get(name, "") for figures in columns.values())] for name in names]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Reads the command line, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="REV", help="a revision of this repository to measure, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures")
    options = parser.parse_args()
    columns: dict[str, Figures] = {}
    if options.against:
        with checked_out(options.against) as place:
            columns[git("rev-parse", "--short", options.against)] = measure(place)
    columns[git("rev-parse", "--short", "HEAD")] = measure(ROOT)
    sys.stdout.write(as_table(columns) + "\n")
    if options.json:
        options.json.write_text(json.dumps(columns, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
