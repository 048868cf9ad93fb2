"""The house rules that a machine can hold: where a file may import from, that nothing runs in circles, how long it is.

A room is a file or a folder of `src/ahn`. `STOREYS` says all there is to know: a room imports from the storeys below
its own and, within its storey, only along a `>`. Imports for the type checker count like all others.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "ahn"
STOREYS = """
6  __main__ > cli > speed
5  training | evaluation
4  distillation, cost > __init__ > checkpoint; generation
3  surgery > attention
2  cache > attachment > anchors, memories
1  backbone, ops, models > native, config > tokens, _home > errors
"""
LONGEST = 400
FILES = sorted(SOURCE.rglob("*.py"))


def read_storeys(text: str) -> dict[str, set[str]]:
    """The rooms that each room may import from.

    Args:
        text: A line for each storey, the lowest last: its number, then chains of rooms (`a, b > c`: each left of a `>`
            may import each right of it) that `;` or `|` separates and that do not import each other.
    """
    allowed: dict[str, set[str]] = {}
    below: set[str] = set()
    for line in reversed(text.strip().splitlines()):
        chains = line.split(maxsplit=1)[1].replace("|", ";").split(";")
        storey: set[str] = set()
        for chain in chains:
            links = [{room.strip() for room in link.split(",")} for link in chain.split(">")]
            for number, link in enumerate(links):
                later: set[str] = set().union(*links[number + 1 :])
                allowed |= {room: {room} | below | later for room in link}
                storey |= link
        below |= storey
    return allowed


ALLOWED = read_storeys(STOREYS)


def name_of(file: Path) -> str:
    """Dotted name of a module within the library: `cache.layer`; that of a package is its folder."""
    parts = [*file.relative_to(SOURCE).parent.parts, file.stem]
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imported_modules(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import of this library in a module, in functions and for the type checker too.

    Args:
        source: Text of the module.
        package: Dotted name of the package that the module is in, to which relative imports refer.
    """
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        yield from ((node.lineno, name) for name in names if name.split(".")[0] == "ahn")


def room_of(name: str) -> str:
    """The room of something imported, `ahn.cache.HippocampalCache`: what is no room is of the public API."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ALLOWED else "__init__"


def wrong_imports(source: str, room: str, package: str) -> list[str]:
    """What a module of this room must not import, a line of text for each."""
    return [
        f"line {line}: {room} must not import {room_of(name)}"
        for line, name in imported_modules(source, package)
        if room_of(name) not in ALLOWED[room]
    ]


def module_graph(files: dict[str, str]) -> dict[str, set[str]]:
    """For each module of the library those that it imports.

    Args:
        files: Text of each module by its dotted name, as of `name_of`.
    """
    graph: dict[str, set[str]] = {}
    for module, source in files.items():
        is_package = any(other.startswith(f"{module}.") for other in files)
        package = ".".join(["ahn", *(module.split(".") if is_package else module.split(".")[:-1])])
        found = {".".join(name.split(".")[1:]) or "__init__" for _, name in imported_modules(source, package)}
        # `from ahn.cache.layer import HippocampalLayer` is an import of the longest name that is a module.
        graph[module] = {_longest_module(name, files) for name in found} - {module}
    return graph


def _longest_module(name: str, modules: dict[str, str]) -> str:
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or "__init__"


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules that import each other, directly or by way of others."""
    reached = {module: _reached_from(module, graph) for module in graph}
    found: list[set[str]] = []
    for module in graph:
        circle = {other for other in reached[module] if module in reached.get(other, set())}
        if circle and circle not in found:
            found.append(circle)
    return found


def _reached_from(module: str, graph: dict[str, set[str]]) -> set[str]:
    reached: set[str] = set()
    todo = list(graph[module])
    while todo:
        if (other := todo.pop()) not in reached:
            reached.add(other)
            todo += graph.get(other, set())
    return reached


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
class TestFiles:
    def test_has_a_room(self, file: Path) -> None:
        room = name_of(file).split(".")[0]
        assert room in ALLOWED, f"give the new room {room!r} its place in STOREYS of {Path(__file__).name}"

    def test_imports_from_below(self, file: Path) -> None:
        room = name_of(file).split(".")[0]
        if room not in ALLOWED:
            pytest.skip("it has no place yet, which another test says")
        package = ".".join(["ahn", *file.relative_to(SOURCE).parent.parts])
        assert wrong_imports(file.read_text(encoding="utf-8"), room, package) == []

    def test_is_not_too_long(self, file: Path) -> None:
        lines = len(file.read_text(encoding="utf-8").splitlines())
        assert lines <= LONGEST, f"{lines} lines: a file over {LONGEST} holds two ideas"


def test_nothing_imports_in_circles() -> None:
    assert circles(module_graph({name_of(file): file.read_text(encoding="utf-8") for file in FILES})) == []


def test_every_room_is_there() -> None:
    assert {name_of(file).split(".")[0] for file in FILES} == set(ALLOWED)


class TestTheChecker:
    @pytest.mark.parametrize(
        ("source", "room", "package"),
        [
            ("from ahn.cache import HippocampalCache", "ops", "ahn.ops"),
            ("import ahn.surgery", "attention", "ahn.attention"),
            ("from ahn import surgery", "attention", "ahn.attention"),
            ("from ahn import AHNConfig", "surgery", "ahn"),
            ("from . import cli", "surgery", "ahn"),
            ("from .cli import main", "surgery", "ahn"),
            ("from ..surgery import attach", "memories", "ahn.memories"),
            ("from ahn.memories import Memory", "anchors", "ahn.anchors"),
            ("from ahn.checkpoint import load", "generation", "ahn"),
            ("def late():\n    from ahn.surgery import attach", "ops", "ahn.ops"),
            ("from ahn.training import train", "evaluation", "ahn.evaluation"),
            ("from ahn.evaluation import run", "training", "ahn.training"),
            ("if TYPE_CHECKING:\n    from ahn.surgery import attach", "ops", "ahn.ops"),
        ],
    )
    def test_finds(self, source: str, room: str, package: str) -> None:
        assert len(wrong_imports(source, room, package)) == 1

    @pytest.mark.parametrize(
        ("source", "room", "package"),
        [
            ("import torch\nfrom os import path", "ops", "ahn.ops"),
            ("from ahn.errors import ShapeError", "ops", "ahn.ops"),
            ("from . import naive\nfrom .naive import delta_rule", "ops", "ahn.ops"),
            ("from ahn.ops.naive import delta_rule", "ops", "ahn.ops"),
            ("from ahn import native", "ops", "ahn.ops"),
            ("from ahn import AHNConfig, surgery", "training", "ahn.training"),
            ("from ahn.training import train\nfrom ahn.evaluation import measure", "cli", "ahn.cli"),
        ],
    )
    def test_allows(self, source: str, room: str, package: str) -> None:
        assert wrong_imports(source, room, package) == []

    def test_finds_circles(self) -> None:
        files = {
            "cache": "from ahn.cache.layer import Layer",
            "cache.layer": "if TYPE_CHECKING:\n    from ahn.cache.bank import Bank",
            "cache.bank": "def late():\n    from . import layer",
            "errors": "",
        }
        graph = module_graph(files)
        assert graph["cache.bank"] == {"cache.layer"}
        assert circles(graph) == [{"cache.layer", "cache.bank"}]
