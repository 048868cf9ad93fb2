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


def test_each_gap_is_a_part_of_the_page() -> None:
    """The table has every arm, with the window of the same bytes where it has a memory or anchors."""
    script = load_script("results")
    closed = {"share": 0.4, "low": 0.3, "high": 0.5}
    arms = {
        "full": {"closed": None, "counted_bytes": 9_000_000, "nll": {"beyond": 3.0}, "tokens": 16_384},
        "window": {"closed": None, "counted_bytes": 1_000_000, "nll": {"beyond": 4.0}},
        "ahn": {"closed": closed, "counted_bytes": 2_000_000, "nll": {"beyond": 3.6}},
    }
    report = {
        "settings": {"length": 32768, "window": 256, "sinks": 32},
        "results": {
            "arms": arms,
            "documents": [{}, {}],
            "equal_bytes": {"ahn": {"arm": "window+110", "nats_better": 0.1, "low": -0.01, "high": 0.2}},
        },
        "environment": {"date": "today", "device": "CPU", "torch": "2", "transformers": "5"},
    }
    shown = script.page({"gap_32768_256.json": report})
    assert "Share of the gap, byte for byte: 32,768 tokens, window 256" in shown
    assert "`full` reads the first 8,192 tokens alone" in shown
    assert "images/gap_32768_256.png" in shown
    assert "| `ahn` | 2.0 | 3.6000 | 40 %, 30 to 50 | window+110 | +0.1000 (-0.0100 to +0.2000) |" in shown
    assert "The equal window is enlarged" in shown
    report["results"]["equal_bytes"] = {}
    assert "have not been read at this length" in script.page({"gap_32768_256.json": report})
    assert script.GAPS[0].picture == "gap.png"


def test_what_is_owed_to_the_text_itself() -> None:
    script = load_script("results")
    shares = [{"share": share, "low": share - 0.1, "high": share + 0.1} for share in (0.4, 0.3, 0.2)]
    report = {
        "settings": {"length": 2048, "window": 256, "adapter": "smollm2-135m/hybrid"},
        "results": {
            "arms": {"ahn": {"closed": shares[0]}},
            "documents": [{}] * 24,
            "other_text": {
                "ahn": {"closed": shares[1], "own": shares[2], "nats_better": 0.01, "low": -0.01, "high": 0.03}
            },
        },
        "environment": {"date": "today", "device": "CPU", "torch": "2", "transformers": "5"},
    }
    shown = script.page({script.OTHER_TEXTS[0].other_text_file: report})
    assert "## What of it is memory: 2,048 tokens, window 256" in shown
    row = "| `ahn` | 40 %, 30 to 50 | 30 %, 20 to 40 | 20 %, 10 to 30 | +0.0100 (-0.0100 to +0.0300) |"
    assert row in shown
    report["settings"]["adapter"] = None  # as in reports of the time when there was one memory
    shown = script.page({script.OTHER_TEXTS[1].other_text_file: report})
    assert "tokens, window 256, gated_delta_net\n" in shown
    assert "The memory is `gated_delta_net`, 24 excerpts" in shown
