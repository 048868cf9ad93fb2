"""The page of results says what was measured."""

from __future__ import annotations

from pathlib import Path

from tests.scripts import ROOT, load_script


def test_the_page_is_made_of_what_is_kept() -> None:
    found = load_script("results")
    written = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert written == found.page(found.measured()), "run: make results TEXTS=FOLDER ARGS='--only page'"
    pictures = [line.split("(")[1].rstrip(")") for line in written.splitlines() if line.startswith("![")]
    assert [name for name in pictures if not (ROOT / "docs" / name).is_file()] == []


def test_the_book_is_the_shortest_long_text(tmp_path: Path) -> None:
    for name, size in (("a", 400_000), ("b", 900_000), ("c", 600_000)):
        (tmp_path / f"{name}.txt").write_text("x" * size)
    assert load_script("results").find_book(tmp_path).name == "c.txt"
    (tmp_path / "c.txt").unlink()
    (tmp_path / "b.txt").unlink()
    assert load_script("results").find_book(tmp_path).name == "a.txt"
