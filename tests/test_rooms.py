"""The house rules that a machine can hold: where a file may import from, that nothing runs in circles, how long it is.

The rule of the rooms, six storeys, is `STOREYS` of `tests/rooms.py`.
"""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

from tests.rooms import (
    STOREYS,
    arrows_up,
    circles,
    floors,
    imported_modules,
    module_graph,
    name_of,
    read_files,
    read_storeys,
    room_graph,
)
from tests.scripts import load_script

SOURCE = Path(__file__).parents[1] / "src" / "ahn"
LOOSE = ["config", "tokens", "errors", "attachment", "surgery", "generation", "_home", "__init__", "__main__"]
LONGEST, MOST_ROOMS, MOST_FLOORS = 400, 26, 16
LONGEST_FUNCTION, USUAL_FUNCTION = 40, 18
ALLOWED = read_storeys(STOREYS)
TEXTS = read_files(SOURCE)
FILES = sorted(SOURCE.rglob("*.py"))


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


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
class TestFiles:
    def test_has_a_room(self, file: Path) -> None:
        room = name_of(file, SOURCE).split(".")[0]
        assert room in ALLOWED, f"give the new room {room!r} its place in STOREYS of tests/rooms.py"

    def test_imports_from_below(self, file: Path) -> None:
        room = name_of(file, SOURCE).split(".")[0]
        if room not in ALLOWED:
            pytest.skip("it has no place yet, which another test says")
        package = ".".join(["ahn", *file.relative_to(SOURCE).parent.parts])
        assert wrong_imports(file.read_text(encoding="utf-8"), room, package) == []

    def test_is_not_too_long(self, file: Path) -> None:
        lines = len(file.read_text(encoding="utf-8").splitlines())
        assert lines <= LONGEST, f"{lines} lines: a file over {LONGEST} holds two ideas"


class TestTheHouse:
    def test_nothing_imports_in_circles(self) -> None:
        assert circles(room_graph(TEXTS)) == []
        assert circles(module_graph(TEXTS)) == []

    def test_every_room_is_there(self) -> None:
        assert set(room_graph(TEXTS)) == set(ALLOWED)

    def test_has_few_rooms_and_floors(self) -> None:
        rooms = room_graph(TEXTS)
        assert len(rooms) <= MOST_ROOMS
        assert floors(rooms) <= MOST_FLOORS
        assert arrows_up(rooms, ALLOWED) == []

    def test_only_these_modules_are_loose(self) -> None:
        assert sorted(file.stem for file in SOURCE.glob("*.py")) == sorted(LOOSE)


class TestFunctions:
    house = load_script("house")

    def sizes(self) -> dict[str, int]:
        return {
            f"{module}.{name}": size for module, text in TEXTS.items() for name, size in self.house.function_sizes(text)
        }

    def test_only_commands_are_long(self) -> None:
        long = [name for name, size in self.sizes().items() if size > LONGEST_FUNCTION]
        assert [name for name in long if not re.fullmatch(r"cli\..*\.command:\d+", name)] == []

    def test_most_are_short(self) -> None:
        sizes = sorted(self.sizes().values())
        assert sizes[round(0.9 * (len(sizes) - 1))] <= USUAL_FUNCTION


class TestNames:
    house = load_script("house")

    @pytest.mark.parametrize("module", TEXTS)
    def test_public_ones_have_a_docstring(self, module: str) -> None:
        assert all(self.house.public_docstrings(module, ast.parse(TEXTS[module])))

    def test_a_class_has_its_name_alone(self) -> None:
        nodes = [node for text in TEXTS.values() for node in ast.walk(ast.parse(text))]
        names = Counter(node.name for node in nodes if isinstance(node, ast.ClassDef))
        assert [name for name, count in names.items() if count > 1] == []


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

    def test_counts_floors(self) -> None:
        assert floors({"cli": {"cache"}, "cache": {"tokens"}, "tokens": {"errors"}, "errors": set()}) == 4
        # Rooms of a circle share one floor.
        assert floors({"cli": {"cache"}, "cache": {"tokens"}, "tokens": {"cache", "errors"}, "errors": set()}) == 3

    def test_finds_arrows_up(self) -> None:
        allowed = read_storeys("2  cache > anchors\n1  ops; native")
        assert arrows_up({"ops": {"native"}, "cache": {"anchors", "ops"}, "anchors": {"cache"}}, allowed) == [
            "anchors -> cache",
            "ops -> native",
        ]

    def test_measures_functions(self) -> None:
        text = "def outer(a: int) -> int:\n    '''What\n\n    it does.'''\n\n    def inner(): return 1\n    return a\n"
        sizes = load_script("house").function_sizes(text)
        assert list(sizes) == [("outer:1", 3), ("outer._inner:6", 1)]

    def test_reads_sentences(self) -> None:
        page = "# Title\n\nOne two\nthree. Four [five six](a/b)!\n\n- seven\n- eight nine\n\n| a |\n```\ncode. x\n```\n"
        sentences = load_script("house").sentences(page)
        assert [len(sentence.split()) for sentence in sentences] == [3, 3, 1, 2]
