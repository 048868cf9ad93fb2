"""The house rules that a machine can hold: a file imports only from the rooms above its own, and none grows too long.

A room is a file or a folder of `src/ahn`. A new room gets its place in `ROOMS`: below everything that it uses.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "ahn"
ROOMS = (
    "errors",
    "config",
    "_home",
    "_smollm2",
    "models",
    "native",
    "ops",
    "memories",
    "positions",
    "scores",
    "attachment",
    "cache",
    "_compat",  # it names the caches that transformers brings, to tell them from ours
    "foreseen",
    "voting",
    "decoding",
    "plan",
    "lookup",
    "pieces",
    "compiled_attention",
    "block_attention",
    "softmax",
    "attention",
    "linears",
    "hooks",
    "probe",
    "surgery",
    "checkpoint",
    "reading",
    "prompts",
    "texts",
    "cost",
    "__init__",  # the public API: what stands below uses it as any user does
    "distillation",
    "training",
    "evaluation",
    "speed",
    "serving",
    "cli",
    "__main__",
)
STRANGERS = {"training", "evaluation", "serving"}  # never import each other
LONGEST = 400
FILES = sorted(SOURCE.rglob("*.py"))


def room_of(file: Path) -> str:
    """First part of a file's place in the package: `cache/layer.py` is in the room `cache`."""
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and room of every import of this library in a module, in functions too.

    Imports for the type checker alone are left out: they are not there when the program runs.

    Args:
        source: Text of the module.
        package: Dotted name of the package that the module is in, to which relative imports refer.
    """
    todo: list[ast.AST] = [ast.parse(source)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            todo.extend(node.orelse)
            continue
        todo.extend(ast.iter_child_nodes(node))
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "ahn":
                yield node.lineno, parts[1] if len(parts) > 1 and parts[1] in ROOMS else "__init__"


def wrong_imports(source: str, room: str, package: str) -> list[str]:
    """What a module of this room must not import, a line of text for each."""
    above = ROOMS[: ROOMS.index(room) + 1]
    return [
        f"line {line}: {room} imports {other}, which is {'its stranger' if other in STRANGERS else 'below it'}"
        for line, other in imported_rooms(source, package)
        if other not in above or (room in STRANGERS and other in STRANGERS - {room})
    ]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
class TestFiles:
    def test_has_a_room(self, file: Path) -> None:
        assert room_of(file) in ROOMS, (
            f"give the new room {room_of(file)!r} its place in ROOMS of {Path(__file__).name}"
        )

    def test_imports_only_from_rooms_above(self, file: Path) -> None:
        if room_of(file) not in ROOMS:
            pytest.skip("it has no place yet, which another test says")
        package = ".".join(["ahn", *file.relative_to(SOURCE).parent.parts])
        assert wrong_imports(file.read_text(encoding="utf-8"), room_of(file), package) == []

    def test_is_not_too_long(self, file: Path) -> None:
        lines = len(file.read_text(encoding="utf-8").splitlines())
        assert lines <= LONGEST, f"{lines} lines: a file over {LONGEST} holds two ideas"


class TestTheChecker:
    @pytest.mark.parametrize(
        ("source", "room", "package"),
        [
            ("from ahn.cache import HippocampalCache", "ops", "ahn.ops"),
            ("import ahn.surgery", "attention", "ahn"),
            ("from ahn import surgery", "attention", "ahn"),
            ("from ahn import AHNConfig", "surgery", "ahn"),
            ("from . import cli", "surgery", "ahn"),
            ("from .cli import main", "surgery", "ahn"),
            ("from ..surgery import attach", "memories", "ahn.memories"),
            ("def late():\n    from ahn.surgery import attach", "ops", "ahn.ops"),
            ("from ahn.training import train", "evaluation", "ahn.evaluation"),
            ("from ahn.evaluation import run", "serving", "ahn.serving"),
            ("from ahn.serving import serve", "training", "ahn.training"),
            ("if TYPE_CHECKING:\n    pass\nelse:\n    import ahn.surgery", "ops", "ahn.ops"),
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
            ("from ahn import AHNConfig, surgery", "training", "ahn.training"),
            ("if TYPE_CHECKING:\n    from ahn.surgery import attach", "ops", "ahn.ops"),
            ("from ahn.training import train\nfrom ahn.serving import serve", "cli", "ahn.cli"),
        ],
    )
    def test_allows(self, source: str, room: str, package: str) -> None:
        assert wrong_imports(source, room, package) == []
