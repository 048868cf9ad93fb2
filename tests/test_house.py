"""The figures of `benchmarks/house.py` count what they say."""

from __future__ import annotations

import ast

from tests.scripts import load_script


def test_numbers_in_a_sentence_are_no_items() -> None:
    """Only what stands at the start of a line makes it an item of a list."""
    text = (
        "It reads SmolLM2. It has 2. Or 3 - more.\n\n1. First. Then\n   on.\n- Second [one](there.md).\n\n| a. | b. |\n"
    )
    found = [sentence.split() for sentence in load_script("house").sentences(text)]
    assert [" ".join(words) for words in found] == [
        "It reads SmolLM2.", "It has 2.", "Or 3 - more.", "First.", "Then on.", "Second one.",
    ]  # fmt: skip


def test_private_words_of_evaluation_are_gone() -> None:
    """Those that remain are public: an option, the key of a report, and the values of a figure."""
    house = load_script("house")
    files = house.read_files(house.ROOT / "src" / "ahn")
    words = {
        (module, word)
        for module, text in files.items()
        if module.removeprefix("cli.").startswith("evaluation")
        for word in house.private_words(module, ast.parse(text))
    }
    assert words == {("cli.evaluation.perplexity", "pieces"), ("evaluation.set_scores", "of")}
