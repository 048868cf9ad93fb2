"""The import graph of a checkout: which room imports which, what runs in circles, how many floors that makes.

A room is a file or a folder of `src/ahn`. `STOREYS` says all there is to know: a room imports from the storeys below
its own and, within its storey, only along a `>`. Imports for the type checker and in functions count like all others.
"""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

STOREYS = """
6  __main__ > cli > speed
5  training | evaluation | serving
4  distillation, cost > __init__ > checkpoint; generation
3  surgery > attention
2  cache > attachment > anchors, memories
1  backbone, ops, models > quantization > native, config > tokens, _home > errors
"""
Graph = Mapping[str, set[str]]


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


def read_files(source: Path) -> dict[str, str]:
    """Text of each module of a library by its dotted name.

    Args:
        source: Folder of the library, `src/ahn`.
    """
    return {name_of(file, source): file.read_text(encoding="utf-8") for file in sorted(source.rglob("*.py"))}


def name_of(file: Path, source: Path) -> str:
    """Dotted name of a module within the library: `cache.layer`; that of a package is its folder."""
    parts = [*file.relative_to(source).parent.parts, file.stem]
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imported_modules(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import of this library in a module.

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


def module_graph(files: Mapping[str, str]) -> dict[str, set[str]]:
    """For each module of the library those that it imports.

    Args:
        files: Text of each module by its dotted name, as of `read_files`.
    """
    graph: dict[str, set[str]] = {}
    for module, source in files.items():
        is_package = any(other.startswith(f"{module}.") for other in files)
        package = ".".join(["ahn", *(module.split(".") if is_package else module.split(".")[:-1])])
        names = {".".join(name.split(".")[1:]) or "__init__" for _, name in imported_modules(source, package)}
        # `from ahn.cache.layer import HippocampalLayer` is an import of the longest name that is a module.
        graph[module] = {_longest_module(name, files) for name in names} - {module}
    return graph


def _longest_module(name: str, modules: Mapping[str, str]) -> str:
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or "__init__"


def room_graph(files: Mapping[str, str]) -> dict[str, set[str]]:
    """For each room of the library the others that it imports."""
    graph: dict[str, set[str]] = {}
    for module, imported in module_graph(files).items():
        room = module.split(".")[0]
        graph.setdefault(room, set()).update({other.split(".")[0] for other in imported} - {room})
    return graph


def circles(graph: Graph) -> list[set[str]]:
    """Sets of modules or rooms that import each other, directly or by way of others."""
    reached = {module: _reached_from(module, graph) for module in graph}
    found: list[set[str]] = []
    for module in graph:
        circle = {other for other in reached[module] if module in reached.get(other, set())}
        if circle and circle not in found:
            found.append(circle)
    return found


def _reached_from(module: str, graph: Graph) -> set[str]:
    reached: set[str] = set()
    todo = list(graph[module])
    while todo:
        if (other := todo.pop()) not in reached:
            reached.add(other)
            todo += graph.get(other, set())
    return reached


def floors(graph: Graph) -> int:
    """Rooms in the longest chain of imports, where the rooms of a circle stand on one floor."""
    circle_of = {room: min(circle) for circle in circles(graph) for room in circle}
    collapsed: dict[str, set[str]] = {}
    for room, imported in graph.items():
        others = {circle_of.get(other, other) for other in imported}
        collapsed.setdefault(circle_of.get(room, room), set()).update(others - {circle_of.get(room, room)})
    heights: dict[str, int] = {}

    def height(room: str) -> int:
        if room not in heights:
            heights[room] = 1 + max((height(other) for other in collapsed.get(room, ())), default=0)
        return heights[room]

    return max(map(height, collapsed))


def arrows_up(graph: Graph, allowed: Mapping[str, set[str]]) -> list[str]:
    """The imports that the storeys do not allow, `room -> room`."""
    return [
        f"{room} -> {other}"
        for room, imported in sorted(graph.items())
        for other in sorted(imported)
        if other not in allowed.get(room, set())
    ]
